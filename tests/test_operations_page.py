"""What the pages tell an operator to look at exists under that name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from server.access.guard import _CALLER
from server.errors import ErrorKind
from server.jobs.types import JobState
from server.metrics import Metrics
from server.prefix_cache_metrics import _PREFIX
from server.proxy.metrics import ProxyMetrics

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
SUFFIXES = {"counter": ("_total",), "histogram": ("", "_bucket", "_count", "_sum")}


def names_of(registry: CollectorRegistry) -> set[str]:
    return {
        family.name + suffix
        for family in registry.collect()
        for suffix in SUFFIXES.get(family.type, ("",))
    }


KNOWN = names_of(Metrics().registry) | names_of(ProxyMetrics().registry)
# Those of Ray's own registry, which is not asked here.
for source in ROOT.glob("deploy/**/*.py"):
    KNOWN |= set(re.findall(r'"(rectokens_[a-z_]+)"', source.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_on_the_pages_exist(page: Path) -> None:
    # Tables, sources and packages have such names, too.
    named = set(re.findall(r"`((?:rectokens|process)_[a-z_]+[a-z])[`{]", page.read_text()))
    # Made up of a prefix and what there is to tell, when they are read.
    unknown = {
        name
        for name in named - KNOWN
        if not name.startswith((_PREFIX, _CALLER)) and name.removesuffix("_total") not in KNOWN
    }
    assert unknown <= {"rectokens_turboquant"}, unknown


def test_labels_on_the_operations_page_exist() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert len(set(re.findall(r"`(rectokens_[a-z_]+)", text))) > 20
    rejected = set(re.findall(r'rejected_total\{reason="(\w+)"\}', text))
    assert rejected <= set(ErrorKind), rejected - set(ErrorKind)
    states = set(re.findall(r'rectokens_jobs\{state="(\w+)"\}', text))
    assert states <= set(JobState)
    closed = set(re.findall(r'connections_closed_total\{reason="(\w+)"\}', text))
    source = (ROOT / "server/connections.py").read_text()
    assert closed == set(re.findall(r'connection_closed\("(\w+)"\)', source))


def test_settings_on_the_operations_page_exist() -> None:
    from server.settings import setting_fields

    groups = {field.group for field in setting_fields()} - {""}
    paths = {field.path for field in setting_fields()}
    text = (ROOT / "docs/operations.md").read_text()
    named = set(re.findall(rf"`((?:{'|'.join(sorted(groups))})\.[a-z_]+)`", text))
    assert named - {"store.failure"} <= paths  # of /ready
    assert len(named) > 8
