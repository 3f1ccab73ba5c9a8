"""Whether a model and a catalog belong together."""

from __future__ import annotations

from typing import Protocol

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.model import ModelArtifact, RetrievalSpec


class BoundCatalog(Protocol):
    """What of a catalog decides whether a model can speak of its items."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer that gave the codes."""
        ...

    @property
    def num_levels(self) -> int:
        """L, the extra level included."""
        ...

    @property
    def codebook_size(self) -> int:
        """K."""
        ...


def check_binding(
    model: RetrievalSpec | ModelArtifact,
    catalog: BoundCatalog,
    *,
    allow_other_tokenizer: bool = False,
) -> None:
    """Refuse a model and a catalog that do not belong together.

    Args:
        model: what the model says of its codes.
        catalog: a catalog, or the configuration of one.
        allow_other_tokenizer: accept another tokenizer fingerprint (codes then mean something
            else to the model than to the catalog, unless somebody knows better). Shapes that
            differ are never accepted.

    Raises:
        ArtifactError: number of levels, codebook size or fingerprint differ; names both values.
    """
    spec = model.spec if isinstance(model, ModelArtifact) else model
    problems = [
        f"{name} {ours} of the model is not {theirs} of the catalog"
        for name, ours, theirs in (
            ("num_levels", spec.item_tokens.num_levels, catalog.num_levels),
            ("codebook_size", spec.item_tokens.codebook_size, catalog.codebook_size),
        )
        if ours != theirs
    ]
    if not allow_other_tokenizer and spec.tokenizer_fingerprint != catalog.tokenizer_fingerprint:
        problems.append(
            f"tokenizer fingerprint {spec.tokenizer_fingerprint} of the model is not "
            f"{catalog.tokenizer_fingerprint} of the catalog"
        )
    if problems:
        raise ArtifactError("model and catalog do not belong together: " + "; ".join(problems))
