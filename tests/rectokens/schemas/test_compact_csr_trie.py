import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.core.tokenizer import TokenSequence
from rectokens.decoding.trie import Trie
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

EXAMPLE = [(0, 2), (0, 3), (4, 1)]


def pointer_trie(items):
    trie = Trie()
    for item in items:
        trie.insert(item)
    return trie


def assert_equal_tries(left, right):
    for name in ("row_ptrs", "stacked_cols_vals", "dense_states"):
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype == torch.long
        assert torch.equal(a, b), name
    assert left.layer_max_branches == right.layer_max_branches
    assert len(left.dense_mask_by_layer) == len(right.dense_mask_by_layer)
    for a, b in zip(left.dense_mask_by_layer, right.dense_mask_by_layer, strict=True):
        assert a.dtype == b.dtype == torch.bool
        assert torch.equal(a, b)
    assert left.vocab_size == right.vocab_size


@pytest.mark.parametrize("builder", ["from_trie", "from_sorted_batch"])
def test_worked_example(builder):
    if builder == "from_trie":
        trie = CompactCSRTrie.from_trie(pointer_trie(EXAMPLE), 5, dense_lookup_layers=1)
    else:
        trie = CompactCSRTrie.from_sorted_batch(torch.tensor(EXAMPLE), 5, dense_lookup_layers=1)
    assert trie.row_ptrs.tolist() == [0, 2, 4, 5, 5, 5]
    assert trie.stacked_cols_vals.tolist() == [[0, 4, 2, 3, 1, -1], [1, 2, 3, 4, 5, -1]]
    assert trie.layer_max_branches == [2, 2]
    assert trie.dense_states.tolist() == [1, 0, 0, 0, 2]
    assert [m.tolist() for m in trie.dense_mask_by_layer] == [[True, False, False, False, True]]
    assert trie.vocab_size == 5
    assert (trie.num_edges, trie.num_levels, trie.num_dense_layers) == (5, 2, 1)


def test_two_dense_layers_of_the_example():
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor(EXAMPLE), 5)
    assert trie.dense_states.shape == (5, 5)
    assert {(i, j): int(trie.dense_states[i, j]) for i, j in EXAMPLE} == {
        (0, 2): 3,
        (0, 3): 4,
        (4, 1): 5,
    }
    assert int(trie.dense_mask_by_layer[1].sum()) == 3


def test_fields_and_their_order():
    assert CompactCSRTrie._fields[:6] == (
        "row_ptrs",
        "stacked_cols_vals",
        "layer_max_branches",
        "dense_mask_by_layer",
        "dense_states",
        "vocab_size",
    )


items_and_sizes = st.integers(1, 4).flatmap(
    lambda levels: st.integers(1, 6).flatmap(
        lambda vocab: st.tuples(
            st.lists(st.tuples(*[st.integers(0, vocab - 1)] * levels), min_size=1, max_size=30),
            st.just(vocab),
            st.integers(0, 5),
        )
    )
)


@settings(max_examples=150, deadline=None)
@given(items_and_sizes)
def test_both_builders_agree_on_any_items_in_any_order(drawn):
    items, vocab_size, dense = drawn
    from_batch = CompactCSRTrie.from_sorted_batch(torch.tensor(items), vocab_size, dense)
    assert_equal_tries(from_batch, CompactCSRTrie.from_trie(pointer_trie(items), vocab_size, dense))


@settings(max_examples=100, deadline=None)
@given(items_and_sizes)
def test_walking_the_arrays_yields_exactly_the_items(drawn):
    items, vocab_size, dense = drawn
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor(items), vocab_size, dense)
    ends = [*trie.row_ptrs.tolist()[1:], trie.num_edges]
    tokens, children = trie.stacked_cols_vals.tolist()

    def walk(node, prefix):
        edges = range(trie.row_ptrs[node], ends[node])
        if not edges:
            return [prefix]
        return [leaf for e in edges for leaf in walk(children[e], (*prefix, tokens[e]))]

    assert walk(0, ()) == sorted(set(items))
    # Edge j leads to node j + 1, and the last column closes the table.
    assert children == [*range(1, trie.num_edges + 1), -1]
    assert tokens[-1] == -1
    # Dense tables say the same as the walk.
    for length, mask in enumerate(trie.dense_mask_by_layer, start=1):
        assert mask.shape == (vocab_size,) * length
        prefixes = {item[:length] for item in items}
        assert {tuple(p) for p in mask.nonzero().tolist()} == prefixes
    d = trie.num_dense_layers
    assert d == min(dense, len(items[0]))
    if d:
        for prefix in {item[:d] for item in items}:
            node = 0
            for token in prefix:
                edges = range(trie.row_ptrs[node], ends[node])
                node = next(children[e] for e in edges if tokens[e] == token)
            assert int(trie.dense_states[prefix]) == node
        assert int((trie.dense_states != 0).sum()) == len({item[:d] for item in items})


def test_no_items_give_a_lone_root():
    from_batch = CompactCSRTrie.from_sorted_batch(torch.empty(0, 3, dtype=torch.long), 5, 1)
    assert from_batch.row_ptrs.tolist() == [0]
    assert from_batch.stacked_cols_vals.tolist() == [[-1], [-1]]
    assert from_batch.layer_max_branches == [0, 0, 0]
    assert not from_batch.dense_mask_by_layer[0].any()
    assert not from_batch.dense_states.any()
    from_trie = CompactCSRTrie.from_trie(Trie(), 5, 1)
    for name in ("row_ptrs", "stacked_cols_vals", "dense_states"):
        assert torch.equal(getattr(from_trie, name), getattr(from_batch, name))


def test_items_of_several_lengths():
    trie = CompactCSRTrie.from_trie(pointer_trie([(3,), (1, 2), (1, 2, 0)]), 4, 2)
    assert trie.row_ptrs.tolist() == [0, 2, 3, 3, 4]
    assert trie.stacked_cols_vals[0].tolist() == [1, 3, 2, 0, -1]
    assert trie.layer_max_branches == [2, 1, 1]
    assert trie.dense_states.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype):
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor(EXAMPLE, dtype=dtype), 5, 1)
    assert_equal_tries(trie, CompactCSRTrie.from_sorted_batch(torch.tensor(EXAMPLE), 5, 1))


def test_what_a_tokenizer_encodes_goes_straight_in():
    codes = torch.tensor(EXAMPLE[::-1])
    trie = CompactCSRTrie.from_sorted_batch(TokenSequence(codes), 5, 1)
    assert_equal_tries(trie, CompactCSRTrie.from_sorted_batch(codes, 5, 1))


def test_ids_too_large_for_a_mixed_radix_number():
    # 8 levels over 2**20 ids are 160 bits: a single-number sort would overflow.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2**20, (200, 8), generator=generator)
    ids[100:, :6] = ids[:100, :6]
    trie = CompactCSRTrie.from_sorted_batch(ids, 2**20, 0)
    assert_equal_tries(trie, CompactCSRTrie.from_trie(pointer_trie(ids.tolist()), 2**20, 0))


def test_the_input_is_not_changed():
    ids = torch.tensor(EXAMPLE[::-1])
    before = ids.clone()
    CompactCSRTrie.from_sorted_batch(ids, 5)
    assert torch.equal(ids, before)


def test_replace_moves_every_tensor():
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor(EXAMPLE), 5)
    moved = trie._replace(
        row_ptrs=trie.row_ptrs.to("meta"),
        stacked_cols_vals=trie.stacked_cols_vals.to("meta"),
        dense_mask_by_layer=[m.to("meta") for m in trie.dense_mask_by_layer],
        dense_states=trie.dense_states.to("meta"),
    )
    flat = [t for field in moved for t in (field if isinstance(field, list) else [field])]
    assert {t.device.type for t in flat if isinstance(t, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize("bad", [[[0, 5]], [[-1, 0]]])
def test_ids_out_of_range(bad):
    with pytest.raises(ValueError, match="allowed are 0 to 4"):
        CompactCSRTrie.from_sorted_batch(torch.tensor(bad), 5)
    with pytest.raises(ValueError, match="allowed are 0 to 4"):
        CompactCSRTrie.from_trie(pointer_trie(bad), 5)


def test_refusals_name_what_was_found():
    with pytest.raises(TypeError, match="float32"):
        CompactCSRTrie.from_sorted_batch(torch.rand(3, 2), 5)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        CompactCSRTrie.from_sorted_batch(torch.arange(3), 5)
    with pytest.raises(ValueError, match=r"\(3, 0\)"):
        CompactCSRTrie.from_sorted_batch(torch.empty(3, 0, dtype=torch.long), 5)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        CompactCSRTrie.from_sorted_batch(torch.tensor(EXAMPLE), 0)
    with pytest.raises(ValueError, match="dense_lookup_layers is -1"):
        CompactCSRTrie.from_trie(Trie(), 5, -1)
    with pytest.raises(ValueError, match="use fewer layers"):
        CompactCSRTrie.from_sorted_batch(torch.tensor(EXAMPLE), 2**20)
