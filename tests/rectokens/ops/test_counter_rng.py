import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.ops.counter_rng import gumbel, hash64, uniform

MASK = (1 << 64) - 1
GOLDEN = [
    [0.3869742762400409, 0.6424233675512127, 0.5374574622419249],
    [0.577125795355946, 0.10584086659863756, 0.06032861457550276],
]


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference(seed, *counters):
    """The documented formula in Python's unbounded integers."""
    state = mix((seed + 0x9E3779B97F4A7C15) & MASK)
    for counter in counters:
        state = mix(((state ^ (counter & MASK)) + 0x9E3779B97F4A7C15) & MASK)
    return state


int64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=200, deadline=None)
@given(int64, st.lists(int64, max_size=3))
def test_equals_the_formula_in_plain_integers(seed, counters):
    tensors = [torch.tensor(c) for c in counters]
    expected = reference(seed, *counters)
    assert int(hash64(seed, *tensors)) & MASK == expected
    assert int(hash64(torch.tensor(seed), *tensors)) & MASK == expected
    assert float(uniform(seed, *tensors)) == ((expected >> 12) + 0.5) / 2**52


def test_the_first_output_is_splitmix64s():
    # Published test vector: SplitMix64 from state 0 starts with this number.
    assert int(hash64(0)) & MASK == 0xE220A8397B1DCDAF


def test_golden_values():
    values = uniform(42, torch.arange(2).unsqueeze(1), torch.tensor([0, 7, 149_999]))
    assert values.tolist() == GOLDEN


def test_broadcasts_and_is_float64_on_any_integer_dtype():
    rows = torch.arange(4, dtype=torch.int32).unsqueeze(1)
    columns = torch.arange(5)
    values = uniform(1, rows, columns)
    assert values.shape == (4, 5)
    assert values.dtype == torch.float64
    assert torch.equal(values[2], uniform(1, torch.tensor(2), columns))
    seeds = torch.tensor([1, 2])
    assert torch.equal(uniform(seeds, columns[:2])[0], uniform(1, columns[0]))
    assert uniform(1, torch.arange(0)).shape == (0,)


def test_any_python_integer_is_a_seed():
    c = torch.arange(3)
    assert torch.equal(uniform(2**64 + 5, c), uniform(5, c))
    assert torch.equal(uniform(2**64 - 1, c), uniform(-1, c))
    assert not torch.equal(uniform(2**63, c), uniform(0, c))


def test_order_and_number_of_counters_matter():
    a, b = torch.tensor(3), torch.tensor(8)
    values = [uniform(0, a, b), uniform(0, b, a), uniform(0, a), uniform(3, b), uniform(0)]
    assert len({float(v) for v in values}) == len(values)


def test_open_interval_at_the_extremes():
    for bits in (0, MASK):
        value = ((bits >> 12) + 0.5) / 2**52
        assert 0.0 < value < 1.0
    assert math.isfinite(
        float(-torch.log(-torch.log1p(-torch.tensor(2.0**-53, dtype=torch.double))))
    )


def test_looks_uniform_and_uncorrelated():
    values = uniform(7, torch.arange(300).unsqueeze(1), torch.arange(300))
    n = values.numel()
    assert abs(float(values.mean()) - 0.5) < 5 * (1 / 12) ** 0.5 / n**0.5
    counts = torch.histc(values, 64, 0.0, 1.0)
    chi_square = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert 20 < chi_square < 130  # 63 degrees of freedom
    flat = values - 0.5
    for other in (flat.roll(1, 1), flat.roll(1, 0)):
        assert abs(float((flat * other).mean()) * 12) < 5 / n**0.5
    assert values.unique().numel() == n


def test_gumbel_distribution():
    values = gumbel(3, torch.arange(100_000))
    assert torch.isfinite(values).all()
    assert abs(float(values.mean()) - 0.5772) < 0.02
    assert abs(float(values.std()) - math.pi / 6**0.5) < 0.02
    assert abs(float((values < 0).double().mean()) - math.exp(-1)) < 0.01


def test_refuses_what_is_not_an_integer():
    with pytest.raises(TypeError, match="float32"):
        uniform(0, torch.rand(2))
    with pytest.raises(TypeError, match="float32"):
        uniform(torch.rand(()), torch.arange(2))


def test_compiles_to_the_same_numbers():
    compiled = torch.compile(uniform, backend="aot_eager", fullgraph=True)
    c = torch.arange(10)
    assert torch.equal(compiled(torch.tensor(5), c), uniform(5, c))
