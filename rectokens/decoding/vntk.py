"""Constrained transitions in plain PyTorch: the definition the fast paths are compared with.

Both functions work on the CPU and on a GPU, never synchronise with the host, and can be
compiled. All rows stand at the same depth ``step``; M = ``trie.layer_max_branches[step]``.

The idea of stepping all rows through a CSR trie at once is that of STATIC ("Vectorizing the
Trie: Efficient Constrained Decoding for LLM-based Generative Retrieval on Accelerators", 2026).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rectokens.decoding.children import children_of, pick_children, spread_children
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

Transition = tuple[Tensor, Tensor, Tensor]


def vtnk_pytorch(logits: Tensor, cur_node: Tensor, trie: CompactCSRTrie, step: int) -> Transition:
    """Step every row to its children and mask all other tokens.

    Args:
        logits: floating (B, C), C at least V; columns past V are never valid. Not modified.
        cur_node: integer (B,), nodes at depth ``step``; 0, the root, at step 0.
        trie: the allowed sequences.
        step: depth of the nodes, 0..L-1.

    Returns:
        next_node: int64 (B, M), children in edge order, left-packed, -1 padded.
        valid_idxs: int64 (B, M), their tokens, likewise.
        corrected_logits: (B, C), dtype of ``logits``: unchanged at the children (NaN included),
            -inf elsewhere. A leaf or -1 gives a row of -1 and -inf.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or step.
    """
    check_floating("logits", logits, 2)
    check_width("logits", logits.shape[1], trie)
    check_nodes(cur_node, logits.shape[0], trie)
    check_same_device(trie, logits=logits, cur_node=cur_node)
    next_node, valid_idxs = children_of(
        trie.row_ptrs, trie.stacked_cols_vals, cur_node, branches_at(trie, step)
    )
    corrected = spread_children(pick_children(logits, valid_idxs), valid_idxs, logits.shape[1])
    return next_node, valid_idxs, corrected


def sparse_linear_pytorch(
    a: Tensor, weight: Tensor, cur_node: Tensor, trie: CompactCSRTrie, step: int
) -> Transition:
    """``vtnk_pytorch`` of ``a @ weight.T``, computed for the children only.

    Gathers B x M rows of the weight, so it takes B * M * H floats of memory.

    Args:
        a: floating (B, H).
        weight: floating (C, H), C at least V, as ``nn.Linear`` keeps it.
        cur_node: integer (B,), nodes at depth ``step``.
        trie: the allowed sequences.
        step: depth of the nodes, 0..L-1.

    Returns:
        next_node, valid_idxs and logits as ``vtnk_pytorch``; logits float32 (B, C).

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or step.
    """
    check_floating("a", a, 2)
    check_floating("weight", weight, 2)
    if a.shape[1] != weight.shape[1]:
        raise ValueError(f"a has {a.shape[1]} columns, weight has {weight.shape[1]}")
    check_width("weight rows", weight.shape[0], trie)
    check_nodes(cur_node, a.shape[0], trie)
    check_same_device(trie, a=a, weight=weight, cur_node=cur_node)
    next_node, valid_idxs = children_of(
        trie.row_ptrs, trie.stacked_cols_vals, cur_node, branches_at(trie, step)
    )
    rows = weight[valid_idxs.clamp(min=0)].float()  # (B, M, H)
    logits = torch.einsum("bmh,bh->bm", rows, a.float()).masked_fill(valid_idxs < 0, float("-inf"))
    return next_node, valid_idxs, spread_children(logits, valid_idxs, weight.shape[0])


def branches_at(trie: CompactCSRTrie, step: int) -> int:
    """M, most children of a node at depth ``step``.

    Raises:
        ValueError: no such depth.
    """
    depth = len(trie.layer_max_branches)
    if not 0 <= step < depth:
        raise ValueError(
            f"step is {step}; allowed are 0 to {depth - 1} for a trie of depth {depth}"
        )
    return trie.layer_max_branches[step]


def check_floating(name: str, tensor: Tensor, ndim: int) -> None:
    """Refuse a tensor of another rank or of integers.

    Raises:
        TypeError: not a floating dtype.
        ValueError: not ``ndim`` dimensions.
    """
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {ndim} dimensions")


def check_width(name: str, width: int, trie: CompactCSRTrie) -> None:
    """Refuse fewer columns than the trie has tokens.

    Raises:
        ValueError: names both numbers.
    """
    if width < trie.vocab_size:
        raise ValueError(f"{name}: {width} tokens; the trie's vocab_size is {trie.vocab_size}")


def check_nodes(cur_node: Tensor | None, num_rows: int, trie: CompactCSRTrie) -> Tensor:
    """Return ``cur_node``, or refuse it if it is not one integer a row.

    Raises:
        TypeError: not an integer dtype.
        ValueError: None, or another shape.
    """
    if cur_node is None:
        raise ValueError(
            "cur_node is None; below the trie's "
            f"{trie.num_dense_layers} dense layers every row needs a node"
        )
    if cur_node.dtype.is_floating_point or cur_node.dtype is torch.bool:
        raise TypeError(f"cur_node has dtype {cur_node.dtype}; expected an integer dtype")
    if cur_node.shape != (num_rows,):
        raise ValueError(f"cur_node has shape {tuple(cur_node.shape)}; expected ({num_rows},)")
    return cur_node


def check_same_device(trie: CompactCSRTrie, **tensors: Tensor | None) -> None:
    """Refuse tensors that are not on the trie's device.

    Raises:
        ValueError: names the tensor and both devices.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != trie.device:
            raise ValueError(f"{name} is on {tensor.device}, the trie on {trie.device}")
