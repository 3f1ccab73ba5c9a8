"""A store with one tiny model and any number of small catalogs, told apart by their item ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch

from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release_store import ReleaseStore
from rectokens.artifacts.tokenizer import save_tokenizer, tokenizer_fingerprint
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer

LEVELS, CODES, DIM = 3, 8, 6
TOKENS = ItemTokens(
    offset=4,
    level_stride=CODES,
    num_levels=LEVELS,
    codebook_size=CODES,
    start_token_id=28,
    end_token_id=29,
)


@dataclass
class SmallStore:
    """Releases by number; release n has items ``n-0``, ``n-1``, ...

    Attributes:
        root: its folder.
        store: of it.
        model: version of the first model.
        releases: by number.
        catalogs: by number.
    """

    root: Path
    store: ReleaseStore
    fingerprint: str
    tokenizer: str
    model: str = ""
    releases: dict[int, str] = field(default_factory=dict)
    catalogs: dict[int, str] = field(default_factory=dict)

    def add_model(self, lm: Any) -> str:
        """Write a model; its version."""
        recipe = PromptRecipe("item_history", 1, {"max_items": 8})
        spec = RetrievalSpec(self.fingerprint, TOKENS, recipe)
        return save_model(self.root / "models", lm, spec).name

    def add(
        self,
        number: int,
        items: int = 40,
        model: str | None = None,
        *,
        ids: list[str] | None = None,
        constraint_sets: dict[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Write a catalog and its release; the release's version."""
        generator = torch.Generator().manual_seed(number)
        ids = ids or [f"{number}-{row}" for row in range(items)]
        catalog = build_catalog(
            ids,
            torch.randint(0, CODES, (len(ids), LEVELS), generator=generator),
            codebook_size=CODES,
            tokenizer_fingerprint=self.fingerprint,
            metadata=pl.DataFrame({"stock": [row % 5 for row in range(len(ids))]}),
            constraint_sets=constraint_sets or {"even": ids[::2]},
            **kwargs,
        )
        folder = save_catalog(self.root / "catalogs", catalog, tokenizer_version=self.tokenizer)
        self.catalogs[number] = folder.name
        self.releases[number] = self.store.bind(model or self.model, folder.name)
        return self.releases[number]

    def activate(self, number: int) -> str:
        """Make a release active; its version."""
        return self.store.activate(self.releases[number]).release


def make_store(root: Path, lm: Any) -> SmallStore:
    """A store with a tokenizer, a model and release 1, which is active."""
    tokenizer = RQKMeansTokenizer(num_levels=LEVELS, codebook_size=CODES, dim=DIM, seed=1)
    tokenizer.fit_step(torch.randn(100, DIM, generator=torch.Generator().manual_seed(0)))
    saved = save_tokenizer(
        root / "tokenizers", tokenizer, report={"p_unique": 0.9}, fitted_on={"rows": 100}
    )
    small = SmallStore(root, open_release_store(root), tokenizer_fingerprint(tokenizer), saved.name)
    small.model = small.add_model(lm)
    small.add(1)
    small.activate(1)
    return small
