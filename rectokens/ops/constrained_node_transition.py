"""Constrained transitions: step each row to its trie children and mask, draw or rank them.

All rows stand at depth ``constraint_state.step``; M = ``trie.layer_max_branches[step]``. Every
function returns ``next_node`` and ``valid_idxs`` (tokens), int64 (B, M): the children of each
row's node in edge order, left-packed, -1 padded. A leaf or -1 has none.

NaN logits count as -inf when children are ranked or drawn: what is returned is always a child.
Not differentiable. Errors are those of ``rectokens.decoding.vntk``: TypeError for a wrong dtype,
ValueError for a wrong shape, device, step or number, naming what was found and what is allowed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rectokens.decoding.vntk import (
    branches_at,
    check_floating,
    check_nodes,
    check_same_device,
    check_width,
)
from rectokens.kernels import constrained_node_transition as kernels
from rectokens.ops.counter_rng import signed64
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import check_temperature
from rectokens.schemas.state import ConstraintState


class ChildChoices(NamedTuple):
    """Children chosen for each row, and what they were chosen from.

    Attributes:
        next_node: int64 (B, M), all children.
        valid_idxs: int64 (B, M), their tokens.
        logits: float32 (B, k), of the chosen, -inf where there is none.
        idxs: int64 (B, k), tokens of the chosen, -1 where there is none.
        nodes: int64 (B, k), the nodes those lead to, likewise.
        log_probas: float32 (B, k), log-softmax of logits / temperature over all children.
    """

    next_node: Tensor
    valid_idxs: Tensor
    logits: Tensor
    idxs: Tensor
    nodes: Tensor
    log_probas: Tensor


def constrained_node_transition(
    logits: Tensor, constraint_state: ConstraintState
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits to the children of each row's node.

    Args:
        logits: floating (B, C), C at least V; columns past V are never valid. Not modified.
        constraint_state: step, trie and ``cur_node`` (B,).

    Returns:
        next_node, valid_idxs and corrected logits (B, C) of the same dtype, -inf where no child.
    """
    trie, cur_node = constraint_state.trie, constraint_state.cur_node
    check_floating("logits", logits, 2)
    check_width("logits", logits.shape[1], trie)
    check_nodes(cur_node, logits.shape[0], trie)
    check_same_device(trie, logits=logits, cur_node=cur_node)
    max_branches = branches_at(trie, constraint_state.step)
    next_node, valid_idxs, corrected = kernels.transition(
        logits.detach(), trie.row_ptrs, trie.stacked_cols_vals, cur_node, max_branches
    )
    return next_node, valid_idxs, corrected


def fused_linear_constrained_node_transition(
    a: Tensor, b: Tensor, constraint_state: ConstraintState, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask ``a @ b + bias`` to the children of each row's node.

    Args:
        a: floating (B, H).
        b: floating (H, C), C at least V; contiguous, or a transposed view such as ``weight.T``.
        constraint_state: step, trie and ``cur_node`` (B,).
        bias: floating (C,) or None.

    Returns:
        next_node, valid_idxs and float32 logits (B, C), -inf where no child.
    """
    _check_linear(a, b, constraint_state, bias)
    next_node, valid_idxs, logits = kernels.linear(
        *_detached(a, b, bias), *_trie_arguments(a, constraint_state)
    )
    return next_node, valid_idxs, logits


def fused_linear_constrained_node_transition_sampling(
    a: Tensor,
    b: Tensor,
    constraint_state: ConstraintState,
    bias: Tensor | None = None,
    rng_seed: int | Tensor | None = None,
    temperature: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one child a row from softmax((a @ b + bias) / temperature) over the children.

    The draw is exact (Gumbel-max) and a function of (seed, row, tokens, logits) alone.

    Args:
        a: floating (B, H).
        b: floating (H, C), C at least V, any strides.
        constraint_state: step, trie and ``cur_node`` (B,).
        bias: floating (C,) or None.
        rng_seed: any integer, or an int64 tensor without dimensions; None takes one from
            torch's generator.
        temperature: at least 0; a tensor of one element or of B; None is 1, 0 is argmax.

    Returns:
        next_node, valid_idxs and the tokens drawn, int64 (B,), -1 for a row without children.
    """
    choices = draw_children(
        a, b, constraint_state, 1, bias=bias, rng_seed=rng_seed, temperature=temperature
    )
    return choices.next_node, choices.valid_idxs, choices.idxs.squeeze(1)


def fused_linear_constrained_node_transition_topk(
    a: Tensor, b: Tensor, constraint_state: ConstraintState, k: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k best children of each row by ``a @ b + bias``; equal logits by ascending token.

    Args:
        a: floating (B, H).
        b: floating (H, C), C at least V, any strides.
        constraint_state: step, trie and ``cur_node`` (B,).
        k: at least 1; may exceed M.
        bias: floating (C,) or None.

    Returns:
        next_node, valid_idxs, float32 logits (B, k) descending and int64 tokens (B, k); -inf
        and -1 past a row's last child.
    """
    choices = rank_children(a, b, constraint_state, k, bias=bias)
    return choices.next_node, choices.valid_idxs, choices.logits, choices.idxs


def draw_children(
    a: Tensor,
    b: Tensor,
    constraint_state: ConstraintState,
    k: int,
    *,
    bias: Tensor | None = None,
    rng_seed: int | Tensor | None = None,
    temperature: float | Tensor | None = None,
) -> ChildChoices:
    """As the sampling op, k draws without replacement a row, with their log-probabilities."""
    _check_linear(a, b, constraint_state, bias)
    _check_k(k)
    seed = _seed_tensor(rng_seed, a.device)
    scale = _temperature_tensor(temperature, a)
    return ChildChoices(
        *kernels.sampling(
            *_detached(a, b, bias), *_trie_arguments(a, constraint_state), k, scale, seed
        )
    )


def rank_children(
    a: Tensor,
    b: Tensor,
    constraint_state: ConstraintState,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor | None = None,
) -> ChildChoices:
    """As the top-k op, with log-probabilities over all children at ``temperature``."""
    _check_linear(a, b, constraint_state, bias)
    _check_k(k)
    scale = _temperature_tensor(temperature, a)
    return ChildChoices(
        *kernels.topk(*_detached(a, b, bias), *_trie_arguments(a, constraint_state), k, scale)
    )


def _detached(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ops have no gradient; results must not claim one."""
    return a.detach(), b.detach(), None if bias is None else bias.detach()


def _trie_arguments(a: Tensor, state: ConstraintState) -> tuple[Tensor, Tensor, Tensor, int]:
    trie = state.trie
    cur_node = check_nodes(state.cur_node, a.shape[0], trie)
    return trie.row_ptrs, trie.stacked_cols_vals, cur_node, branches_at(trie, state.step)


def _check_linear(a: Tensor, b: Tensor, state: ConstraintState, bias: Tensor | None) -> None:
    trie: CompactCSRTrie = state.trie
    check_floating("a", a, 2)
    check_floating("b", b, 2)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"a has {a.shape[1]} columns, b has {b.shape[0]} rows; they must agree")
    check_width("b columns", b.shape[1], trie)
    if bias is not None:
        check_floating("bias", bias, 1)
        if bias.shape[0] != b.shape[1]:
            raise ValueError(
                f"bias has {bias.shape[0]} entries; expected {b.shape[1]}, one a token"
            )
    check_same_device(trie, a=a, b=b, bias=bias, cur_node=state.cur_node)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")


def _seed_tensor(rng_seed: int | Tensor | None, device: torch.device) -> Tensor:
    if rng_seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    if isinstance(rng_seed, int):
        return torch.full((), signed64(rng_seed), dtype=torch.long, device=device)
    if rng_seed.dtype.is_floating_point or rng_seed.numel() != 1:
        raise ValueError(
            f"rng_seed has dtype {rng_seed.dtype} and shape {tuple(rng_seed.shape)}; "
            "expected one integer"
        )
    return rng_seed.to(device=device, dtype=torch.long).reshape(())


def _temperature_tensor(temperature: float | Tensor | None, a: Tensor) -> Tensor | None:
    """float32, (1, 1) or (B, 1); None for 1, which spares the device a launch."""
    if temperature is None:
        return None
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
        return torch.full((1, 1), temperature, dtype=torch.float32, device=a.device)
    if temperature.numel() not in (1, a.shape[0]):
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}; "
            f"expected one element or {a.shape[0]}, one a row"
        )
    return temperature.to(device=a.device, dtype=torch.float32).reshape(-1, 1)
