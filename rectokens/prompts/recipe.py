"""Which builder a model's prompts come from, and with what settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PromptRecipe:
    """Names a prompt builder and the parameters a model was trained with.

    Stored with the model; :func:`rectokens.prompts.registry.prompt_builder` turns it into the
    builder, which checks the parameters.

    Attributes:
        builder: name of the builder, for example ``"item_history"``.
        version: version of the builder's layout, from 1. A layout never changes under a version
            that has been published; a new layout is a new version.
        params: the builder's parameters, JSON values only; those left out take the defaults of
            that version.

    Raises:
        ValueError: a field of the wrong type, an empty name, or a version below 1.
    """

    builder: str
    version: int
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.builder, str) or not self.builder:
            raise ValueError(f"builder is {self.builder!r}; it must be a non-empty string")
        if isinstance(self.version, bool) or not isinstance(self.version, int) or self.version < 1:
            raise ValueError(f"version is {self.version!r}; it must be an integer of at least 1")
        if not isinstance(self.params, dict) or not all(isinstance(k, str) for k in self.params):
            raise ValueError(f"params is {self.params!r}; it must be an object with string keys")
