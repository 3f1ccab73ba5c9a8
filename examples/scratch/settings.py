"""Every choice of a training from scratch; each field is a gin parameter of its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rectokens.tokenizers.fitting import CodebookStyle

Softmax = Literal["children", "level"]


@dataclass(frozen=True)
class CodesSettings:
    """How items get their semantic IDs.

    Attributes:
        num_levels, codebook_size: L and K.
        style, separation_dims: see :class:`rectokens.tokenizers.fitting.RQKMeansSettings`.
        behaviour_weight: scale of the vectors from who met what, set beside the text's; 0 leaves
            them out, and then the tokenizer encodes text embeddings alone.
        behaviour_dims: of those vectors.
        item_tok_path: a tokenizer artifact to use instead of fitting one; its input must be the
            vectors that the other fields describe.
    """

    num_levels: int = 3
    codebook_size: int = 256
    style: CodebookStyle = "separating"
    separation_dims: int = 2
    behaviour_weight: float = 0.0
    behaviour_dims: int = 128
    item_tok_path: str | None = None

    def __post_init__(self) -> None:
        _at_least(1, self, "num_levels", "codebook_size", "separation_dims", "behaviour_dims")
        _at_least(0, self, "behaviour_weight")


@dataclass(frozen=True)
class ModelSettings:
    """Shape of the Qwen3 language model and of its prompts.

    Attributes:
        hidden_size: H.
        num_layers, num_heads: each head has keys of its own; H is a multiple of 2 * num_heads.
        intermediate_size: of the feed-forward blocks; 0 for 4 H.
        max_items: newest items of a history in a prompt.
    """

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 0
    max_items: int = 20

    def __post_init__(self) -> None:
        _at_least(1, self, "hidden_size", "num_layers", "num_heads", "max_items")
        _at_least(0, self, "intermediate_size")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of twice num_heads, "
                f"{2 * self.num_heads}"
            )


@dataclass(frozen=True)
class DropoutSettings:
    """What training blanks out; probabilities from 0 to below 1.

    Attributes:
        embedding: of the input embeddings' values.
        layer: of what attention and feed-forward blocks add.
        output: of the last hidden states' values.
        attention: of the attention weights.
        item: of a history item's tokens as a whole, its place kept.
    """

    embedding: float = 0.2
    layer: float = 0.2
    output: float = 0.2
    attention: float = 0.0
    item: float = 0.0

    def __post_init__(self) -> None:
        _share(self, "embedding", "layer", "output", "attention", "item")


@dataclass(frozen=True)
class AugmentationSettings:
    """How histories become training windows, anew in every epoch.

    Attributes:
        crop: chance that a history which fits a window begins at a random item instead of its
            first. Longer ones are cut to windows at random places always.
        thin: chance that a history of more than three items loses items, each with probability
            ``thin_rate``.
        thin_rate: see ``thin``.
        shuffle: chance that a window's items trade places locally.
        shuffle_span: how far: each is moved back by a uniform draw of up to so many places, and
            the order is that of the sums.
        reverse: chance that a window runs backwards.
    """

    crop: float = 0.5
    thin: float = 0.5
    thin_rate: float = 0.0
    shuffle: float = 0.5
    shuffle_span: float = 0.0
    reverse: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop", "thin", "shuffle", "reverse"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are 0 to 1")
        _share(self, "thin_rate")
        _at_least(0, self, "shuffle_span")


@dataclass(frozen=True)
class TeacherSettings:
    """Targets drawn from counts over the training parts, beside the true ones.

    What may follow an item is weighed by how often it did, ``gap_decay ** (gap - 1)`` for every
    ``gap`` up to ``reach``, plus ``text_weight`` shared among the nearest texts by
    ``cosine ** text_power``.

    Attributes:
        weight: of the drawn targets' loss; 0 for a plain language model.
        trunk_weight: of the true targets' loss.
        draws: targets drawn at each place.
        decay: weight of a context's items by their age.
        context: newest items of a context that count.
        reach, gap_decay: see above.
        text_weight, text_neighbours, text_power: see above.
    """

    weight: float = 0.0
    trunk_weight: float = 1.0
    draws: int = 1
    decay: float = 0.5
    context: int = 10
    reach: int = 20
    gap_decay: float = 0.7
    text_weight: float = 20.0
    text_neighbours: int = 50
    text_power: float = 8.0

    def __post_init__(self) -> None:
        _at_least(0, self, "weight", "trunk_weight", "text_weight", "text_power")
        _at_least(1, self, "draws", "context", "reach", "text_neighbours")
        for name in ("decay", "gap_decay"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are above 0 to 1")
        if self.weight == 0 and self.trunk_weight == 0:
            raise ValueError("weight and trunk_weight are both 0; there is nothing to learn")


@dataclass(frozen=True)
class OptimizerSettings:
    """Steps and what they minimise.

    Attributes:
        epochs: of the whole schedule; a seed then fixes every step.
        max_seconds: of training (validation not counted) ends the schedule early, its pace
            adjusted to that; such a run cannot be repeated exactly. None for no limit.
        batch_size: windows in a step.
        peak_lr, warmup_share, final_lr_share: a straight rise to the peak, then half a cosine.
        weight_decay, beta2, clip_norm: of AdamW; norms and biases are not decayed.
        label_smoothing: share of the target given to all codes that are allowed.
        softmax: among whom a code competes: ``children``, those that the catalog has behind the
            prefix, which is the score that is served; ``level``, all K of its level.
        level_weights: of the levels' losses; empty for 1 each.
        ema: decay of the average of the weights that is evaluated and released; 0 for none.
    """

    epochs: int = 100
    max_seconds: float | None = None
    batch_size: int = 512
    peak_lr: float = 2e-3
    warmup_share: float = 0.03
    final_lr_share: float = 0.0
    weight_decay: float = 0.1
    beta2: float = 0.98
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    softmax: Softmax = "children"
    level_weights: tuple[float, ...] = ()
    ema: float = 0.999

    def __post_init__(self) -> None:
        _at_least(1, self, "epochs", "batch_size")
        _at_least(0, self, "weight_decay")
        _share(self, "warmup_share", "label_smoothing", "ema", "beta2")
        for name in ("peak_lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0.0 <= self.final_lr_share <= 1.0:
            raise ValueError(f"final_lr_share is {self.final_lr_share}; allowed are 0 to 1")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds is {self.max_seconds}; it must be above 0")
        if self.softmax not in ("children", "level"):
            raise ValueError(f"softmax is {self.softmax!r}; allowed are children, level")


@dataclass(frozen=True)
class ValidationSettings:
    """When to look at validation users, and when to stop.

    Attributes:
        every_epochs: how often.
        users: whose held-out items are asked for, a seeded sample; None for all.
        beam_width: of the constrained search.
        batch_size: users searched for together.
        patience: rounds without a better Recall@10 after which training ends; 0 never ends it.
    """

    every_epochs: int = 5
    users: int | None = 4000
    beam_width: int = 50
    batch_size: int = 64
    patience: int = 5

    def __post_init__(self) -> None:
        _at_least(1, self, "every_epochs", "batch_size")
        _at_least(20, self, "beam_width")
        _at_least(0, self, "patience")
        if self.users is not None:
            _at_least(1, self, "users")


def _at_least(least: float, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def _share(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is {value}; allowed are 0 to below 1")
