from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.settings import setting_fields
from tests.waiting import LIMIT_S

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if not k.startswith("RECTOKENS_")}
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**base, "COLUMNS": "200", **environment},
        timeout=LIMIT_S,
        check=False,
    )


def test_help_lists_every_setting_and_imports_no_torch():
    # Python lists imports on stderr.
    result = run("serve", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    for field in setting_fields():
        assert field.flag in result.stdout
    assert "import time" in result.stderr
    assert "| torch" not in result.stderr.replace("  ", "")


@pytest.mark.parametrize(
    ("arguments", "environment", "parts"),
    [
        (["serve"], {}, ["nothing to serve", "--model", "--catalog", "--release"]),
        (["serve", "--model", "m"], {}, ["--catalog"]),
        (["serve", "--prot", "1"], {}, ["--prot", "--port"]),
        (["serve", "--port", "high"], {}, ["--port", "'high'"]),
        (["serve"], {"RECTOKENS_PROT": "1"}, ["RECTOKENS_PROT", "RECTOKENS_PORT"]),
        (["serve"], {"RECTOKENS_PORT": ""}, ["RECTOKENS_PORT", "''"]),
        (
            ["serve", "--store.path", "{tmp}", "--access.keys-file", "{tmp}/none", "--port", "0"],
            {},
            ["RECTOKENS_ACCESS__KEYS_FILE", "No such file"],
        ),
        (
            ["serve", "--store.path", "{tmp}", "--port", "0"],
            {"RECTOKENS_ADMIN__KEYS_FILE": __file__},
            ["RECTOKENS_ADMIN__KEYS_FILE", "line 1"],
        ),
        (
            ["serve", "--store.path", "s", "--access.requests-per-minute", "5"],
            {},
            ["RECTOKENS_ACCESS__REQUESTS_PER_MINUTE", "set RECTOKENS_ACCESS__KEYS_FILE"],
        ),
        (["demo", "--model", "m"], {}, ["demo serves what it builds", "--model"]),
        (["demo", "--port", "high"], {}, ["--port", "'high'"]),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_message(arguments, environment, parts, tmp_path):
    result = run(*(one.format(tmp=tmp_path) for one in arguments), **environment)
    assert result.returncode == 2
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_settings_doc_prints_the_page():
    result = run("settings-doc")
    assert result.returncode == 0
    assert result.stdout == (ROOT / "docs" / "settings.md").read_text()


def test_a_demo_without_its_data_ends_with_1_and_one_message(tmp_path):
    result = run("demo", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
