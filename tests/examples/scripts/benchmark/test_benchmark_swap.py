from __future__ import annotations

from examples.scripts.benchmark.benchmark_swap import Sample, make_store, split
from examples.scripts.benchmark.http_load import percentile
from rectokens.artifacts.open_store import open_release_store


def test_requests_that_met_a_swap_are_told_from_the_others():
    swaps = [(10.0, 12.0), (20.0, 21.0)]
    samples = [
        Sample(9.0, 9.9, 200),  # over before
        Sample(9.9, 10.1, 200),  # on its way when it began
        Sample(11.0, 11.5, 200),
        Sample(11.9, 25.0, 200),  # waited through both
        Sample(12.1, 12.3, 503),
    ]
    apart, met = split(samples, swaps)
    assert [round(ms) for ms in apart] == [900, 200]
    assert [round(ms) for ms in met] == [200, 500, 13_100]


def test_percentiles():
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 0.5) == 51
    assert percentile(values, 0.99) == 100
    assert percentile([3.0], 0.99) == 3
    assert str(percentile([], 0.5)) == "nan"


def test_its_store_holds_two_releases_of_one_model_or_of_two(tmp_path):
    for two_models in (False, True):
        root = tmp_path / str(two_models)
        first, second = make_store(root, 50, hidden=64, layers=1, two_models=two_models)
        store = open_release_store(root)
        assert store.active().release == first
        models = {store.open_release(one).model_version for one in (first, second)}
        assert len(models) == 1 + two_models
