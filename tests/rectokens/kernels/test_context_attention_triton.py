"""The context attention kernels, interpreted on the CPU, agree with the definition."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("context_attention_interpreted.py")


@pytest.mark.parametrize(("prefix", "count"), [("prompt", 30), ("beams", 60)])
def test_equal_to_the_definition(results, prefix, count):
    found = {name: right for name, right in results.items() if name.startswith(prefix)}
    assert len(found) == count
    assert all(found.values()), found
