"""The constrained kernels, interpreted on the CPU, give what the references give."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("constrained_interpreted.py")


@pytest.mark.parametrize(
    ("prefix", "at_least"),
    [
        ("noise", 4),
        ("transition", 15),
        ("linear/gather and shared", 15),
        ("linear/product", 15),
        ("linear/chosen", 15),
        ("topk/gather and shared", 5),
        ("topk/product", 5),
        ("topk/parts", 5),
        ("sampling/gather and shared", 5),
        ("sampling/product", 5),
        ("sampling/parts", 5),
        ("special/topk", 24),
        ("special/sampling", 24),
        ("registered", 14),
    ],
)
def test_equal_to_the_reference(results, prefix, at_least):
    found = {name: result for name, result in results.items() if name.startswith(prefix)}
    assert len(found) >= at_least
    assert {name: result for name, result in found.items() if result != "ok"} == {}


def test_no_result_is_left_unlooked_at(results):
    assert set(results.values()) == {"ok"}
