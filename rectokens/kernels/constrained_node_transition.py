"""Constrained transitions as torch custom ops, namespace ``vtnk::``. Internal.

The ops take a trie as plain tensors and numbers: ``row_ptrs`` (E + 1,), ``stacked_cols_vals``
(2, E + 1), ``cur_node`` (B,) and ``max_branches`` M. ``rectokens.ops.constrained_node_transition``
is the public face; it checks arguments, these do not.

On CUDA, where triton is installed, the kernels of ``constrained_launch`` run what they can hold;
the references below run the rest: float64 and empty batches. Choices past the kernels' bounds on k
and M are made in PyTorch from the kernels' (B, M) logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rectokens.decoding.children import (
    best_slots,
    child_log_probas,
    children_of,
    linear_at_children,
    perturbed,
    pick_children,
    spread_children,
    take_slots,
)
from rectokens.ops.counter_rng import gumbel
from rectokens.ops.dispatch import define_op, triton_is_installed

_INF = float("inf")


def _transition(
    logits: Tensor,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
) -> tuple[Tensor, Tensor, Tensor]:
    next_node, valid_idxs = children_of(row_ptrs, stacked_cols_vals, cur_node, max_branches)
    corrected = spread_children(pick_children(logits, valid_idxs), valid_idxs, logits.shape[1])
    return next_node, valid_idxs, corrected


def _linear(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
) -> tuple[Tensor, Tensor, Tensor]:
    next_node, valid_idxs = children_of(row_ptrs, stacked_cols_vals, cur_node, max_branches)
    logits = linear_at_children(a, b, bias, valid_idxs)
    return next_node, valid_idxs, spread_children(logits, valid_idxs, b.shape[1])


def _sampling(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
    k: int,
    temperature: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """k draws without replacement; the noise of a child is a function of (seed, row, token).

    temperature: float32, broadcasts to (B, M); None is 1. seed: int64, no dimensions. Results as
    ``_topk``, in the order drawn.
    """
    next_node, valid_idxs = children_of(row_ptrs, stacked_cols_vals, cur_node, max_branches)
    logits = linear_at_children(a, b, bias, valid_idxs)
    return _draw(next_node, valid_idxs, logits, k, temperature, seed)


def _topk(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
    k: int,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The k best children, equal logits by ascending token.

    Returns next_node, valid_idxs (B, M), then per choice (B, k): float32 logit, int64 token,
    int64 node and float32 log-probability over all children at ``temperature``; -inf, -1, -1,
    -inf where none is left.
    """
    next_node, valid_idxs = children_of(row_ptrs, stacked_cols_vals, cur_node, max_branches)
    logits = linear_at_children(a, b, bias, valid_idxs)
    return _rank(next_node, valid_idxs, logits, k, temperature)


def _draw(
    next_node: Tensor,
    valid_idxs: Tensor,
    logits: Tensor,
    k: int,
    temperature: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    temperature = _temperature(temperature, logits)
    row = torch.arange(logits.shape[0], device=logits.device).unsqueeze(1)
    noise = gumbel(seed, row, valid_idxs)
    keys = perturbed(logits.double(), valid_idxs >= 0, temperature, noise)
    return next_node, valid_idxs, *_take(logits, next_node, valid_idxs, keys, k, temperature)


def _rank(
    next_node: Tensor, valid_idxs: Tensor, logits: Tensor, k: int, temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    temperature = _temperature(temperature, logits)
    keys = torch.nan_to_num(logits, nan=-_INF, posinf=_INF, neginf=-_INF)
    return next_node, valid_idxs, *_take(logits, next_node, valid_idxs, keys, k, temperature)


def _temperature(temperature: Tensor | None, logits: Tensor) -> Tensor:
    return logits.new_ones((1, 1), dtype=torch.float32) if temperature is None else temperature


def _take(
    logits: Tensor,
    next_node: Tensor,
    valid_idxs: Tensor,
    keys: Tensor,
    k: int,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    valid = valid_idxs >= 0
    slots = best_slots(keys, valid, k)
    clean = torch.nan_to_num(logits, nan=-_INF, posinf=_INF, neginf=-_INF)
    return (
        take_slots(clean, slots, -_INF),
        take_slots(valid_idxs, slots, -1),
        take_slots(next_node, slots, -1),
        take_slots(child_log_probas(logits, valid, temperature), slots, -_INF),
    )


def _fake_transition(
    logits: Tensor,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
) -> tuple[Tensor, Tensor, Tensor]:
    ids = (logits.shape[0], max_branches)
    return (
        logits.new_empty(ids, dtype=torch.long),
        logits.new_empty(ids, dtype=torch.long),
        logits.new_empty(tuple(logits.shape)),
    )


def _fake_linear(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
) -> tuple[Tensor, Tensor, Tensor]:
    ids = (a.shape[0], max_branches)
    return (
        a.new_empty(ids, dtype=torch.long),
        a.new_empty(ids, dtype=torch.long),
        a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32),
    )


def _fake_choice(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
    k: int,
    temperature: Tensor | None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids = (a.shape[0], max_branches)
    choices = (a.shape[0], k)
    return (
        a.new_empty(ids, dtype=torch.long),
        a.new_empty(ids, dtype=torch.long),
        a.new_empty(choices, dtype=torch.float32),
        a.new_empty(choices, dtype=torch.long),
        a.new_empty(choices, dtype=torch.long),
        a.new_empty(choices, dtype=torch.float32),
    )


def _transition_cuda(
    logits: Tensor,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (logits, row_ptrs, stacked_cols_vals, cur_node, max_branches)
    if logits.shape[0] > 0 and max_branches > 0 and triton_is_installed():
        from rectokens.kernels import constrained_launch as launch

        if launch.transition_fits(logits):
            return launch.launch_transition(*args)
    return _transition(*args)


def _linear_cuda(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (a, b, bias, row_ptrs, stacked_cols_vals, cur_node, max_branches)
    if not _kernels_fit(a, b, bias, max_branches):
        return _linear(*args)
    from rectokens.kernels import constrained_launch as launch

    return launch.launch_linear(*args)


def _sampling_cuda(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
    k: int,
    temperature: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not _kernels_fit(a, b, bias, max_branches):
        return _sampling(
            a, b, bias, row_ptrs, stacked_cols_vals, cur_node, max_branches, k, temperature, seed
        )
    from rectokens.kernels import constrained_launch as launch

    trie = launch.Trie.of(row_ptrs, stacked_cols_vals, cur_node)
    if launch.choice_fits(max_branches, k, temperature, a.shape[0]):
        return launch.launch_choice(a, b, bias, trie, max_branches, k, temperature, seed)
    return _draw(*launch.child_logits(a, b, bias, trie, max_branches), k, temperature, seed)


def _topk_cuda(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_ptrs: Tensor,
    stacked_cols_vals: Tensor,
    cur_node: Tensor,
    max_branches: int,
    k: int,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not _kernels_fit(a, b, bias, max_branches):
        return _topk(
            a, b, bias, row_ptrs, stacked_cols_vals, cur_node, max_branches, k, temperature
        )
    from rectokens.kernels import constrained_launch as launch

    trie = launch.Trie.of(row_ptrs, stacked_cols_vals, cur_node)
    if launch.choice_fits(max_branches, k, temperature, a.shape[0]):
        return launch.launch_choice(a, b, bias, trie, max_branches, k, temperature)
    return _rank(*launch.child_logits(a, b, bias, trie, max_branches), k, temperature)


def _kernels_fit(a: Tensor, b: Tensor, bias: Tensor | None, max_branches: int) -> bool:
    if a.shape[0] == 0 or max_branches == 0 or not triton_is_installed():
        return False
    from rectokens.kernels import constrained_launch as launch

    return launch.linear_fits(a, b, bias)


transition = define_op(
    "vtnk::constrained_node_transition", _transition, fake=_fake_transition, cuda=_transition_cuda
)
linear = define_op(
    "vtnk::fused_linear_constrained_node_transition",
    _linear,
    fake=_fake_linear,
    cuda=_linear_cuda,
)
sampling = define_op(
    "vtnk::fused_linear_constrained_node_transition_sampling",
    _sampling,
    fake=_fake_choice,
    cuda=_sampling_cuda,
)
topk = define_op(
    "vtnk::fused_linear_constrained_node_transition_topk",
    _topk,
    fake=_fake_choice,
    cuda=_topk_cuda,
)
