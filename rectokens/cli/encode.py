"""``rectokens encode``: embeddings to codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rectokens.artifacts.tokenizer import load_tokenizer
from rectokens.catalog.collisions import collision_report
from rectokens.catalog.encode import encode_source
from rectokens.catalog.identical_rows import IdenticalRows
from rectokens.catalog.sources import open_embeddings, require_batch_size, require_width
from rectokens.catalog.tables import require_codes_suffix, write_codes
from rectokens.cli.device import checked_device
from rectokens.cli.progress import progress_bar, say


def encode_command(
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer artifact (a version folder).")],
    embeddings: Annotated[
        Path, typer.Option(help="Embeddings: .npy, .parquet, or a folder of .parquet files.")
    ],
    out: Annotated[Path, typer.Option(help="File to write: .npy (int32) or .parquet.")],
    column: Annotated[
        str | None, typer.Option(help="Parquet column of the embeddings, if there are several.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in memory at a time.")] = 8192,
    device: Annotated[str, typer.Option(help="Where to encode: cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Encode embeddings into codes, one row an item, in the order of the file."""
    require_codes_suffix(out)
    require_batch_size(batch_size)
    target = checked_device(device)
    source = open_embeddings(embeddings, column)
    artifact = load_tokenizer(tokenizer)
    require_width(source, artifact.tokenizer.feature_dim, embeddings)
    identical = IdenticalRows()
    with progress_bar("encoding", source.num_rows) as on_rows:
        codes = encode_source(
            artifact.tokenizer.to(target),
            source,
            num_levels=artifact.tokenizer.num_levels,
            batch_size=batch_size,
            on_rows=on_rows,
            identical=identical,
        )
    write_codes(out, codes)
    figures = {**collision_report(codes), **identical.report()}
    say(
        f"{figures['num_items']:,} items, {figures['num_semantic_ids']:,} semantic IDs, "
        f"collision rate {figures['collision_rate']:.4f} "
        f"(identical embeddings alone: {figures['collision_rate_floor']:.4f})"
    )
    typer.echo(out)
