"""A tokenizer fitted on a source, with a report of how good its codes are."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from rectokens.artifacts.tokenizer import require_sizes, save_tokenizer, tokenizer_fingerprint
from rectokens.catalog.sources import SourceBatches
from rectokens.tokenizers.fitting import (
    FitProgress,
    RQKMeansSettings,
    RQVAETraining,
    fit_rq_kmeans,
    fit_rqvae,
    quality_report,
)
from rectokens.tokenizers.residual import ResidualTokenizer
from rectokens.tokenizers.rqvae import RQVAEConfig
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.params import TrainTokenizerParams
from server.jobs.sources import OpenSource, open_source
from server.jobs.stored import active_config
from server.jobs.types import JobErrorKind, JobFailure


def train_tokenizer(
    params: TrainTokenizerParams, environment: JobEnvironment, reporter: JobReporter
) -> dict[str, Any]:
    """Fit a tokenizer, measure it on what it was fitted on, and put it into the store.

    Returns:
        ``tokenizer``, its version; ``fingerprint``; ``report``, see
        :func:`~rectokens.tokenizers.quality.quality_report`; ``fits_active_model``, whether the
        active model has as many levels and codes (it must be trained for the fingerprint all the
        same), None where no release is active or it cannot be opened; ``seconds``.

    Raises:
        JobFailure, OSError: it cannot be done; nothing is left.
    """
    store = environment.store
    started = time.perf_counter()
    with open_source(params.source, environment.roots, environment.limits) as source:
        batches = SourceBatches(
            source.embeddings, environment.batch_size, lambda _: reporter.check()
        )
        with reporter.stage(0.0, 0.85, f"fitting {params.kind} on {source.name}"):
            tokenizer, settings = _fit(params, source, batches, environment, reporter)
        fit_s = time.perf_counter() - started
        rows = source.embeddings.num_rows
        with reporter.stage(0.85, 0.98, "measuring it"):
            report = quality_report(
                tokenizer,
                SourceBatches(
                    source.embeddings,
                    environment.batch_size,
                    lambda done: reporter.progress(done / rows, "measuring it"),
                ),
            )
    fitted_on = {
        "file": f"{params.source.root}/{params.source.path}",
        "rows": rows,
        "dim": source.embeddings.dim,
        "kind": params.kind,
        "settings": settings,
    }
    reporter.progress(0.98, "saving it")
    path = save_tokenizer(
        store.local.folder("tokenizer"), tokenizer, report=report, fitted_on=fitted_on
    )
    store.publish("tokenizer", path.name)
    reporter.log(
        f"tokenizer {path.name}: collision rate {report['collision_rate']:.4f}, reconstruction "
        f"error {report['reconstruction_error'][-1]:.4f} of the variance"
    )
    return {
        "tokenizer": path.name,
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "report": report,
        "fits_active_model": _fits(tokenizer, environment, reporter),
        "seconds": {
            "fit": round(fit_s, 3),
            "measure": round(time.perf_counter() - started - fit_s, 3),
        },
    }


def _fit(
    params: TrainTokenizerParams,
    source: OpenSource,
    batches: SourceBatches,
    environment: JobEnvironment,
    reporter: JobReporter,
) -> tuple[ResidualTokenizer, dict[str, Any]]:
    def on_progress(progress: FitProgress) -> None:
        loss = "" if progress.loss is None else f", error {progress.loss:.4g}"
        reporter.progress(progress.fraction, f"fitting: {progress.stage}{loss}")

    shape: dict[str, Any] = {
        "num_levels": params.num_levels,
        "codebook_size": params.codebook_size,
    }
    passes = _given(epochs=params.epochs)
    device = environment.device
    if params.kind == "rq-kmeans":
        kmeans = RQKMeansSettings(**shape, **passes, **_given(style=params.style), seed=params.seed)
        fitted = fit_rq_kmeans(batches, kmeans, device=device, on_progress=on_progress)
        return fitted, asdict(kmeans)
    widths = _given(latent_dim=params.latent_dim, hidden_dim=params.hidden_dim)
    require_sizes(input_dim=source.embeddings.dim, **widths)
    model = RQVAEConfig(input_dim=source.embeddings.dim, **shape, **widths)
    steps = _given(learning_rate=params.learning_rate, batch_size=params.train_batch_size)
    training = RQVAETraining(**passes, **steps, seed=params.seed)
    try:
        trained = fit_rqvae(batches, model, training, device=device, on_progress=on_progress)
    except RuntimeError as error:
        if "loss became" not in str(error):
            raise
        raise JobFailure(JobErrorKind.INVALID_PARAMETERS, str(error)) from error
    return trained, asdict(training)


def _fits(
    tokenizer: ResidualTokenizer, environment: JobEnvironment, reporter: JobReporter
) -> bool | None:
    try:
        active = active_config(environment.store)
    except Exception as error:
        # The tokenizer is in the store by now, whatever is wrong with something else there.
        reporter.log(f"cannot tell whether it fits: {type(error).__name__}: {error}")
        return None
    if active is None:
        return None
    levels = active.config.num_levels - (active.config.collision_policy == "extra_level")
    sizes = (tokenizer.num_levels, tokenizer.codebook_size)
    return sizes == (levels, active.config.codebook_size)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
