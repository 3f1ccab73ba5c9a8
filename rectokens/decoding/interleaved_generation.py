"""Free text with constrained items in it, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rectokens.decoding.children import child_log_probas, children_of, pick_children
from rectokens.decoding.model_cache import returned_cache
from rectokens.decoding.model_protocol import call_model, evaluating, last_logits
from rectokens.decoding.proposals import gumbel_like
from rectokens.decoding.vntk import branches_at
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import check_temperature


def generate_with_item_constraints(
    model: nn.Module,
    input_ids: Tensor,
    trie: CompactCSRTrie,
    item_sep_token_id: int,
    num_levels: int,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
) -> Tensor:
    """Free text in which every item is a real one.

    Decodes freely until the separator appears, then ``num_levels`` tokens that follow the trie,
    then freely again, and so on. A prompt that ends in the separator starts with an item. NaN
    logits count as -inf.

    Args:
        model: a causal LM.
        input_ids: int64 (1, T).
        trie: over the model's token ids; items shorter than ``num_levels`` end early.
        item_sep_token_id: the token that opens an item.
        num_levels: tokens of an item, at most the trie's depth.
        max_new_tokens: at least 0; the last item may be cut.
        do_sample: draw each token from softmax(logits / temperature), with torch's generator;
            else, or at temperature 0, take the best.
        temperature: at least 0.
        eos_token_id: stops free decoding once produced; several are allowed.

    Returns:
        int64 (n,), the new tokens only, the end token included.

    Raises:
        AssertionError: more or fewer than one prompt.
        ValueError: a number out of range.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise AssertionError(f"input_ids have shape {tuple(input_ids.shape)}; expected (1, T)")
    if input_ids.shape[1] < 1:
        raise ValueError("input_ids are empty; the model needs at least one token")
    _check_item_constraints(trie, item_sep_token_id, num_levels, max_new_tokens, temperature)
    stop = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    heat = temperature if do_sample else 0.0
    device = input_ids.device
    vocabulary = torch.arange(trie.vocab_size, device=device).unsqueeze(0)

    new_tokens: list[int] = []
    in_item = int(input_ids[0, -1]) == item_sep_token_id
    depth, node = 0, torch.zeros(1, dtype=torch.long, device=device)
    with torch.inference_mode(), evaluating(model):
        newest, past = input_ids, None
        while len(new_tokens) < max_new_tokens:
            output = call_model(model, newest, past, None)
            past = returned_cache(output)
            logits = last_logits(output, 1, trie.vocab_size)
            if in_item:
                next_node, tokens = children_of(
                    trie.row_ptrs, trie.stacked_cols_vals, node, branches_at(trie, depth)
                )
                slot = _choose(logits, tokens, heat)
                in_item = slot >= 0
            if in_item:
                token, node = int(tokens[0, slot]), next_node[:, slot]
                depth += 1
                in_item = depth < num_levels
            else:
                token = _choose(logits, vocabulary, heat)
                in_item, depth, node = token == item_sep_token_id, 0, torch.zeros_like(node)
                if token in stop:
                    new_tokens.append(token)
                    break
            new_tokens.append(token)
            newest = torch.full((1, 1), token, dtype=torch.long, device=device)
    return torch.tensor(new_tokens, dtype=torch.long, device=device)


def _choose(logits: Tensor, tokens: Tensor, temperature: float) -> int:
    """Slot of the best or of a drawn token among ``tokens`` (1, M), -1 if there is none."""
    if tokens.shape[1] == 0:
        return -1
    valid = tokens >= 0
    keys = child_log_probas(pick_children(logits, tokens), valid, temperature)
    if temperature > 0:
        keys = keys + gumbel_like(keys)
    slot = int(keys.masked_fill(~valid, -torch.inf).argmax(1))
    return slot if bool(valid[0, slot]) else -1


def _check_item_constraints(
    trie: CompactCSRTrie, separator: int, num_levels: int, max_new_tokens: int, temperature: float
) -> None:
    if not 0 <= separator < trie.vocab_size:
        raise ValueError(
            f"item_sep_token_id is {separator}; allowed are 0 to {trie.vocab_size - 1}"
        )
    if not 1 <= num_levels <= trie.num_levels:
        raise ValueError(f"num_levels is {num_levels}; allowed are 1 to {trie.num_levels}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    check_temperature(temperature)
