"""A proxy on a store has what is active in it, as the servers behind it."""

from __future__ import annotations

import asyncio
import os
import shutil

import fsspec
import pytest
import torch

from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release_store import ReleaseStore
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog
from server.errors import ServiceError
from server.proxy.errors import ProxyError
from server.proxy.following import ProxyFollower
from server.proxy.requests import ProxyRequest, TextsOrIds
from server.proxy.service import load_proxy
from server.settings import load_settings
from tests.waiting import until


@pytest.fixture
def releases(store, tmp_path):
    """A store with one release, which is active."""
    root = tmp_path / "store"
    shutil.copytree(store.model.parent, root / "models")
    shutil.copytree(store.catalog.parent, root / "catalogs")
    releases = open_release_store(root)
    releases.activate(releases.bind(store.model.name, store.catalog.name))
    return releases


@pytest.fixture
def settings(releases):
    return load_settings(
        {
            "proxy.upstream": "http://x",
            "store.path": str(releases.local.root),
            "store.poll_s": "0.02",
        }
    )


def activate_items(releases, *names):
    """A catalog of other items, with the model that is active; its folder."""
    opened = releases.open_active()
    catalog = build_catalog(
        names,
        torch.tensor([[0, 0, i] for i in range(len(names))]),
        codebook_size=4,
        tokenizer_fingerprint="ab" * 32,
    )
    saved = save_catalog(releases.local.root / "catalogs", catalog)
    releases.activate(releases.bind(opened.model_version, saved.name))
    return saved


def takes(proxy, item):
    """Whether a prompt may name this item."""
    prompt = TextsOrIds((f"<item:{item}>",), as_list=False, add_special_tokens=True)
    request = ProxyRequest(rest={}, prompt=prompt, stream=False)
    try:
        proxy.upstream_body(request)
    except ServiceError:
        return False
    return True


async def test_new_items_can_be_named_once_their_catalog_is_active(releases, settings):
    follower = ProxyFollower(settings, releases)
    proxy = load_proxy(settings, *follower.first())
    assert [takes(proxy, one) for one in ("B001", "new")] == [True, False]
    assert follower.look(proxy) is False

    activate_items(releases, "new")
    assert follower.look(proxy) is True
    assert [takes(proxy, one) for one in ("B001", "new")] == [False, True]
    assert follower.look(proxy) is False

    releases.rollback()
    assert follower.look(proxy) is True
    assert [takes(proxy, one) for one in ("B001", "new")] == [True, False]


async def test_what_is_damaged_is_left_alone_and_tried_again(releases, settings):
    follower = ProxyFollower(settings, releases)
    proxy = load_proxy(settings, *follower.first())
    (file,) = activate_items(releases, "new").glob("*.parquet")
    content = file.read_bytes()
    file.write_bytes(b"x")
    for _ in range(2):
        with pytest.raises((ProxyError, ValueError)):
            follower.look(proxy)
        assert takes(proxy, "B001")
    file.write_bytes(content)
    assert follower.look(proxy) is True
    assert takes(proxy, "new")


def test_copies_of_what_the_store_has_no_more_go(releases, settings, tmp_path):
    bucket, path = fsspec.filesystem("memory"), f"/{tmp_path.name}/store"

    def upload() -> ReleaseStore:
        for file in releases.local.root.rglob("*"):
            name = file.relative_to(releases.local.root).as_posix()
            if file.is_file() and name.count("/") == 2:
                bucket.pipe_file(f"{path}/{name}", file.read_bytes())
        return open_release_store(f"memory:/{path}", cache=tmp_path / "cache")

    store = upload()
    store.activate(releases.active().release)
    follower = ProxyFollower(settings, store)
    proxy = load_proxy(settings, *follower.first())
    copied = tmp_path / "cache" / "catalogs" / store.open_active().catalog_version
    activate_items(releases, "new")
    upload().activate(releases.active().release)
    bucket.rm(f"{path}/catalogs/{copied.name}", recursive=True)
    os.utime(copied, (0, 0))
    assert follower.look(proxy) is True
    assert not copied.exists()
    assert takes(proxy, "new")


def metric(proxy, name):
    """Value of one of the metrics of following."""
    return proxy.metrics.registry.get_sample_value(f"rectokens_proxy_{name}")


async def test_metrics_tell_when_the_proxy_is_behind(releases, settings):
    follower = ProxyFollower(settings, releases)
    proxy = load_proxy(settings, *follower.first())
    follower.look(proxy)
    assert metric(proxy, "release_behind") == 0
    first = metric(proxy, "store_activations")
    (file,) = activate_items(releases, "new").glob("*.parquet")
    content = file.read_bytes()
    file.write_bytes(b"x")
    with pytest.raises((ProxyError, ValueError)):
        follower.look(proxy)
    assert metric(proxy, "release_behind") == 1
    assert metric(proxy, "store_activations") == first + 1
    with follower.following(proxy):
        await until(lambda: metric(proxy, "follow_failures_total"))
    file.write_bytes(content)
    follower.look(proxy)
    assert metric(proxy, "release_behind") == 0


async def test_it_looks_by_itself_until_it_is_told_to_stop(releases, settings):
    follower = ProxyFollower(settings, releases)
    proxy = load_proxy(settings, *follower.first())
    with follower.following(proxy):
        activate_items(releases, "new")
        await until(lambda: takes(proxy, "new"))
    releases.rollback()
    await asyncio.sleep(0.2)
    assert takes(proxy, "new")
