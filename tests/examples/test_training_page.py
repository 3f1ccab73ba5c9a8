"""The commands of docs/training.md, one after another, on a small slice of data."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import gin
import pytest
from typer.testing import CliRunner

from rectokens.catalog.artifact import load_catalog
from rectokens.cli.app import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"

# What makes a shipped configuration small; the paths in it stay as they are.
SMALL = {
    "train_rqkmeans_beauty.gin": "train.codebook_size = 8\ntrain.num_epochs = 5\n",
    "precompute_sequences_beauty.gin": (
        "main.codebook_size = 8\nmain.model_name = 'chat_model'\nmain.max_length = None\n"
    ),
    "baselines_beauty.gin": "",
}
WITHOUT_CONFIG = ("sequence_length_stats",)


def page_commands():
    """Commands of the page that are tried here: module and arguments."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for words in map(shlex.split, lines):
        if words[:2] == ["python", "-m"] and words[2].startswith("examples."):
            config = Path(words[-1]).name
            if config in SMALL or words[2].endswith(WITHOUT_CONFIG):
                yield words[2], words[3:]
        elif words[:3] == ["python", "-m", "rectokens"]:
            yield "rectokens", words[3:]


@pytest.fixture
def checkout(tmp_path, monkeypatch, data_folder_writer, chat_model):
    """A folder where the page's relative paths mean a small data set."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "examples" / "configs", folder / "examples" / "configs")
    for path in folder.rglob("*.gin"):
        if path.name in SMALL:
            path.write_text(f"{path.read_text()}\n{SMALL[path.name]}")
    data_folder_writer(folder / "data" / "amazon" / "amazon-beauty")
    shutil.copytree(chat_model, folder / "chat_model")
    monkeypatch.chdir(folder)
    return folder


def run_as_program(module, arguments, monkeypatch):
    """As ``python -m`` would, but in this process: libraries are loaded once only."""
    registry = gin.config._REGISTRY
    hidden = {
        name: entry
        for name, entry in list(registry.items())
        if name.rsplit(".", 1)[-1] in ("train", "main")
    }
    for name in hidden:
        registry.pop(name)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        for name, _ in list(registry.items()):
            if name.rsplit(".", 1)[-1] in ("train", "main"):
                registry.pop(name)
        for name, entry in hidden.items():
            registry[name] = entry


def test_every_command_does_what_the_page_says(checkout, monkeypatch, capsys):
    commands = list(page_commands())
    tried = {Path(words[-1]).name for _, words in commands} | {
        m.split(".")[-1] for m, _ in commands
    }
    assert {*SMALL, *WITHOUT_CONFIG} <= tried
    for module, arguments in commands:
        if module == "rectokens":
            versions = [version_below(argument) for argument in arguments]
            result = CliRunner().invoke(app, versions)
            assert result.exit_code == 0, result.output
        else:
            run_as_program(module, arguments, monkeypatch)
    printed = capsys.readouterr().out
    assert "skip Markov" in printed
    assert "beauty/beauty_test.pt" in printed
    out = checkout / "out"
    for name in (
        "rqkmeans/beauty/final.pt",
        "rqkmeans/beauty/epoch_5.pt",
        "precomputed/beauty/beauty_train.pt",
        "precomputed/beauty/beauty_test_item.pt",
        "evaluation/baselines_beauty.json",
    ):
        assert (out / name).is_file(), name
    (catalog,) = (out / "catalogs").iterdir()
    loaded = load_catalog(catalog)
    assert loaded.num_items == 40
    assert loaded.metadata.columns == ["title", "brand", "category"]
    assert loaded.prior is not None


def version_below(argument):
    """The argument with the one version that its folder has in place of VERSION."""
    if not argument.endswith("/VERSION"):
        return argument
    (version,) = Path(argument).parent.iterdir()
    return str(version)
