"""Figures of a release through the library and through a server that serves it."""

from __future__ import annotations

import json

import pytest

from examples.evaluation.ranks import figures
from examples.scripts.eval.eval_retrieval import main
from examples.scripts.training.train_scratch import train
from examples.utils import load_config
from server.demo.running import serving

TRAINING = """
train.root = {root!r}
train.output_dir = {out!r}
train.progress_bar = False
train.device = "cpu"
train.evaluate_test = False
CodesSettings.num_levels = 2
CodesSettings.codebook_size = 4
ModelSettings.hidden_size = 16
ModelSettings.num_layers = 1
ModelSettings.num_heads = 2
ModelSettings.max_items = 5
OptimizerSettings.epochs = 4
OptimizerSettings.batch_size = 16
ValidationSettings.beam_width = 20
ValidationSettings.every_epochs = 4
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_folder_writer):
    root = tmp_path_factory.mktemp("world")
    data_folder_writer(root / "amazon-beauty")
    config = root / "small.gin"
    config.write_text(TRAINING.format(root=str(root), out=str(root / "out")))
    load_config(config)
    return root, train()


def test_library_and_server_agree_exactly(world, tmp_path):
    """Four codes on two levels for forty items: nearly every leaf is shared."""
    root, release = world
    output = tmp_path / "figures.json"
    with serving(release) as base_url:
        asked = {"base_url": base_url, "root": str(root)}
        found = main(release=str(release), **asked, num_examples=None, output=str(output))
        alone = main(**asked, num_examples=7)
    assert found["users"] == 28
    assert found["different_ranks"] == 0
    assert found["library"] == found["server"]
    kept, all_items = found["library"].values()
    # Of 40 items those of a history may be left out, and the first 20 of the rest are looked at.
    assert 0 < all_items["recall@20"] <= kept["recall@20"] < 1
    assert json.loads(output.read_text()) == found
    assert alone["users"] == 7
    assert "library" not in alone


def test_figures_by_hand():
    found = figures([1, 3, None, 11, 20, 21])
    assert found["recall@1"] == pytest.approx(1 / 6)
    assert found["recall@5"] == found["recall@10"] == pytest.approx(2 / 6)
    assert found["recall@20"] == pytest.approx(4 / 6)
    assert found["ndcg@5"] == pytest.approx((1 + 1 / 2) / 6)
    assert found["ndcg@20"] == pytest.approx((1 + 1 / 2 + 0.2789429 + 0.2276702) / 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give model_dir, item_tok_path, precomputed_test_path to ask a model, or release"),
        ({"release": "x", "beam_size": 10}, "beam_size is 10; of a release it must be at least 20"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        main(**options)


def test_a_release_of_other_items_is_refused(world, tmp_path, data_folder_writer):
    _, release = world
    data_folder_writer(tmp_path / "amazon-beauty", num_items=60)
    with pytest.raises(ValueError, match="the catalog has no item 'B041', which the data names"):
        main(release=str(release), root=str(tmp_path))
