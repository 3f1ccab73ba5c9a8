"""A service around an engine made to order."""

from __future__ import annotations

import pytest


@pytest.fixture
def engine(dummy):
    return dummy.DummyEngine()


@pytest.fixture
async def running(start_app, dummy, engine):
    return await start_app(dummy.make_release(engine))
