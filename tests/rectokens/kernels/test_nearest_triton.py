"""The nearest-codeword kernel, interpreted on the CPU, agrees with float64 and lowest indices."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("nearest_interpreted.py")


@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        ("single", 18),
        ("parts", 21),
        ("ties", 2),
        ("scale", 2),
        ("not finite", 1),
        ("residual", 3),
        ("tf32", 1),
    ],
)
def test_equal_to_the_definition(results, prefix, count):
    found = {name: right for name, right in results.items() if name.startswith(prefix)}
    assert len(found) == count
    assert all(found.values()), found
