"""Sixty random items of three levels of five codes, for tests of tiny models."""

from __future__ import annotations

import torch

from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.item_tokens import ItemTokens

LEVELS, CODES, VOCAB = 3, 5, 40
TOKENS = ItemTokens(
    offset=11, level_stride=6, num_levels=LEVELS, codebook_size=CODES, start_token_id=3
)
_CODES = (torch.rand(60, LEVELS, generator=torch.Generator().manual_seed(1)) ** 2 * CODES).long()
TRIE, _ORDER = CatalogTrie.from_codes(_CODES, CODES)
ITEMS = _CODES[_ORDER]
