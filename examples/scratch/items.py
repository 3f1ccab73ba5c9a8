"""From a data set to semantic IDs and a catalog, stored as artifacts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.data.item_vectors import item_vectors
from examples.scratch.settings import CodesSettings
from rectokens.artifacts.store import ArtifactStore
from rectokens.artifacts.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from rectokens.catalog.artifact import load_catalog, save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.core.atomic_file import atomic_file
from rectokens.tokenizers.fitting import RQKMeansSettings, fit_rq_kmeans
from rectokens.tokenizers.quality import quality_report
from server.demo.data import DemoData, item_counts

_NOTE = "items.json"


@dataclass(frozen=True, eq=False)
class CodedItems:
    """Items with their semantic IDs.

    Attributes:
        codes: int64 (N, L), row r being the data's.
        catalog: of all items, ordered in a leaf by training count.
        catalog_version, tokenizer_version, fingerprint: of the artifacts.
        report: quality of the codes, see :func:`rectokens.tokenizers.quality.quality_report`.
    """

    codes: Tensor
    catalog: Catalog
    catalog_version: str
    tokenizer_version: str
    fingerprint: str
    report: dict[str, Any]


def code_items(
    data: DemoData,
    train: tuple[tuple[int, ...], ...],
    settings: CodesSettings,
    seed: int,
    root: Path,
) -> CodedItems:
    """Fit or load a tokenizer, encode all items, and write tokenizer and catalog to a store.

    What an earlier call with the same arguments wrote is taken as it is: with other threads or
    on another machine a fit differs in its last digits, and a run that goes on must not.

    Args:
        data: items and their text embeddings.
        train: training parts of the histories; nothing held out is looked at.
        settings: how.
        seed: of fitting.
        root: of the artifact store; the folder above it remembers what was made.

    Raises:
        ArtifactError: ``item_tok_path`` is no tokenizer artifact.
        ValueError: the tokenizer takes vectors of another width, or has other levels or codes
            than the settings say.
    """
    store = ArtifactStore(root)
    note = root.parent / _NOTE
    made_from = {
        "data": data.name,
        "items": len(data.item_ids),
        "users": len(train),
        "seed": seed,
        **asdict(settings),
    }
    if note.exists():
        earlier = json.loads(note.read_text(encoding="utf-8"))
        if earlier["made_from"] == made_from:
            return _load(data, store, earlier)
    vectors = item_vectors(
        data.embeddings,
        train,
        behaviour_weight=settings.behaviour_weight,
        behaviour_dims=settings.behaviour_dims,
        seed=seed,
    )
    fitted_on: dict[str, Any] = {
        "data": data.name,
        "items": len(data.item_ids),
        "seed": seed,
        "behaviour_weight": settings.behaviour_weight,
    }
    if settings.item_tok_path is None:
        tokenizer: Any = fit_rq_kmeans(
            [vectors],
            RQKMeansSettings(
                num_levels=settings.num_levels,
                codebook_size=settings.codebook_size,
                style=settings.style,
                separation_dims=settings.separation_dims,
                seed=seed,
            ),
        )
    else:
        artifact = load_tokenizer(Path(settings.item_tok_path))
        tokenizer, fitted_on = artifact.tokenizer, artifact.fitted_on
        _require_fit(tokenizer, vectors, settings)
    report = quality_report(tokenizer, [vectors])
    with torch.inference_mode():
        codes = tokenizer.encode(vectors).codes.long().clone()
    saved = save_tokenizer(store.folder("tokenizer"), tokenizer, report=report, fitted_on=fitted_on)
    fingerprint = tokenizer_fingerprint(tokenizer)
    catalog = build_catalog(
        data.item_ids,
        codes,
        codebook_size=settings.codebook_size,
        tokenizer_fingerprint=fingerprint,
        prior=item_counts(train, len(data.item_ids)).tolist(),
        metadata=data.metadata,
    )
    catalog_path = save_catalog(store.folder("catalog"), catalog, tokenizer_version=saved.name)
    with atomic_file(note) as partial:
        versions = {"tokenizer": saved.name, "catalog": catalog_path.name}
        partial.write_text(json.dumps({"made_from": made_from, **versions}), encoding="utf-8")
    return CodedItems(codes, catalog, catalog_path.name, saved.name, fingerprint, report)


def _load(data: DemoData, store: ArtifactStore, versions: dict[str, str]) -> CodedItems:
    """What was written before.

    Raises:
        ArtifactError: it is damaged or gone.
        ValueError: it is of other items.
    """
    tokenizer = load_tokenizer(store.path("tokenizer", versions["tokenizer"]))
    catalog = load_catalog(store.path("catalog", versions["catalog"]))
    index = catalog.index_of(list(data.item_ids))
    if bool((index < 0).any()):
        missing = data.item_ids[int((index < 0).nonzero()[0])]
        raise ValueError(f"the catalog of this run has no item {missing!r}, which the data names")
    return CodedItems(
        catalog.codes_of(index).long(),
        catalog,
        versions["catalog"],
        versions["tokenizer"],
        tokenizer.fingerprint,
        tokenizer.report,
    )


def _require_fit(tokenizer: Any, vectors: Tensor, settings: CodesSettings) -> None:
    sizes = (tokenizer.num_levels, tokenizer.codebook_size)
    wanted = (settings.num_levels, settings.codebook_size)
    if sizes != wanted:
        raise ValueError(
            f"the tokenizer {settings.item_tok_path} has {sizes[0]} levels of {sizes[1]} codes; "
            f"the settings say {wanted[0]} of {wanted[1]}"
        )
    if tokenizer.feature_dim != vectors.shape[1]:
        raise ValueError(
            f"the tokenizer {settings.item_tok_path} takes vectors of {tokenizer.feature_dim} "
            f"dimensions; the items have {vectors.shape[1]}"
        )
