"""The successors that each row proposes at one decode step, and the choice among them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rectokens.decoding.children import best_slots, child_log_probas, pick_children, take_slots
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

_INF = float("inf")


class Proposals(NamedTuple):
    """F successors of each row, best or first drawn first.

    Attributes:
        tokens: int64 (rows, F), -1 where a row has fewer.
        nodes: int64 (rows, F), the nodes they lead to, or None inside the dense layers.
        log_probas: (rows, F), -inf where a row has fewer.
    """

    tokens: Tensor
    nodes: Tensor | None
    log_probas: Tensor


class Survivors(NamedTuple):
    """The k best continuations of each of B items, best first, dead ones last; rows flat.

    Attributes:
        parents: int64 (B * k,), row each one continues; for a dead one, some row of its item.
        tokens: int64 (B * k,), -1 if dead.
        nodes: int64 (B * k,), -1 if dead; None inside the dense layers.
        log_probas: (B * k,), cumulative; -inf if dead.
    """

    parents: Tensor
    tokens: Tensor
    nodes: Tensor | None
    log_probas: Tensor


def dense_children(trie: CompactCSRTrie, prefixes: Tensor) -> Tensor:
    """Tokens that extend each prefix, looked up in the dense mask of that length.

    Args:
        trie: with more than s dense layers.
        prefixes: int64 (rows, s), -1 throughout a dead row, which is read as 0: its score of
            -inf keeps whatever it proposes from surviving.

    Returns:
        int64 (rows, M), ascending, -1 padded.
    """
    rows, step = prefixes.shape
    mask = trie.dense_mask_by_layer[step]
    if step == 0:
        return _set_bits(mask.unsqueeze(0), trie.layer_max_branches[0]).expand(rows, -1)
    # Indexing (V,) * (s + 1) with s columns leaves the mask of the next token.
    allowed = mask[tuple(prefixes.clamp(min=0).unbind(1))]
    return _set_bits(allowed, trie.layer_max_branches[step])


def dense_nodes(trie: CompactCSRTrie, prefixes: Tensor, tokens: Tensor) -> Tensor | None:
    """Nodes that ``tokens`` (rows, F) lead to from ``prefixes`` (rows, s); -1 where none.

    None while the prefixes are still shorter than the dense layers.
    """
    if prefixes.shape[1] + 1 < trie.num_dense_layers:
        return None
    columns = [p.unsqueeze(1).expand_as(tokens).clamp(min=0) for p in prefixes.unbind(1)]
    nodes = trie.dense_states[(*columns, tokens.clamp(min=0))]
    return nodes.masked_fill(tokens < 0, -1)


def propose(
    logits: Tensor,
    child_tokens: Tensor,
    child_nodes: Tensor | None,
    fan_out: int,
    temperature: float,
) -> Proposals:
    """Each row's best children (temperature 0), or children drawn without replacement.

    Args:
        logits: floating (rows, C), not modified. NaN counts as -inf.
        child_tokens: int64 (rows, M), left-packed, -1 padded.
        child_nodes: int64 (rows, M) or None.
        fan_out: F, children to propose a row.
        temperature: scales the logits if positive; draws are from torch's generator.
    """
    valid = child_tokens >= 0
    log_probas = child_log_probas(pick_children(logits, child_tokens), valid, temperature)
    keys = log_probas
    if temperature > 0:
        keys = log_probas + gumbel_like(log_probas)
    slots = best_slots(keys, valid, fan_out)
    return Proposals(
        take_slots(child_tokens, slots, -1),
        None if child_nodes is None else take_slots(child_nodes, slots, -1),
        take_slots(log_probas, slots, -_INF),
    )


def survive(proposals: Proposals, parent_log_probas: Tensor, num_items: int, k: int) -> Survivors:
    """The best k of each item's proposals by cumulative log-probability.

    Args:
        proposals: of the G rows of each of B items, rows of an item adjoining.
        parent_log_probas: (B * G,), -inf for dead rows.
        num_items: B.
        k: how many to keep.
    """
    rows, fan_out = proposals.tokens.shape
    group = rows // max(num_items, 1)
    by_item = (num_items, group * fan_out)
    total = (parent_log_probas.unsqueeze(1) + proposals.log_probas).view(by_item)
    slots = best_slots(total, total > -_INF, k)
    # A slot's number is (row within the item) * F + proposal; dead slots take the item's first.
    parents = slots.clamp(min=0) // fan_out
    parents = parents + torch.arange(num_items, device=slots.device).unsqueeze(1) * group
    nodes = None
    if proposals.nodes is not None:
        nodes = take_slots(proposals.nodes.view(by_item), slots, -1).flatten()
    return Survivors(
        parents.flatten(),
        take_slots(proposals.tokens.view(by_item), slots, -1).flatten(),
        nodes,
        take_slots(total, slots, -_INF).flatten(),
    )


def gumbel_like(values: Tensor) -> Tensor:
    """Standard Gumbel noise from torch's generator, finite."""
    noise = torch.empty_like(values).exponential_()
    return -noise.clamp_(min=torch.finfo(values.dtype).tiny).log_()


def _set_bits(mask: Tensor, width: int) -> Tensor:
    """Positions of the True entries of each row of (rows, V): (rows, width), -1 padded."""
    vocab_size = mask.shape[1]
    positions = torch.arange(vocab_size, device=mask.device)
    positions = torch.where(mask, positions, vocab_size)
    first = positions.topk(width, dim=1, largest=False).values
    return torch.where(first < vocab_size, first, -1)
