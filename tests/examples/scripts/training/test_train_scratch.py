"""The script, its gin parameters, and the files of configurations that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.scripts.training.train_scratch import train
from examples.utils import ConfigError, load_config
from rectokens.artifacts.release import load_release

CONFIGS = Path(__file__).parents[4] / "examples" / "configs" / "finetuning"

SMALL = """
train.root = {root!r}
train.output_dir = {out!r}
train.progress_bar = False
train.device = "cpu"
CodesSettings.num_levels = 2
CodesSettings.codebook_size = 8
ModelSettings.hidden_size = 16
ModelSettings.num_layers = 1
ModelSettings.num_heads = 2
OptimizerSettings.epochs = 2
OptimizerSettings.batch_size = 16
ValidationSettings.beam_width = 20
ValidationSettings.every_epochs = 2
"""


@pytest.fixture
def config(tmp_path, data_root):
    path = tmp_path / "small.gin"
    path.write_text(SMALL.format(root=str(data_root), out=str(tmp_path / "out")))
    return path


def test_the_script_ends_in_a_release(config, capsys):
    load_config(config)
    release = train()
    assert load_release(release).catalog_path.is_dir()
    said = capsys.readouterr().err
    assert "28 users (2 with fewer than three items left out), 40 items" in said
    assert "all 28 test users, history left out: recall@1" in said
    assert "all 28 test users, all items ranked: recall@1" in said


def test_a_parameter_that_does_not_exist_is_named_with_near_misses(config):
    config.write_text(config.read_text() + "OptimizerSettings.peak_lrr = 1\n")
    with pytest.raises(ConfigError, match=r"peak_lrr.*did you mean 'peak_lr'"):
        load_config(config)


def test_a_value_out_of_range_is_refused(config):
    config.write_text(config.read_text() + "DropoutSettings.layer = 2.0\n")
    load_config(config)
    with pytest.raises(ValueError, match=r"layer is 2\.0"):
        train()


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("scratch_*.gin")))
def test_shipped_configurations_are_sound(name):
    from examples.scripts.training import train_scratch

    load_config(CONFIGS / name)
    for kind in train_scratch._SETTINGS.values():
        train_scratch.gin.get_configurable(kind.__name__)()
