"""A generated shop: items in clusters, and users who move between them with momentum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from server.demo.data import DemoData

# Category -> its subcategories; a subcategory's styles are drawn from the list of its category.
_SHOP: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Makeup": (
        ("Lipstick", "Mascara", "Foundation", "Eye Shadow", "Nail Polish", "Blush"),
        ("Matte", "Glossy", "Shimmer", "Waterproof", "Velvet", "Mineral", "Sheer", "Metallic"),
    ),
    "Skin Care": (
        ("Face Cream", "Cleanser", "Serum", "Sunscreen", "Face Mask", "Toner"),
        ("Hydrating", "Brightening", "Anti-Aging", "Soothing", "Organic", "Purifying", "Firming"),
    ),
    "Hair Care": (
        ("Shampoo", "Conditioner", "Hair Oil", "Styling Gel", "Hair Color", "Hair Mask"),
        ("Volumizing", "Smoothing", "Moisturizing", "Color Safe", "Curl", "Repairing"),
    ),
    "Fragrance": (
        ("Perfume", "Cologne", "Body Mist", "Scented Candle"),
        ("Floral", "Woody", "Citrus", "Vanilla", "Fresh", "Spicy"),
    ),
    "Bath": (
        ("Body Wash", "Bath Salt", "Body Lotion", "Hand Soap", "Body Scrub"),
        ("Lavender", "Coconut", "Oatmeal", "Eucalyptus", "Honey", "Rose"),
    ),
    "Tools": (
        ("Makeup Brush", "Hair Dryer", "Flat Iron", "Tweezers", "Nail File", "Mirror"),
        ("Travel", "Professional", "Compact", "Ceramic", "Bamboo"),
    ),
    "Shaving": (
        ("Razor", "Shaving Cream", "Aftershave", "Beard Oil"),
        ("Classic", "Sensitive", "Menthol", "Sandalwood", "Barber"),
    ),
    "Oral Care": (
        ("Toothbrush", "Toothpaste", "Mouthwash", "Floss"),
        ("Whitening", "Mint", "Gentle", "Charcoal", "Enamel"),
    ),
}
_BRANDS = (
    "Alba", "Brio", "Calla", "Dove Lane", "Elara", "Fenwick", "Gala", "Halcyon", "Iris & Oak",
    "Juno", "Kestrel", "Lumen", "Maren", "Nova", "Oriel", "Petra", "Quill", "Rowan", "Sable",
    "Tansy",
)  # fmt: skip
_NAMES = (
    "Amber", "Birch", "Cedar", "Dawn", "Ember", "Fern", "Glow", "Haze", "Isle", "Jade", "Kiss",
    "Linen", "Mist", "Nectar", "Opal", "Pearl", "Quartz", "Rain", "Silk", "Tide", "Umber", "Violet",
    "Willow", "Zephyr",
)  # fmt: skip

# How far apart the centres of each depth lie, and the items around them.
_SPREAD = {"category": 1.0, "subcategory": 0.8, "style": 0.6, "item": 0.35}
# What a user does next. The rest of the probability is a jump anywhere.
_STAY, _NEIGHBOUR, _SUBCATEGORY = 0.60, 0.22, 0.10


@dataclass(frozen=True, slots=True)
class SyntheticShape:
    """Size of a generated data set.

    Attributes:
        items_per_style: items of each style; the shop has 250 styles.
        num_users: users.
        dim: D, width of the embeddings.
        min_length, mean_length, max_length: of the histories, which are geometric in between.
    """

    items_per_style: int = 12
    num_users: int = 6000
    dim: int = 64
    min_length: int = 3
    mean_length: int = 11
    max_length: int = 60

    def __post_init__(self) -> None:
        for name in ("items_per_style", "num_users", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 3 <= self.min_length < self.mean_length < self.max_length:
            raise ValueError(
                "lengths must satisfy 3 <= min < mean < max; found "
                f"{self.min_length}, {self.mean_length}, {self.max_length}"
            )


@dataclass(frozen=True, slots=True)
class _Style:
    """A leaf of the shop, and where its users tend to go next."""

    category: str
    subcategory: str
    name: str
    rows: tuple[int, ...]


def generate(seed: int = 0, shape: SyntheticShape | None = None) -> DemoData:
    """Generate a data set; the same seed and shape give the same bytes.

    An item's embedding is the sum of random centres of its category, subcategory and style, and
    noise of its own, normalised. A user starts in a random style and mostly stays in it, walking
    along the style's items in their fixed order (momentum: the direction is kept); sometimes the
    user moves on to the neighbouring style, to the sister subcategory, or anywhere. No user meets
    an item twice. Rows are shuffled, so that nothing can be read off an item's number.
    """
    shape = shape or SyntheticShape()
    rng = np.random.default_rng(seed)
    styles, num_items = _shop(shape, rng)
    walk = _Walk(styles, shape, rng)
    texts, metadata = _describe(styles, num_items, rng)
    return DemoData(
        name="generated",
        item_ids=tuple(f"B{row + 1:04d}" for row in range(num_items)),
        texts=texts,
        metadata=metadata,
        embeddings=_embed(styles, num_items, shape.dim, rng),
        sequences=tuple(walk.sequence() for _ in range(shape.num_users)),
    )


def _shop(shape: SyntheticShape, rng: np.random.Generator) -> tuple[list[_Style], int]:
    names = [
        (category, subcategory, style)
        for category, (subcategories, styles) in _SHOP.items()
        for subcategory in subcategories
        for style in styles
    ]
    num_items = len(names) * shape.items_per_style
    rows = rng.permutation(num_items).reshape(len(names), shape.items_per_style)
    return [
        _Style(*name, rows=tuple(int(row) for row in own))
        for name, own in zip(names, rows, strict=True)
    ], num_items


def _describe(
    styles: list[_Style], num_items: int, rng: np.random.Generator
) -> tuple[tuple[str, ...], pl.DataFrame]:
    """Texts and metadata of all items."""
    titles, brands, categories = [""] * num_items, [""] * num_items, [""] * num_items
    for style in styles:
        # Few brands a style, so that a brand says something about an item too.
        own_brands = rng.choice(len(_BRANDS), size=3, replace=False)
        own_names = rng.permutation(len(_NAMES))
        for place, row in enumerate(style.rows):
            brands[row] = _BRANDS[own_brands[place % 3]]
            name = _NAMES[own_names[place % len(_NAMES)]]
            titles[row] = f"{brands[row]} {style.name} {style.subcategory}, {name}"
            categories[row] = f"{style.category} > {style.subcategory} > {style.name}"
    texts = tuple(
        f"title: {title}; brand: {brand}; categories: {category}"
        for title, brand, category in zip(titles, brands, categories, strict=True)
    )
    metadata = pl.DataFrame({"title": titles, "brand": brands, "category": categories})
    return texts, metadata


def _embed(
    styles: list[_Style], num_items: int, dim: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    def centre() -> NDArray[np.float64]:
        return rng.standard_normal(dim)

    category = {style.category: centre() for style in styles}
    subcategory = {style.subcategory: centre() for style in styles}
    embeddings = _SPREAD["item"] * rng.standard_normal((num_items, dim))
    for style in styles:
        embeddings[list(style.rows)] += (
            _SPREAD["category"] * category[style.category]
            + _SPREAD["subcategory"] * subcategory[style.subcategory]
            + _SPREAD["style"] * centre()
        )
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings.astype(np.float32)


class _Walk:
    """Draws users' histories, one after the other."""

    def __init__(
        self, styles: list[_Style], shape: SyntheticShape, rng: np.random.Generator
    ) -> None:
        self._styles = styles
        self._shape = shape
        self._rng = rng
        by_subcategory: dict[str, list[int]] = {}
        for index, style in enumerate(styles):
            by_subcategory.setdefault(style.subcategory, []).append(index)
        # Neighbours lie on a ring inside the subcategory; every subcategory has one sister.
        self._ring = {
            index: (ring[position - 1], ring[(position + 1) % len(ring)])
            for ring in by_subcategory.values()
            for position, index in enumerate(ring)
        }
        rings = list(by_subcategory.values())
        sisters = rng.permutation(len(rings))
        self._sister = {
            index: rings[sisters[number]] for number, ring in enumerate(rings) for index in ring
        }
        # Styles differ in how popular they are, which is what a popularity baseline can use.
        popularity = 1.0 / (1.0 + rng.permutation(len(styles))) ** 0.5
        self._popularity = popularity / popularity.sum()

    def sequence(self) -> tuple[int, ...]:
        """One user's history."""
        shape, rng = self._shape, self._rng
        extra = int(rng.geometric(1.0 / (shape.mean_length - shape.min_length + 1))) - 1
        length = min(shape.min_length + extra, shape.max_length)
        direction = int(rng.choice((-1, 1)))
        style = self._anywhere()
        place = int(rng.integers(shape.items_per_style))
        met: dict[int, None] = {}
        while len(met) < length:
            place, row = self._next_unmet(style, place, direction, met)
            if row is None:
                style = self._anywhere()
                continue
            met[row] = None
            style = self._next_style(style, direction)
        return tuple(met)

    def _next_unmet(
        self, style: int, place: int, direction: int, met: dict[int, None]
    ) -> tuple[int, int | None]:
        """The next item of the style that the user has not met, from ``place`` on."""
        rows = self._styles[style].rows
        # One step along the style's order, now and then two.
        step = direction * (1 if self._rng.random() < 0.8 else 2)
        for turn in range(len(rows)):
            here = (place + step + turn * direction) % len(rows)
            if rows[here] not in met:
                return here, rows[here]
        return place, None

    def _next_style(self, style: int, direction: int) -> int:
        draw = self._rng.random()
        if draw < _STAY:
            return style
        if draw < _STAY + _NEIGHBOUR:
            return self._ring[style][direction > 0]
        if draw < _STAY + _NEIGHBOUR + _SUBCATEGORY:
            return int(self._rng.choice(self._sister[style]))
        return self._anywhere()

    def _anywhere(self) -> int:
        return int(self._rng.choice(len(self._styles), p=self._popularity))
