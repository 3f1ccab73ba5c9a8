# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201
"""What kernels read of a `TrieTable`: the arrays of the trie that is active when they run."""

from rectokens.kernels.optional_triton import tl, triton

# Where a request's values lie among those of its batch, and so their alignment, depends on the
# batch's size. Programs read them one by one: kernels are not compiled once for each case.
UNALIGNED = ("beam_width_ptr", "normalization_ptr", "temperature_ptr", "seed_ptr", "prefixes_ptr",
             "allow_list_ptr", "exclusions_ptr", "exclusion_start_ptr", "exclusion_end_ptr",
             "exclusion_counts_ptr", "poisoned_ptr", "counters_ptr", "alive_ptr")  # fmt: skip


@triton.jit
def row_ptrs_of(table_ptr):
    """The trie's row pointers."""
    return tl.load(table_ptr).to(tl.pointer_type(tl.int32))


@triton.jit
def codes_of(table_ptr):
    """The trie's codes, 16 bits that Triton takes for signed."""
    return tl.load(table_ptr + 1).to(tl.pointer_type(tl.int16))


@triton.jit
def leaf_items_of(table_ptr):
    """First item of each leaf."""
    return tl.load(table_ptr + 2).to(tl.pointer_type(tl.int32))


@triton.jit
def first_leaf_of(table_ptr):
    """Node number of the first leaf."""
    return tl.load(table_ptr + 3).to(tl.int32)
