"""The audit of dependencies: what fails it, and that silence is not taken for soundness."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[1] / ".ci" / "audit.py"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("audit", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WEAK = {"name": "x", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
SOUND = {"name": "y", "version": "1", "vulns": []}
UNKNOWN = {"name": "rectokens", "skip_reason": "not on PyPI"}


class Database:
    """Stands for pip-audit, which needs a network."""

    def __init__(self, installed, known_to=("osv",)):
        self.installed, self.known_to, self.asked = installed, known_to, []

    def __call__(self, arguments):
        self.asked.append(list(arguments))
        if "--requirement" in arguments:
            requirement = Path(arguments[arguments.index("--requirement") + 1]).read_text()
            assert requirement == "jinja2==2.4.1\n"
            return [WEAK] if self.known_to and self.known_to[0] in arguments else [SOUND]
        return self.installed


def test_a_known_weakness_fails_it(module, capsys):
    database = Database([WEAK, SOUND, UNKNOWN])
    assert module.audit(["--ignore-vuln", "CVE-2"], database) == 1
    assert database.asked[-1] == [
        *("--local", "--vulnerability-service", "osv", "--ignore-vuln", "CVE-2")
    ]
    out = capsys.readouterr().out
    assert "x 1: CVE-1, fixed in 2" in out
    assert "2 packages audited with osv, 1 known weaknesses; not in its index: rectokens" in out


def test_sound_packages_pass(module, capsys):
    assert module.audit([], Database([SOUND, UNKNOWN], known_to=("pypi",))) == 0
    assert "1 packages audited with pypi, 0 known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("installed", "known_to"), [([SOUND], ()), ([UNKNOWN], ("pypi",)), ([], ("pypi",))]
)
def test_a_database_that_knows_nothing_is_no_audit(module, capsys, installed, known_to):
    assert module.audit([], Database(installed, known_to)) == 0
    assert "nothing was audited" in (out := capsys.readouterr().out) or "audit skipped" in out
    assert module.audit(["--required"], Database(installed, known_to)) == 2


def test_what_pip_audit_cannot_do_is_nothing(module):
    assert module.pip_audit(["--requirement", "/nowhere/requirements.txt"]) == []
