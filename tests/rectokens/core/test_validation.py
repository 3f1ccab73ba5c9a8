import pytest
import torch

from rectokens.core.validation import check_at_least_one, checked_codes, checked_vectors


def test_vectors_are_cast_and_returned():
    rows = checked_vectors(torch.ones(2, 3, dtype=torch.float16), 3, name="batch")
    assert rows.dtype == torch.float32
    assert checked_vectors(torch.ones(3, dtype=torch.int8), 3, name="x", single=True).shape == (3,)


@pytest.mark.parametrize(
    ("shape", "single"), [((2, 4), False), ((3,), False), ((1, 2, 3), True), ((4,), True)]
)
def test_wrong_shapes_name_found_and_expected(shape, single):
    with pytest.raises(ValueError) as error:
        checked_vectors(torch.zeros(shape), 3, name="features", single=single)
    assert f"features has shape {shape}" in str(error.value)
    assert "(B, 3)" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_values_that_are_not_finite_in_float32_name_the_row(value):
    rows = torch.zeros(5, 3, dtype=torch.float64)
    rows[3, 1] = rows[4, 0] = value
    with pytest.raises(ValueError, match="in 2 of 5 rows, first in row 3"):
        checked_vectors(rows, 3, name="features")


def test_wrong_types():
    with pytest.raises(TypeError, match="list"):
        checked_vectors([[1.0]], 1, name="features")
    with pytest.raises(TypeError, match="complex64"):
        checked_vectors(torch.zeros(1, 1, dtype=torch.complex64), 1, name="features")


def test_codes():
    assert checked_codes(torch.tensor([0, 3], dtype=torch.int32), 2, 4).dtype == torch.long
    with pytest.raises(ValueError, match="expected \\(B, 2\\) or \\(2,\\)"):
        checked_codes(torch.zeros(1, 3, dtype=torch.long), 2, 4)
    for bad in (4, -1):
        with pytest.raises(ValueError, match="allowed are 0 to 3"):
            checked_codes(torch.tensor([[0, bad]]), 2, 4)


def test_at_least_one():
    check_at_least_one(size=1)
    with pytest.raises(ValueError, match="dim is 0"):
        check_at_least_one(size=1, dim=0)
