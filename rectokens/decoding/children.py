"""Plain PyTorch on the children of a batch of trie nodes: find, score, rank and draw them.

Children of a row are left-packed into M slots, in edge order; empty slots hold -1.

NaN logits count as -inf throughout: such a child is taken only when its row has nothing better,
and whatever is taken is always a child. Child logits of +inf share all the probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INF = float("inf")


def children_of(
    row_ptrs: Tensor, stacked_cols_vals: Tensor, cur_node: Tensor, max_branches: int
) -> tuple[Tensor, Tensor]:
    """Child nodes and their tokens.

    Args:
        row_ptrs: integer (E + 1,), as in ``CompactCSRTrie``.
        stacked_cols_vals: integer (2, E + 1), likewise.
        cur_node: integer (B,); a leaf, -1 or any number that is no node has no children.
        max_branches: M; children past the M-th are left out.

    Returns:
        next_node and valid_idxs (tokens), int64 (B, M), -1 where there is no child.
    """
    num_nodes = row_ptrs.shape[0]
    num_edges = num_nodes - 1
    node = cur_node.long()
    is_node = (node >= 0) & (node < num_nodes)
    node = torch.where(is_node, node, 0)
    first = row_ptrs[node].long()
    # There is no closing entry, but the last node of a breadth-first numbering is a leaf (or a
    # lone root), so its edges may end where they begin.
    end = torch.where(is_node, row_ptrs[(node + 1).clamp(max=num_edges)].long(), first)
    edge = first.unsqueeze(1) + torch.arange(max_branches, device=row_ptrs.device)
    # The closing column of the edge table, (-1, -1), stands for every missing edge.
    edge = torch.where(edge < end.unsqueeze(1), edge, num_edges)
    return stacked_cols_vals[1].long()[edge], stacked_cols_vals[0].long()[edge]


def pick_children(values: Tensor, valid_idxs: Tensor) -> Tensor:
    """Per child, its column of ``values`` (B, V); -inf in empty slots. Shape (B, M)."""
    picked = values.gather(1, valid_idxs.clamp(min=0))
    return picked.masked_fill(valid_idxs < 0, -_INF)


def spread_children(child_values: Tensor, valid_idxs: Tensor, width: int) -> Tensor:
    """The inverse: (B, width), ``child_values`` (B, M) at the children's tokens, -inf elsewhere."""
    spread = torch.full(
        (child_values.shape[0], width),
        -_INF,
        dtype=child_values.dtype,
        device=child_values.device,
    )
    if child_values.shape[1] == 0:
        return spread
    # Empty slots write the row's first child once more (in a childless row, -inf to column 0),
    # so that no two writes to one place differ.
    empty = valid_idxs < 0
    index = torch.where(empty, valid_idxs[:, :1], valid_idxs).clamp(min=0)
    return spread.scatter_(1, index, torch.where(empty, child_values[:, :1], child_values))


def linear_at_children(a: Tensor, b: Tensor, bias: Tensor | None, valid_idxs: Tensor) -> Tensor:
    """``a @ b + bias`` at the children only, float32 (B, M), -inf in empty slots.

    Args:
        a: floating (B, H).
        b: floating (H, V), any strides.
        bias: floating (V,) or None.
        valid_idxs: int64 (B, M).
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    index = valid_idxs.clamp(min=0)
    if index.numel() <= b.shape[1]:
        columns = b.t()[index].to(dtype)  # (B, M, H), no larger than the weight itself
        logits = torch.bmm(columns, a.to(dtype).unsqueeze(2)).squeeze(2)
    else:
        logits = (a.to(dtype) @ b.to(dtype)).gather(1, index)
    if bias is not None:
        logits = logits + bias.to(dtype)[index]
    return logits.float().masked_fill(valid_idxs < 0, -_INF)


def child_log_probas(
    child_logits: Tensor, valid: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """Log-softmax of logits / temperature over each row's children.

    Args:
        child_logits: floating (B, M).
        valid: bool (B, M), which entries are children.
        temperature: at least 0, broadcasts to (B, M); 0 leaves the logits as they are.

    Returns:
        (B, M), float64 for float64 logits, else float32; -inf where there is no child, and for
        children whose logit is -inf or NaN. Never NaN, never above 0.
    """
    scores = _shifted(child_logits, valid, temperature)
    if scores.shape[1] == 0:
        return scores
    log_probas = scores - scores.logsumexp(1, keepdim=True)
    return log_probas.masked_fill(scores == -_INF, -_INF).clamp(max=0.0)


def perturbed(
    child_logits: Tensor, valid: Tensor, temperature: Tensor | float, noise: Tensor
) -> Tensor:
    """Keys whose k largest are k draws without replacement from softmax(logits / temperature).

    The Gumbel-top-k trick: ``noise`` (B, M) is standard Gumbel, independent per entry. Rows of
    temperature 0 get no noise, so their largest keys are their largest logits.
    """
    keys = _shifted(child_logits, valid, temperature)
    return torch.where(_positive(temperature, keys), keys + noise, keys)


def best_slots(keys: Tensor, valid: Tensor, k: int) -> Tensor:
    """Slots of the k largest keys, descending, ties to the lower slot: int64 (B, k), -1 padded.

    Args:
        keys: (B, M), no NaN.
        valid: bool (B, M), left-packed.
        k: at least 1; may exceed M.
    """
    slots = keys.masked_fill(~valid, -_INF).sort(dim=1, descending=True, stable=True).indices
    slots = slots[:, :k]
    slots = slots.masked_fill(~valid.gather(1, slots), -1)
    return torch.nn.functional.pad(slots, (0, k - slots.shape[1]), value=-1)


def take_slots(values: Tensor, slots: Tensor, fill: float) -> Tensor:
    """``values`` (B, M) at ``slots`` (B, k); ``fill`` where the slot is -1."""
    if values.shape[1] == 0:
        return values.new_full(tuple(slots.shape), fill)
    return values.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, fill)


def _positive(temperature: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(temperature, dtype=like.dtype, device=like.device) > 0


def _shifted(child_logits: Tensor, valid: Tensor, temperature: Tensor | float) -> Tensor:
    """Logits less the row's largest, over the temperature: at most 0, no NaN, -inf if invalid."""
    wide = child_logits.to(torch.promote_types(child_logits.dtype, torch.float32))
    largest = torch.finfo(wide.dtype).max
    wide = torch.nan_to_num(wide, nan=-_INF, posinf=largest, neginf=-_INF)
    wide = wide.masked_fill(~valid, -_INF)
    if wide.shape[1] == 0:
        return wide
    peak = wide.amax(1, keepdim=True)
    wide = wide - peak.masked_fill(peak == -_INF, 0.0)
    scale = torch.as_tensor(temperature, dtype=wide.dtype, device=wide.device)
    return wide / torch.where(scale > 0, scale, 1.0)
