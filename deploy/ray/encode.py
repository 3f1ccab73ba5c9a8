"""Encode a large Parquet catalog on many workers of a Ray cluster.

    python -m deploy.ray.encode --tokenizer STORE/tokenizers/VERSION --embeddings FOLDER \
        --copy item_id --out RUN --workers 16 --gpus-per-worker 1
    python -m rectokens build-catalog --tokenizer STORE/tokenizers/VERSION \
        --ids RUN/codes.parquet --codes RUN/codes.parquet --column codes --out STORE/catalogs

All nodes must see the three folders by the same paths. A run that was interrupted goes on when the
command is given again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.ray.encode_pieces import (
    EncodeError,
    Piece,
    Plan,
    claim_folder,
    encode_piece,
    join_pieces,
    make_plan,
)
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.tokenizer import load_tokenizer
from rectokens.cli.device import checked_device
from rectokens.cli.progress import progress_bar, say

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Encoder:
    """One worker: loads the tokenizer once, then encodes pieces.

    Args:
        tokenizer: folder of the artifact.
        plan: of the run.
        out: folder of the run.
        batch_size: rows at a time.
        device: where to encode.
    """

    def __init__(
        self, tokenizer: Path, plan: Plan, out: Path, batch_size: int, device: str
    ) -> None:
        self._artifact = load_tokenizer(tokenizer)
        self._artifact.tokenizer.to(checked_device(device))
        self._plan, self._out, self._batch_size = plan, out, batch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode one piece; its rows, and what is wrong with them, if anything is."""
        piece = self._plan.pieces[int(row["piece"])]
        try:
            encode_piece(self._artifact, self._plan, piece, self._out, self._batch_size)
        except EncodeError as error:
            # Ray would try again, and tell a traceback.
            return {"rows": piece.rows, "error": str(error)}
        return {"rows": piece.rows, "error": ""}


def encode_on_ray(
    tokenizer: Path,
    plan: Plan,
    missing: list[Piece],
    out: Path,
    *,
    workers: int,
    batch_size: int = 8_192,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
) -> None:
    """Encode pieces on workers of the Ray cluster that this process is connected to.

    A worker that dies is replaced, and its piece encoded again.

    Raises:
        EncodeError: a piece that cannot be encoded; the others are done or left.
    """
    import ray

    dataset = ray.data.from_items(
        [{"piece": piece.index} for piece in missing], override_num_blocks=len(missing)
    ).map(
        Encoder,
        fn_constructor_args=(
            tokenizer.absolute(),
            plan,
            out.absolute(),
            batch_size,
            "cuda" if gpus_per_worker else "cpu",
        ),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(missing))),
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker or None,
    )
    with progress_bar("encoding", sum(piece.rows for piece in missing)) as on_rows:
        done = 0
        for row in dataset.iter_rows():
            if row["error"]:
                raise EncodeError(row["error"])
            done += int(row["rows"])
            on_rows(done)


@app.command()
def main(
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer artifact (a version folder).")],
    embeddings: Annotated[Path, typer.Option(help="A .parquet file, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the result is codes.parquet.")],
    column: Annotated[
        str | None, typer.Option(help="Column of the embeddings, if there are several.")
    ] = None,
    copy: Annotated[
        list[str] | None,
        typer.Option(help="Column that goes into the result: item ids, priors, metadata."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Most workers.")] = 4,
    cpus_per_worker: Annotated[float, typer.Option(min=0.0, help="CPUs of each.")] = 1.0,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0.0, help="GPUs of each; with any, it encodes there.")
    ] = 0.0,
    rows_per_piece: Annotated[
        int, typer.Option(min=1, help="Rows encoded as one task, in whole row groups.")
    ] = 262_144,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in memory at a time.")] = 8_192,
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; default the one of this machine.")
    ] = None,
) -> None:
    """Encode embeddings into codes on a Ray cluster, one row an item, in the order of the rows."""
    try:
        artifact = load_tokenizer(tokenizer)
        plan = make_plan(
            embeddings, artifact, column=column, copied=copy or (), rows_per_piece=rows_per_piece
        )
        missing = claim_folder(plan, out)
        if missing:
            import ray

            ray.init(address=address, log_to_driver=False)
            try:
                encode_on_ray(
                    tokenizer,
                    plan,
                    missing,
                    out,
                    workers=workers,
                    batch_size=batch_size,
                    cpus_per_worker=cpus_per_worker,
                    gpus_per_worker=gpus_per_worker,
                )
            finally:
                ray.shutdown()
        with progress_bar("joining", plan.rows) as on_rows:
            result = join_pieces(plan, out, on_rows)
    except (EncodeError, ArtifactError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    say(f"{plan.rows:,} rows in {len(plan.pieces):,} pieces")
    typer.echo(result)


if __name__ == "__main__":
    sys.exit(app())
