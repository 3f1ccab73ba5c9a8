"""What a training from scratch leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from examples.evaluation.ranks import figures, held_out_searches
from examples.scratch.build import FIGURES, STORE, train_release
from examples.scratch.settings import CodesSettings, OptimizerSettings, ValidationSettings
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release import load_release as load_release_manifest
from server.demo.data import leave_one_out
from server.release import load_release
from server.settings import Settings


def test_the_release_is_served_as_it_is_and_ranks_as_measured(trained, data):
    folder, path = trained
    release = load_release(Settings(release=path, device="cpu"))
    test = leave_one_out(data.sequences).test
    told = json.loads((folder / FIGURES).read_text())["test"]
    for title, excluded in (("history left out", True), ("all items ranked", False)):
        questions = held_out_searches(
            release.catalog,
            release.prompts,
            data.item_ids,
            test,
            exclude_history=excluded,
            beam_width=20,
        )
        found = figures(questions.ranks(release.engine, release.trie, batch_size=7))
        assert found == told[title]
    # A ring is easy: far better than one of forty in ten draws.
    assert told["history left out"]["recall@10"] > 0.5


def test_it_is_the_active_release_of_its_store(trained):
    folder, release = trained
    active = open_release_store(folder / STORE).active()
    assert active is not None
    assert active.release == release.name


def test_the_card_names_data_parameters_metrics_and_commit(trained, recipe):
    _, release = trained
    card = (load_release_manifest(release).model_path / "README.md").read_text()
    for said in ("ring", "| items | 40 |", "recall@10", "ndcg@20", "optimizer.epochs | 6"):
        assert said in card
    assert "| commit | " in card
    assert "| users left out (fewer than three items) | 2 |" in card


def test_patience_ends_a_run_early_and_keeps_the_best(data, recipe, options, tmp_path):
    hasty = replace(
        recipe,
        optimizer=replace(recipe.optimizer, epochs=200),
        validation=replace(recipe.validation, every_epochs=1, patience=1),
    )
    train_release(data, tmp_path, hasty, replace(options, evaluate_test=False))
    told = json.loads((tmp_path / FIGURES).read_text())
    assert told["training"]["stopped early"] is True
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    recalls = [(int(s), float(v)) for s, name, v in rows if name == "eval_recall@10"]
    best = max(value for _, value in recalls)
    assert told["validation"]["recall@10"] == pytest.approx(best, rel=1e-5)
    assert told["training"]["best step"] == next(s for s, value in recalls if value == best)
    assert len(recalls) < 200


def test_the_clock_ends_a_run(data, recipe, options, tmp_path):
    timed = replace(recipe, optimizer=replace(recipe.optimizer, epochs=10_000, max_seconds=0.5))
    train_release(data, tmp_path, timed, replace(options, evaluate_test=False))
    told = json.loads((tmp_path / FIGURES).read_text())
    assert told["validation"]["recall@10"] >= 0
    assert told["training"]["seconds of training"] < 60


def test_a_loss_that_is_not_finite_ends_it(data, recipe, options, tmp_path):
    wild = replace(recipe, optimizer=OptimizerSettings(peak_lr=1e30, clip_norm=1e30, epochs=3))
    with pytest.raises(FloatingPointError, match="lower peak_lr"):
        train_release(data, tmp_path, wild, options)


def test_data_without_training_parts_is_refused(data, recipe, options, tmp_path):
    with pytest.raises(ValueError, match="none of the 2 users has three items"):
        train_release(replace(data, sequences=((1, 2), (3,))), tmp_path, recipe, options)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"num_levels": 3}, "has 2 levels of 8 codes; the settings say 3 of 8"),
        ({"behaviour_weight": 0.5, "behaviour_dims": 4}, "takes vectors of 3 dimensions; the"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    trained, data, recipe, options, tmp_path, codes, message
):
    folder, _ = trained
    (tokenizer,) = (folder / STORE / "tokenizers").iterdir()
    chosen = CodesSettings(
        **{"num_levels": 2, "codebook_size": 8, "item_tok_path": str(tokenizer), **codes}
    )
    with pytest.raises(ValueError, match=message):
        train_release(data, tmp_path, replace(recipe, codes=chosen), options)


def test_a_tokenizer_of_before_is_used(trained, data, recipe, options, tmp_path):
    folder, release = trained
    (tokenizer,) = (folder / STORE / "tokenizers").iterdir()
    codes = replace(recipe.codes, item_tok_path=str(tokenizer))
    short = replace(
        recipe,
        codes=codes,
        validation=ValidationSettings(users=5, beam_width=20, every_epochs=9),
        optimizer=replace(recipe.optimizer, epochs=1),
    )
    mine = train_release(data, tmp_path, short, replace(options, evaluate_test=False))
    expected = load_release_manifest(release).catalog_path.name
    assert load_release_manifest(mine).catalog_path.name == expected


def test_behaviour_vectors_stand_beside_the_text(data, recipe, options, tmp_path):
    codes = replace(recipe.codes, behaviour_weight=1.0, behaviour_dims=4)
    short = replace(recipe, codes=codes, optimizer=replace(recipe.optimizer, epochs=1))
    release = train_release(data, tmp_path, short, replace(options, evaluate_test=False))
    assert load_release(Settings(release=release, device="cpu")).catalog.num_items == 40
    assert torch.get_num_threads() == 1
