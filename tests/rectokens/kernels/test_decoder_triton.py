"""The decoder and head kernels, interpreted on the CPU, agree with the definition."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("decoder_interpreted.py")


@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        ("norm", 32),
        ("rotate", 18),
        ("store", 2),
        ("gate", 6),
        ("product", 18),
        ("fp8", 10),
        ("logsumexp", 16),
    ],
)
def test_equal_to_the_definition(results, prefix, count):
    found = {name: right for name, right in results.items() if name.startswith(prefix)}
    assert len(found) == count
    assert all(found.values()), found
