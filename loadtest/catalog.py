"""What the server serves: items to ask about, and releases to swap. Blocking HTTP."""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path
from typing import Any

import requests

_log = logging.getLogger(__name__)
_TIMEOUT_S = 60
# Asked for in turn until the server's limits allow one.
_TOP_K = (1_000, 100, 10, 1)


class LoadTestError(RuntimeError):
    """The load test cannot be made; the message is all a user needs."""


def bearer(key: str | None) -> dict[str, str]:
    """The header for a key; none without one."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def known_items(host: str, items_file: str | None, key: str | None) -> list[str]:
    """Item ids to ask about: of a file, or what somebody unknown is recommended.

    Raises:
        LoadTestError: there are none, or the server cannot be asked.
    """
    if items_file is not None:
        try:
            items = Path(items_file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise LoadTestError(f"--items-file {items_file}: {error}") from None
        items = [item for item in items if item]
    else:
        items = _recommended_to_nobody(host, key)
    if not items:
        raise LoadTestError(f"no item ids in {items_file or 'the answer of ' + host}")
    return items


def constraint_sets(host: str, key: str | None) -> list[str]:
    """Names of the sets of the catalog that is served.

    Raises:
        LoadTestError: the server does not tell.
    """
    models = _json("GET", f"{host}/v1/models", headers=bearer(key))
    return list(models["data"][0]["constraint_sets"])


class Swapper:
    """Activates releases of the store, one after another, and at the end the first one again.

    Args:
        host: base URL of the server.
        key: of ``/admin``.
        seed: of the choice.

    Raises:
        LoadTestError: the store has less than two releases, or cannot be asked.
    """

    def __init__(self, host: str, key: str | None, seed: int = 0) -> None:
        self._host, self._headers, self._rng = host, bearer(key), random.Random(seed)
        listed = _json("GET", f"{host}/admin/releases", headers=self._headers)["releases"]
        sound = [release for release in listed if release["state"] != "damaged"]
        self._releases = [release["version"] for release in sound]
        active = [release["version"] for release in sound if release["state"] == "active"]
        if len(self._releases) < 2 or not active:
            raise LoadTestError(
                f"swaps need two sound releases in the store, one of them active; {host} has "
                f"{len(self._releases)}"
            )
        self._first: str = active[0]
        # Nothing while one is being activated.
        self._current: str | None = self._first

    def swap(self) -> None:
        """Activate another one and wait for it.

        Raises:
            LoadTestError: it did not become active.
        """
        self._activate(self._rng.choice([one for one in self._releases if one != self._current]))

    def restore(self) -> None:
        """Activate the first one again.

        Raises:
            LoadTestError: it did not become active.
        """
        if self._current != self._first:
            self._activate(self._first)

    def _activate(self, release: str) -> None:
        url = f"{self._host}/admin/releases/{release}/activate"
        body = {"gate": {"skip": True}}
        self._current = None
        job = _json("POST", url, headers=self._headers, json=body)
        ends = time.monotonic() + 10 * _TIMEOUT_S
        while job["state"] in ("queued", "running") and time.monotonic() < ends:
            time.sleep(0.1)
            job = _json("GET", f"{self._host}/admin/jobs/{job['id']}", headers=self._headers)
        if job["state"] != "succeeded":
            raise LoadTestError(f"release {release} was not activated: {job}")
        self._current = release
        _log.info("release %s is active", release)


def _recommended_to_nobody(host: str, key: str | None) -> list[str]:
    reason = ""
    for top_k in _TOP_K:
        body = {"history": [], "top_k": top_k, "beam_width": top_k}
        try:
            answer = _json("POST", f"{host}/v1/recommend", headers=bearer(key), json=body)
        except LoadTestError as error:
            reason = str(error)
            continue
        return [item["item_id"] for item in answer["items"]]
    raise LoadTestError(reason)


def _json(method: str, url: str, **kwargs: Any) -> Any:
    try:
        response = requests.request(method, url, timeout=_TIMEOUT_S, **kwargs)
    except requests.RequestException as error:
        raise LoadTestError(f"{method} {url}: {error}") from None
    if response.status_code not in (200, 202):
        raise LoadTestError(f"{method} {url}: {response.status_code} {response.text[:500]}")
    return response.json()
