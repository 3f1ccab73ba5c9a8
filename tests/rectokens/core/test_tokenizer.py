import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rectokens.core.tokenizer import Tokenizer, TokenSequence


def test_batch_properties():
    tokens = TokenSequence(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert tokens.num_levels == 3
    assert tokens.batch_size == 2
    assert tokens.to_tuple_ids() == [(1, 2, 3), (4, 5, 6)]


def test_single_item_properties():
    tokens = TokenSequence(torch.tensor([7, 8]))
    assert tokens.num_levels == 2
    assert tokens.batch_size is None
    assert tokens.to_tuple_ids() == [(7, 8)]
    assert tokens.to_flat_ids(10).shape == ()
    assert int(tokens.to_flat_ids(10)) == 78


def test_flat_ids_have_level_zero_most_significant():
    tokens = TokenSequence(torch.tensor([[1, 2, 3], [0, 0, 4]]))
    flat = tokens.to_flat_ids(10)
    assert flat.dtype == torch.long
    assert flat.tolist() == [123, 4]


def test_flat_ids_default_base_is_largest_code_plus_one():
    assert TokenSequence(torch.tensor([[1, 2], [0, 1]])).to_flat_ids().tolist() == [5, 1]


@given(data=st.data(), base=st.integers(1, 300), levels=st.integers(1, 6))
def test_flat_ids_are_digits_in_the_base(data, base, levels):
    rows = data.draw(
        st.lists(
            st.lists(st.integers(0, base - 1), min_size=levels, max_size=levels),
            min_size=1,
            max_size=5,
        )
    )
    expected = [
        sum(digit * base ** (levels - 1 - place) for place, digit in enumerate(row)) for row in rows
    ]
    assert TokenSequence(torch.tensor(rows)).to_flat_ids(base).tolist() == expected


def test_flat_ids_use_all_63_bits_and_refuse_more():
    last = TokenSequence(torch.full((1, 9), 127))
    assert last.to_flat_ids(128).tolist() == [2**63 - 1]
    with pytest.raises(ValueError, match="10 levels in base 128"):
        TokenSequence(torch.zeros(1, 10, dtype=torch.long)).to_flat_ids(128)


@pytest.mark.parametrize("codes", [[[0, 4]], [[-1, 0]]])
def test_flat_ids_refuse_codes_outside_the_base(codes):
    with pytest.raises(ValueError, match="allowed are 0 to 3"):
        TokenSequence(torch.tensor(codes)).to_flat_ids(4)


def test_empty_batch():
    tokens = TokenSequence(torch.empty(0, 3, dtype=torch.long))
    assert tokens.batch_size == 0
    assert tokens.to_tuple_ids() == []
    assert tokens.to_flat_ids().shape == (0,)


def test_equality_compares_codes():
    tokens = TokenSequence(torch.tensor([[1, 2]]))
    assert tokens == TokenSequence(torch.tensor([[1, 2]]))
    assert tokens != TokenSequence(torch.tensor([[1, 3]]))
    assert tokens != "tokens"


def test_wrong_codes_are_refused():
    with pytest.raises(ValueError, match="expected \\(B, L\\) or \\(L,\\)"):
        TokenSequence(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(TypeError, match="float32"):
        TokenSequence(torch.zeros(2, 2))


def test_tokenizer_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Tokenizer()
