"""The gin files that come with the project name only what exists."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from gin import config_parser
from gin.config import ParserDelegate

import examples.utils

CONFIGS = Path(examples.utils.__file__).parent / "configs"
SCRIPTS = {
    "train_rqkmeans": ("examples.scripts.training.train_rqkmeans", "train"),
    "train_rqvae": ("examples.scripts.training.train_rqvae", "train"),
    "precompute_sequences": ("examples.scripts.preprocessing.precompute_sequences", "main"),
    "baselines": ("examples.scripts.eval.baselines", "main"),
}
FILES = [
    (path, name)
    for path in sorted(CONFIGS.rglob("*.gin"))
    for name in SCRIPTS
    if path.stem.startswith(name)
]


def bindings(path):
    parser = config_parser.ConfigParser(path.read_text(), ParserDelegate())
    return [(one.selector, one.arg_name, one.value) for one in parser]


@pytest.mark.parametrize(("path", "name"), FILES, ids=[path.stem for path, _ in FILES])
def test_a_file_binds_parameters_of_its_script(path, name):
    module, entry = SCRIPTS[name]
    function = getattr(importlib.import_module(module), entry)
    parameters = inspect.signature(function).parameters
    found = bindings(path)
    assert found
    for selector, parameter, _ in found:
        assert selector == entry
        assert parameter in parameters
    # What has no default must be there, or the command of the docs would not run.
    bound = {parameter for _, parameter, _ in found}
    for parameter, one in parameters.items():
        assert "REQUIRED" not in repr(one.default) or parameter in bound


def test_the_documented_files_are_there():
    stems = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path, _ in FILES}
    assert {
        "pretraining/train_rqvae_beauty",
        "pretraining/train_rqvae_sports",
        "pretraining/train_rqkmeans_beauty",
        "pretraining/train_rqkmeans_sports",
        "preprocessing/precompute_sequences_beauty",
    } <= stems
