"""What is served: a model and a catalog that belong together, loaded and tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import torch

from rectokens.artifacts.binding import check_binding
from rectokens.artifacts.catalog import load_catalog_manifest
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import Manifest, read_manifest
from rectokens.artifacts.model import ModelArtifact, RetrievalSpec, load_model_manifest
from rectokens.artifacts.release import load_release as load_release_manifest
from rectokens.catalog.artifact import load_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.prompts.builder import PromptBuilder
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest
from server.engine.types import MEMORY_ERRORS, EngineBrokenError, EngineFault, SearchEngine
from server.heap import pass_over_imports
from server.threads import share_with_launches

if TYPE_CHECKING:
    from server.engine.device.engine import DeviceEngine
    from server.engine.engine import Engine
    from server.settings import Settings

_log = structlog.get_logger(__name__)

_WARM_UP_BEAM_WIDTH = 8


class ReleaseError(ValueError):
    """A release that cannot be served; the message is all an operator needs."""


@dataclass(frozen=True, eq=False)
class Release:
    """One model with one catalog. Requests hold on to the release they were admitted under.

    Attributes:
        model_name: what callers know it by.
        model_version: of the model artifact.
        created_s: when the model artifact was written, in Unix seconds.
        spec: how the model speaks of items.
        catalog: items and their semantic IDs, on the CPU.
        trie: the catalog's trie, on the engine's device.
        prompts: turns a history into a prompt, as in training.
        engine: the model; used by the engine thread only.
        text_tokenizer: the model's, None for one that has none.
        version: of the release artifact, None for a model and a catalog that were named singly.
        catalog_created_s: when the catalog artifact was written, in Unix seconds, if it is known.
    """

    model_name: str
    model_version: str
    created_s: int
    spec: RetrievalSpec
    catalog: Catalog
    trie: CatalogTrie
    prompts: PromptBuilder
    engine: SearchEngine
    text_tokenizer: Any = None
    version: str | None = None
    catalog_created_s: int | None = None


ReleaseLoader = Callable[[], Release]


def load_release(settings: Settings) -> Release:
    """Load what the settings name, check that it belongs together, and try it.

    Cheap checks come first: a mismatch is found before the weights are read.

    Raises:
        ReleaseError: nothing or too much is named, an artifact is missing or damaged, model and
            catalog do not belong together, the recipe is unknown, or the model cannot search.
    """
    model_path, catalog_path = release_paths(settings)
    release = load_parts(settings, model_path, catalog_path)
    warm_up(release)
    return release


def load_parts(
    settings: Settings,
    model_path: Path,
    catalog_path: Path,
    *,
    version: str | None = None,
    beside: Release | None = None,
) -> Release:
    """Load a model and a catalog, without searching yet.

    Args:
        settings: of the service.
        model_path: folder of the model.
        catalog_path: folder of the catalog.
        version: of the release that names the two.
        beside: a release that is loaded; its model is kept where it is the same, and nothing of
            the model is read then.

    Raises:
        ReleaseError: see :func:`load_release`.
    """
    if settings.device == "cuda":
        require_gpu()
    try:
        return _load(settings, model_path, catalog_path, version, beside)
    except ReleaseError:
        raise
    except (ValueError, OSError) as error:
        # ArtifactError and the loaders' own errors name the file and the values.
        raise ReleaseError(str(error)) from error
    except MEMORY_ERRORS as error:
        raise ReleaseError(f"the release needs more memory than there is now: {error}") from error


def require_gpu() -> None:
    """Refuse to go on without a GPU.

    Raises:
        ReleaseError: there is none.
    """
    if not torch.cuda.is_available():
        raise ReleaseError("--device is cuda, but torch finds no GPU; use auto or cpu")


def release_paths(settings: Settings) -> tuple[Path, Path]:
    """Folders of the model and of the catalog that the settings name.

    Raises:
        ReleaseError: nothing or too much is named, or the release is damaged.
    """
    if settings.release is not None:
        if settings.model is not None or settings.catalog is not None:
            raise ReleaseError(
                "--release names the model and the catalog; do not give --model or --catalog too"
            )
        try:
            release = load_release_manifest(settings.release)
        except (ArtifactError, OSError) as error:
            raise ReleaseError(str(error)) from error
        return release.model_path, release.catalog_path
    if settings.model is None or settings.catalog is None:
        raise ReleaseError("nothing to serve; give --model and --catalog, or --release")
    return settings.model, settings.catalog


def _load(
    settings: Settings,
    model_path: Path,
    catalog_path: Path,
    version: str | None,
    beside: Release | None,
) -> Release:
    kept = beside is not None and read_manifest(model_path).version == beside.model_version
    model = load_model_manifest(model_path, verify_checksums=not kept)
    artifact = load_catalog_manifest(catalog_path, verify_checksums=False)
    config, made_s = artifact.config, _created_s(artifact.manifest)
    check_binding(model, config, allow_other_tokenizer=settings.allow_mismatch)
    if model.spec.tokenizer_fingerprint != config.tokenizer_fingerprint:
        _log.warning("serving a catalog of another tokenizer, as allow_mismatch says")
    catalog = load_catalog(catalog_path)
    catalog.codes_of([])  # makes their table, which no request shall wait for
    if kept and beside is not None:
        trie = catalog.trie.to(beside.trie.device)
        return replace(
            beside, catalog=catalog, trie=trie, version=version, catalog_created_s=made_s
        )
    text_tokenizer = load_text_tokenizer(model)
    engine, prompts = _load_model(settings, model, text_tokenizer)
    return Release(
        model_name=settings.model_name,
        model_version=model.manifest.version,
        created_s=_created_s(model.manifest),
        spec=model.spec,
        catalog=catalog,
        trie=catalog.trie.to(engine.device),
        prompts=prompts,
        engine=engine,
        text_tokenizer=text_tokenizer,
        version=version,
        catalog_created_s=made_s,
    )


def _created_s(manifest: Manifest) -> int:
    return int(datetime.fromisoformat(manifest.created).timestamp())


def _load_model(
    settings: Settings, model: ModelArtifact, text_tokenizer: Any
) -> tuple[Engine | DeviceEngine, PromptBuilder]:
    """The model on its device, and the prompt builder that its recipe names."""
    # Here, because transformers takes seconds that a refused release should not cost.
    from transformers.utils import logging as transformers_logging

    from server.engine.device.buckets import Buckets
    from server.engine.device.engine import DeviceOptions
    from server.engine.loading import load_engine
    from server.engine.pool_setup import PoolOptions

    pass_over_imports()
    # Its bars would stand between the log's JSON lines.
    transformers_logging.disable_progress_bar()
    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    prompts = prompt_builder(model.spec.prompt, model.spec.item_tokens, text_tokenizer)
    given = settings.engine
    memory_mib = given.kv_memory_mib
    pool = PoolOptions(
        memory_bytes=None if memory_mib is None else memory_mib << 20,
        page_tokens=given.kv_page_tokens,
        model_version=model.manifest.version,
        keep=given.prefix_cache,
    )
    buckets = Buckets(given.captured_requests, given.captured_beam_widths, given.captured_rows)
    engine = load_engine(
        model.path,
        model.spec.item_tokens,
        device=settings.device,
        dtype=settings.dtype,
        pool=pool,
        device_options=DeviceOptions(buckets, capture=given.capture, fp8=given.fp8),
    )
    share_with_launches(engine.device)
    return engine, prompts


def warm_up(release: Release) -> None:
    """Answer the start prompt once, so that a model that cannot search never becomes ready.

    Only for an engine that nobody uses yet.

    Raises:
        ReleaseError: the search failed.
        EngineBrokenError: the device does not work any more.
    """
    try:
        (result,) = release.engine.search([start_request(release)], release.trie).results
    except EngineBrokenError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ReleaseError(f"the model cannot search the catalog: {reason}") from error
    if isinstance(result, EngineFault):
        raise ReleaseError(f"the model cannot search the catalog: {result.message}")


def start_request(release: Release) -> SearchRequest:
    """The narrow search for the start prompt that a release is tried with."""
    return SearchRequest(
        prompt=release.prompts.build(()).token_ids,
        beam_width=_WARM_UP_BEAM_WIDTH,
        top_k=1,
    )


def load_text_tokenizer(model: ModelArtifact) -> Any:
    """The model's text tokenizer, None where its folder holds none."""
    if "tokenizer.json" not in model.manifest.files:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path, local_files_only=True)
