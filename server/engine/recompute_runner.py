"""The runner of last resort: every beam's whole sequence through the model again at every level.

It needs nothing of a model but that it maps tokens to logits: no cache, no attention of ours. So it
tells what the others must give, and serves what transformers itself cannot cache for many beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rectokens.decoding.model_cache import named_parameters
from rectokens.schemas.item_tokens import ItemTokens
from server.engine.head import LevelLogits, level_of_vocab_logits
from server.engine.packing import model_inputs
from server.engine.prefix_cache import PrefixCache
from server.engine.prompt_leases import Prompt, Prompts

_MAX_TOKENS = 8_192  # in one pass, to bound what it needs in memory


class RecomputeRunner:
    """Runs any model, without a cache.

    Args:
        model: a causal LM of transformers.
        item_tokens: where the item tokens lie.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        self.model = model
        self.item_tokens = item_tokens
        self.device: torch.device = model.device
        self.prefix_cache: PrefixCache | None = None
        # Whoever does not know it makes logits of all positions.
        self.last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in named_parameters(model) else {}
        )

    def session(self) -> _RecomputeSession:
        """A fresh session."""
        return _RecomputeSession(self)

    def last_logits(self, prompt: Prompt, generated: Tensor) -> Tensor:
        """Logits (W, V) after a prompt and each of the token ids (W, t) that follow it."""
        embed = self.model.get_input_embeddings()
        ((name, head),) = model_inputs([prompt], embed, self.device).items()
        tail = embed(generated).to(head.dtype) if name == "inputs_embeds" else generated
        sequences = torch.cat([head.expand(len(tail), *head.shape[1:]), tail], dim=1)
        rows = max(_MAX_TOKENS // sequences.shape[1], 1)
        parts = [
            self.model(**{name: part}, use_cache=False, **self.last_only).logits[:, -1]
            for part in sequences.split(rows)
        ]
        return torch.cat(parts)


class _RecomputeSession:
    def __init__(self, runner: RecomputeRunner) -> None:
        self._runner = runner
        self._prompts: Prompts = ()
        self._generated = torch.empty(0, dtype=torch.long)
        self.cached_tokens: Sequence[int] = ()

    def prefill(self, prompts: Prompts, *, with_vocab_norm: bool) -> LevelLogits:
        self.cached_tokens, self._prompts = [0] * len(prompts), prompts
        self._generated = torch.empty(
            len(prompts), 1, 0, dtype=torch.long, device=self._runner.device
        )
        return self._level(0, with_vocab_norm)

    def advance(
        self, parents: Tensor, codes: Tensor, depth: int, *, with_vocab_norm: bool
    ) -> LevelLogits:
        tokens = codes + self._runner.item_tokens.token_id(depth - 1, 0)
        kept = self._generated.gather(1, parents[..., None].expand(-1, -1, depth - 1))
        self._generated = torch.cat([kept, tokens[..., None]], dim=-1)
        return self._level(depth, with_vocab_norm)

    def close(self, sound: Sequence[bool | None] = ()) -> None:
        self._prompts = ()

    def _level(self, level: int, with_vocab_norm: bool) -> LevelLogits:
        logits = torch.stack(
            [
                self._runner.last_logits(prompt, generated)
                for prompt, generated in zip(self._prompts, self._generated, strict=True)
            ]
        )
        return level_of_vocab_logits(
            logits, self._runner.item_tokens, level, with_vocab_norm=with_vocab_norm
        )
