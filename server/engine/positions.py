"""How many positions of a model can be relied upon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_UNBOUNDED = 1 << 20


def max_positions(config: Any) -> int:
    """Positions that mean the same whatever else is in the batch.

    Models with the rotary embeddings called longrope turn the positions of **all** prompts of a
    batch another way as soon as one of them is longer than the model was first trained on. A
    prompt would get other keys, and other items, because of its neighbours, and keys that were
    kept would fit no more. Such models are therefore used up to that length.

    Args:
        config: a model's, in transformers' form.
    """
    config = config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", None) or _UNBOUNDED)
    return min([limit, *_lengths_before_the_switch(config)])


def _lengths_before_the_switch(config: Any) -> Iterator[int]:
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    sets = [rope, *(given for given in rope.values() if isinstance(given, Mapping))]
    for given in sets:
        if given.get("rope_type") == "longrope":
            length = given.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            if length:
                yield int(length)
