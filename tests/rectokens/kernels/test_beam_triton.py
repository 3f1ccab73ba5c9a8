"""The beam-step kernels, interpreted on the CPU, give what the definition gives."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("beam_interpreted.py")


def test_equal_to_the_definition(results):
    assert len(results) >= 8
    assert {name: result for name, result in results.items() if result != "ok"} == {}
