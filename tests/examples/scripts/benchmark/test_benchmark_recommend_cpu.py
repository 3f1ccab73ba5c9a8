"""The benchmark compares before it times: equal answers pass, and differences are found."""

from __future__ import annotations

import pytest

from examples.scripts.benchmark import benchmark_recommend_cpu as benchmark
from server.demo.build import build_release
from server.demo.recipe import DemoRecipe, ModelSize
from server.demo.samples import Augmentation
from server.demo.synthetic import SyntheticShape, generate
from server.demo.training import TrainSettings


@pytest.fixture(scope="module")
def data():
    return generate(0, SyntheticShape(items_per_style=2, num_users=60, dim=16))


@pytest.fixture(scope="module")
def release(tmp_path_factory, data):
    recipe = DemoRecipe(
        codebook_size=8,
        text_vocab_size=300,
        max_history_items=8,
        model=ModelSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32),
        augmentation=Augmentation(max_items=9),
        train=TrainSettings(epochs=1, batch_tokens=512),
    )
    return build_release(data, tmp_path_factory.mktemp("store"), recipe)


def test_engine_and_generate_agree_on_a_demo_model(release, data, monkeypatch):
    monkeypatch.setattr(benchmark, "load_data", lambda folder: data)
    case = benchmark.load_case(release, None, batch=3, beam_width=12, seed=0, min_items=4)
    assert len({len(prompt) for prompt in case.prompts}) > 1
    searches = [benchmark.engine_search(case), benchmark.generate_search(case)]
    ours, theirs = (search() for search in searches)
    assert [len(items) for items, _ in ours] == [12, 12, 12]
    assert benchmark.differences(ours, theirs) == []
    seconds = benchmark.time_in_turn(searches, 2)
    assert [len(taken) for taken in seconds] == [2, 2]
    benchmark.report(case, 1, ["engine", "HF generate"], seconds)


def test_other_items_scores_and_lengths_are_differences():
    right = [(["a", "b", "c"], [-1.0, -2.0, -3.0])]
    assert benchmark.differences(right, right) == []
    other_item = [(["a", "x", "c"], [-1.0, -2.0, -3.0])]
    assert benchmark.differences(other_item, right) == ["request 0: only generate has b (-2.0000)"]
    other_score = [(["a", "b", "c"], [-1.0, -2.1, -3.0])]
    assert len(benchmark.differences(other_score, right)) == 2
    fewer = [(["a", "b"], [-1.0, -2.0])]
    assert benchmark.differences(fewer, right) == ["request 0: 2 items and 3"]
    # A tie at the cut may be decided either way, and ties may change places.
    tied = [(["b", "a", "d"], [-1.0, -1.00005, -3.0])]
    assert benchmark.differences(tied, [(["a", "b", "c"], [-1.0, -1.00005, -3.0])]) == []


def test_data_of_another_catalog_is_refused(release, data, monkeypatch):
    other = generate(0, SyntheticShape(items_per_style=3, num_users=60, dim=16))
    monkeypatch.setattr(benchmark, "load_data", lambda folder: other)
    with pytest.raises(ValueError, match="250 of 750 items of generated are not in the catalog"):
        benchmark.load_case(release, None, batch=3, beam_width=12, seed=0, min_items=4)
