"""Parts of the server's tests that the deployments are tried with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import structlog

SERVER_TESTS = Path(__file__).parents[1] / "server"


@pytest.fixture(scope="session", autouse=True)
def _quiet_logs() -> None:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[])


@pytest.fixture(scope="session")
def dummy() -> ModuleType:
    """The module ``dummy_service`` of the server's tests."""
    # Tests are no package (importlib mode), so a sibling is loaded by its path.
    path = SERVER_TESTS / "dummy_service.py"
    spec = importlib.util.spec_from_file_location("dummy_service", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dummy_service"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _clean_environment(no_settings: None) -> None:
    pass
