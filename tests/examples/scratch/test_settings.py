"""Values out of range are named with what is allowed."""

from __future__ import annotations

import pytest

from examples.scratch import settings


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("CodesSettings", {"num_levels": 0}, "num_levels is 0; it must be at least 1"),
        ("CodesSettings", {"behaviour_weight": -1}, "behaviour_weight is -1; it must be at least"),
        ("ModelSettings", {"hidden_size": 30}, "hidden_size is 30; it must be a multiple of"),
        ("DropoutSettings", {"item": 1.0}, r"item is 1\.0; allowed are 0 to below 1"),
        ("AugmentationSettings", {"crop": 1.5}, r"crop is 1\.5; allowed are 0 to 1"),
        ("AugmentationSettings", {"shuffle_span": -1}, "shuffle_span is -1; it must be at least 0"),
        ("TeacherSettings", {"decay": 2}, "decay is 2; allowed are above 0 to 1"),
        ("TeacherSettings", {"trunk_weight": 0}, "both 0; there is nothing to learn"),
        ("TeacherSettings", {"reach": 0}, "reach is 0; it must be at least 1"),
        ("OptimizerSettings", {"peak_lr": 0}, "peak_lr is 0; it must be above 0"),
        ("OptimizerSettings", {"max_seconds": 0}, "max_seconds is 0; it must be above 0"),
        ("OptimizerSettings", {"softmax": "all"}, "softmax is 'all'; allowed are children, level"),
        ("OptimizerSettings", {"ema": 1}, "ema is 1; allowed are 0 to below 1"),
        ("ValidationSettings", {"beam_width": 10}, "beam_width is 10; it must be at least 20"),
        ("ValidationSettings", {"users": 0}, "users is 0; it must be at least 1"),
    ],
)
def test_out_of_range(kind, values, message):
    with pytest.raises(ValueError, match=message):
        getattr(settings, kind)(**values)
