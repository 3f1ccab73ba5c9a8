"""``rectokens fit``: embeddings to a tokenizer artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rectokens.artifacts.tokenizer import require_sizes, save_tokenizer
from rectokens.catalog.sources import SourceBatches, open_embeddings, require_batch_size
from rectokens.cli.device import checked_device
from rectokens.cli.progress import progress_bar, say
from rectokens.tokenizers.fitting import (
    CodebookStyle,
    FitProgress,
    RQKMeansSettings,
    RQVAETraining,
    fit_rq_kmeans,
    fit_rqvae,
    quality_report,
)
from rectokens.tokenizers.residual import ResidualTokenizer
from rectokens.tokenizers.rqvae import RQVAEConfig

Kind = Literal["rq-kmeans", "rqvae"]

_KMEANS = RQKMeansSettings()
_RQVAE = RQVAETraining()
_MODEL = RQVAEConfig(input_dim=1)


def fit_command(
    embeddings: Annotated[
        Path, typer.Option(help="Embeddings: .npy, .parquet, or a folder of .parquet files.")
    ],
    out: Annotated[Path, typer.Option(help="Folder in which the version folder is made.")],
    kind: Annotated[Kind, typer.Option(help="Kind of tokenizer.")] = "rq-kmeans",
    num_levels: Annotated[int, typer.Option(help="Codes of a semantic ID.")] = 3,
    codebook_size: Annotated[int, typer.Option(help="Codes to choose from at each level.")] = 256,
    epochs: Annotated[
        int | None,
        typer.Option(help=f"Passes; default {_KMEANS.epochs} (rq-kmeans), {_RQVAE.epochs} (rqvae)"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of every random draw.")] = 42,
    style: Annotated[
        CodebookStyle | None,
        typer.Option(help=f"rq-kmeans: how codebooks are fitted; default {_KMEANS.style}"),
    ] = None,
    latent_dim: Annotated[
        int | None,
        typer.Option(help=f"rqvae: width that is quantized; default {_MODEL.latent_dim}"),
    ] = None,
    hidden_dim: Annotated[
        int | None,
        typer.Option(help=f"rqvae: width of inner layers; default {_MODEL.hidden_dim}"),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"rqvae: of Adam; default {_RQVAE.learning_rate}")
    ] = None,
    train_batch_size: Annotated[
        int | None, typer.Option(help=f"rqvae: rows of a step; default {_RQVAE.batch_size}")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Parquet column of the embeddings, if there are several.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows read at a time.")] = 8192,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Fit a tokenizer and measure it on the same embeddings."""
    kmeans_only = {"style": style}
    rqvae_only = {
        "latent_dim": latent_dim,
        "hidden_dim": hidden_dim,
        "learning_rate": learning_rate,
        "train_batch_size": train_batch_size,
    }
    _refuse_options_of_the_other(kind, rqvae_only if kind == "rq-kmeans" else kmeans_only)
    require_sizes(num_levels=num_levels, codebook_size=codebook_size)
    require_batch_size(batch_size)
    target = checked_device(device)
    source = open_embeddings(embeddings, column)
    batches = SourceBatches(source, batch_size)

    shape: dict[str, Any] = {"num_levels": num_levels, "codebook_size": codebook_size}
    passes = _given(epochs=epochs)
    tokenizer: ResidualTokenizer
    settings: dict[str, Any]
    with progress_bar("fitting", 1.0) as show:

        def on_progress(progress: FitProgress) -> None:
            loss = "" if progress.loss is None else f", error {progress.loss:.4g}"
            show(progress.fraction, f"fitting: {progress.stage}{loss}")

        if kind == "rq-kmeans":
            kmeans = RQKMeansSettings(**shape, **passes, **_given(style=style), seed=seed)
            settings = asdict(kmeans)
            tokenizer = fit_rq_kmeans(batches, kmeans, device=target, on_progress=on_progress)
        else:
            widths = _given(latent_dim=latent_dim, hidden_dim=hidden_dim)
            require_sizes(input_dim=source.dim, **widths)
            model = RQVAEConfig(input_dim=source.dim, **shape, **widths)
            steps = _given(learning_rate=learning_rate, batch_size=train_batch_size)
            training = RQVAETraining(**passes, **steps, seed=seed)
            settings = asdict(training)
            tokenizer = fit_rqvae(batches, model, training, device=target, on_progress=on_progress)

    with progress_bar("measuring", source.num_rows) as show:
        report = quality_report(tokenizer, SourceBatches(source, batch_size, on_rows=show))
    fitted_on = {
        "file": embeddings.name,
        "rows": source.num_rows,
        "dim": source.dim,
        "kind": kind,
        "settings": settings,
    }
    path = save_tokenizer(out, tokenizer, report=report, fitted_on=fitted_on)
    say(
        f"tokenizer {path.name}: {num_levels} levels of {codebook_size} codes, "
        f"collision rate {report['collision_rate']:.4f} "
        f"(identical embeddings alone: {report['collision_rate_floor']:.4f}), "
        f"reconstruction error {report['reconstruction_error'][-1]:.4f} of the variance"
    )
    typer.echo(path)


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the rest keep the defaults of whoever takes them."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse_options_of_the_other(kind: Kind, options: dict[str, Any]) -> None:
    for name in _given(**options):
        raise ValueError(f"--{name.replace('_', '-')} does not apply to --kind {kind}")
