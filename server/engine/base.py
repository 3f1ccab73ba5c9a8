"""What engines have in common: the limits of a model, and how failures of the device are told."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rectokens.decoding.device_prefixes import DevicePrefixes
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.engine.positions import max_positions
from server.engine.types import (
    EngineBrokenError,
    EngineFault,
    HasLeft,
    RunningBatch,
    nobody_left,
)

LEFT = EngineFault("its caller has left")


def soundness(answer: SearchResult | EngineFault) -> bool | None:
    """Whether a request went well; None where its caller left, so that nobody knows."""
    return None if answer is LEFT else isinstance(answer, SearchResult)


class EngineBase:
    """A loaded model and what it takes.

    Args:
        model: the causal LM, in eval mode, on its device.
        item_tokens: where the item tokens lie in its vocabulary.
    """

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        self._item_tokens = item_tokens
        self._modules: weakref.WeakSet[object] = weakref.WeakSet(model.modules())
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._prefixes = DevicePrefixes(self.device)
        # Copies made for the next batch shall not queue behind the kernels of the running one.
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._vocab_size, self._hidden_size = map(int, model.get_input_embeddings().weight.shape)
        self._max_prompt_tokens = max_positions(model.config) - item_tokens.num_levels + 1

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt it takes; the generated positions are already set aside."""
        return self._max_prompt_tokens

    @property
    def vocab_size(self) -> int:
        """V, rows of the input embeddings."""
        return self._vocab_size

    @property
    def hidden_size(self) -> int:
        """H of the input embeddings that a prompt may be given as."""
        return self._hidden_size

    @property
    def modules(self) -> Set[object]:
        """Those of the model that are in memory; they are not kept there."""
        return self._modules

    def get_ready(self, trie: CatalogTrie) -> None:
        """Make what a catalog needs before it is searched; see ``SearchEngine``."""
        self._check_trie(trie)

    def let_go(self, trie: CatalogTrie) -> None:
        """Nothing was made for it; see ``SearchEngine``."""

    def begin(self, prepared: Any, has_left: HasLeft = nobody_left) -> RunningBatch | None:
        """Batches are run whole; see ``SearchEngine``."""
        return None

    def _check_trie(self, trie: CatalogTrie) -> None:
        """Raise ValueError if the trie does not fit the model."""
        if (trie.num_levels, trie.codebook_size) != (
            self._item_tokens.num_levels,
            self._item_tokens.codebook_size,
        ):
            raise ValueError(
                f"the catalog has {trie.num_levels} levels of {trie.codebook_size} codes; the "
                f"model has {self._item_tokens.num_levels} of {self._item_tokens.codebook_size}"
            )

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies made within are complete afterwards, whatever the engine is running."""
        if self._copies is None:
            yield
            return
        with torch.cuda.stream(self._copies):
            yield
        self._copies.synchronize()

    @contextmanager
    def _watching_device(self) -> Iterator[None]:
        """Within, an error that no later call survives becomes an EngineBrokenError."""
        try:
            yield
        except RuntimeError as error:
            self._require_device(error)
            raise

    def _require_device(self, error: Exception) -> None:
        """Raise EngineBrokenError if the error is of the kind that no later call survives.

        Whether it is, the device is asked: torch has a class of its own for what a device reports,
        but who calls the driver himself, as Triton does, raises a bare RuntimeError.
        """
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return
        try:
            torch.zeros(1, dtype=torch.float32, device=self.device).item()
        except torch.OutOfMemoryError:
            return
        except RuntimeError:
            raise EngineBrokenError(str(error)) from error

    def _prompt_fault(
        self, request: SearchRequest, tokens: NDArray[np.int64] | None = None
    ) -> EngineFault | None:
        """What is wrong with a prompt; ``tokens`` are its token ids, where they are at hand."""
        if request.prompt_length > self._max_prompt_tokens:
            return EngineFault(
                f"prompt has {request.prompt_length} tokens; "
                f"the model takes {self._max_prompt_tokens}"
            )
        if request.prompt_embeds is not None:
            found = request.prompt_embeds.shape[1]
            if found == self._hidden_size:
                return None
            return EngineFault(
                f"prompt_embeds have hidden size {found}; the model's is {self._hidden_size}"
            )
        if tokens is not None:
            low, high = int(tokens.min()), int(tokens.max())
        else:
            low, high = min(request.prompt), max(request.prompt)
        if low < 0 or high >= self._vocab_size:
            return EngineFault(
                f"prompt has token ids {low} to {high}; allowed are 0 to {self._vocab_size - 1}"
            )
        return None
