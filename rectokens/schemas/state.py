"""What constrained generation carries from one step to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig


class ConstraintState(NamedTuple):
    """Where each row stands in the trie.

    Attributes:
        step: tokens generated so far, 0..L.
        trie: the allowed sequences.
        cur_node: int64 (rows,), node of each row, -1 for a dead one; None while the search is
            still in the trie's dense layers.
    """

    step: int
    trie: CompactCSRTrie
    cur_node: Tensor | None


class GenerationState(NamedTuple):
    """The beams; row b * k + i of the flat tensors is beam i of batch item b.

    Attributes:
        generated_ids: int64 (B, k, step), best beam first; -1 throughout a dead beam.
        past_key_values: the model's cache with B * k rows, or None if it keeps none.
        log_probas: (B * k,), sum of the tokens' log-probabilities; -inf for a dead beam.
        attention_mask: (B * k, T + step), prompt mask of each beam and ones, or None.
    """

    generated_ids: Tensor
    past_key_values: Any
    log_probas: Tensor
    attention_mask: Tensor | None = None


class ConstrainedGenerationState(NamedTuple):
    """Everything ``decode_one_step`` needs and returns.

    Attributes:
        generation_config: how to search.
        constraint_state: where the rows stand in the trie.
        generation_state: the beams, None before the first step.
    """

    generation_config: GenerationConfig
    constraint_state: ConstraintState
    generation_state: GenerationState | None = None
