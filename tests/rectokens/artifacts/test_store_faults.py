"""Killed at any moment, or raced by another process, a store opens and its active release is whole.

``CHAOS_ROUNDS`` sets how many times the writers are killed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
import torch

from rectokens.artifacts.manifest import ARTIFACT_KINDS
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release_store import ActivationConflictError, ReleaseStore
from rectokens.catalog.artifact import load_catalog, save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.catalog.catalog import Catalog
from tests.waiting import LIMIT_S

WORKER = Path(__file__).with_name("store_worker.py")
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "5"))


@pytest.fixture
def root(model_folder: Path, spec) -> Path:
    """A store with one release, active."""
    root = model_folder.parent.parent
    generator = torch.Generator().manual_seed(0)
    catalog = build_catalog(
        [f"W{i}" for i in range(200)],
        torch.randint(0, 8, (200, 3), generator=generator),
        codebook_size=8,
        tokenizer_fingerprint=spec.tokenizer_fingerprint,
        metadata=pl.DataFrame({"stock": list(range(200))}),
    )
    store = open_release_store(root)
    folder = save_catalog(store.local.folder("catalog"), catalog)
    store.activate(store.bind(model_folder.name, folder.name))
    return root


def start(root: Path, model_version: str, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(root), model_version, str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"},
    )


def check(store: ReleaseStore) -> None:
    """What must hold at any moment."""
    current = store.active()
    assert current is not None
    release = store.verify(current.release)
    assert load_catalog(release.catalog_path).version == release.catalog_version
    numbers = [record.sequence for record in store.history()]
    assert numbers == list(range(1, current.sequence + 1))
    for kind in ARTIFACT_KINDS:
        for one in store.versions(kind):
            assert one.state != "damaged", one


def test_kill_9(root: Path, model_folder: Path):
    chance = random.Random(0)
    store = open_release_store(root)
    # The next two start while the two before them work: starting takes far longer than dying.
    running = [start(root, model_folder.name, seed) for seed in (0, 1)]
    steps = 0
    for round_number in range(ROUNDS):
        last = round_number == ROUNDS - 1
        seeds = [] if last else [2 * round_number + 2, 2 * round_number + 3]
        upcoming = [start(root, model_folder.name, seed) for seed in seeds]
        for worker in running:
            assert worker.stdout is not None
            assert worker.stdout.readline(), worker.communicate()[1]
        for worker in running:
            time.sleep(chance.random() * 0.3)
            worker.send_signal(signal.SIGKILL)
        for worker in running:
            out, err = worker.communicate(timeout=LIMIT_S)
            assert worker.returncode == -signal.SIGKILL, err
            steps += len(out.split()) + 1
        if not upcoming:
            check(store)
        else:
            check_active_only(store)
        running = upcoming
    assert steps >= ROUNDS
    store.clean(older_than_s=0.0)
    assert list(root.rglob(".partial-*")) == []
    check(store)
    assert store.rollback().action == "rollback"


def check_active_only(store: ReleaseStore) -> None:
    """As :func:`check`, beside a process that works on the store meanwhile."""
    for _ in range(20):
        current = store.active()
        assert current is not None
        try:
            store.verify(current.release)
        except ValueError:
            # Fine only if it is not the active one any more.
            assert store.active() != current
            continue
        return
    pytest.fail("the active release never held still")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("num_items", [30_000, 200_000])  # the trie, the table does not fit
def test_full_disk_while_a_catalog_is_saved(full_disk: Path, num_items: int):
    def catalog(size: int) -> Catalog:
        generator = torch.Generator().manual_seed(0)
        return build_catalog(
            [f"W{i}" for i in range(size)],
            torch.randint(0, 99, (size, 3), generator=generator),
            codebook_size=99,
            tokenizer_fingerprint="0" * 64,
        )

    small = save_catalog(full_disk / "catalogs", catalog(100))
    with pytest.raises(OSError, match=r"(trie|items)\..* cannot be written: .*No space left"):
        save_catalog(full_disk / "catalogs", catalog(num_items))
    assert list((full_disk / "catalogs").iterdir()) == [small]
    load_catalog(small)


def test_of_many_that_expect_the_same_exactly_one_wins(root: Path, model_folder, spec):
    store = open_release_store(root)
    releases = []
    for seed in range(4):
        catalog = build_catalog(
            ["x", "y"],
            torch.tensor([[seed, 0, 0], [0, seed, 0]]),
            codebook_size=8,
            tokenizer_fingerprint=spec.tokenizer_fingerprint,
        )
        folder = save_catalog(store.local.folder("catalog"), catalog)
        releases.append(store.bind(model_folder.name, folder.name))
    before = store.active()
    script = (
        "import sys\n"
        "from rectokens.artifacts.open_store import open_release_store\n"
        "from rectokens.artifacts.release_store import ActivationConflictError\n"
        "store = open_release_store(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    store.activate(sys.argv[2], expected_active=sys.argv[3])\n"
        "    print('won')\n"
        "except ActivationConflictError as error:\n"
        "    print('lost')\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(root), release, before.release],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for release in releases[:2]
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    with ThreadPoolExecutor() as pool:
        answers = list(
            pool.map(lambda racer: racer.communicate("go\n", timeout=LIMIT_S)[0], racers)
        )
    assert sorted(answers) == ["lost\n", "won\n"]
    winner = releases[answers.index("won\n")]
    assert store.active().release == winner
    assert store.active().sequence == before.sequence + 1
    with pytest.raises(ActivationConflictError):
        store.activate(releases[3], expected_active=before.release)

    # And without an expectation all are heard, one after the other.
    def activate(release: str) -> int:
        return open_release_store(root).activate(release).sequence

    others = [one for one in releases if one != winner]
    with ThreadPoolExecutor() as pool:
        numbers = list(pool.map(activate, others))
    assert sorted(numbers) == [before.sequence + n for n in (2, 3, 4)]
    check(store)
