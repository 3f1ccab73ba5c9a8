"""Sources of jobs: a name of a registered folder and a path below it, never a path by itself."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.files import require_plain_name
from rectokens.catalog.item_table import ItemTable, read_item_table
from rectokens.catalog.source_limits import (
    SourceLimits,
    check_embedding_limits,
    check_table_limits,
)
from rectokens.catalog.source_snapshot import SourceSnapshot
from rectokens.catalog.sources import EmbeddingSource, ParquetEmbeddings, open_embeddings
from server.jobs.params import COMMAND_ROOT, EmbeddingSourceParams, ItemSourceParams
from server.jobs.types import JobErrorKind, JobFailure

_EMBEDDING_SUFFIXES = (".parquet", ".npy")
# Without .gz, whose content may be a thousand times its size.
_TABLE_SUFFIXES = (".parquet", ".txt", ".csv", ".jsonl", ".ndjson")


@dataclass(frozen=True, eq=False)
class OpenSource:
    """A source whose files were looked at and may be read.

    Attributes:
        embeddings: to be read in batches, as often as need be.
        name: for messages: ``root/path``; of a file on the command line the path as given.
        items: ids and what stands beside them; None where only embeddings were asked for.
    """

    embeddings: EmbeddingSource
    name: str
    items: ItemTable | None


@contextmanager
def open_source(
    params: EmbeddingSourceParams, roots: Mapping[str, Path], limits: SourceLimits
) -> Iterator[OpenSource]:
    """Open a source for the length of a block; at its end the files must be as they were.

    Raises:
        JobFailure: of kind ``invalid_source``: an unknown root, a path that leaves it, a file
            that is missing, too large, damaged, of another shape or type than it should be, or
            that changed meanwhile. A ``ValueError`` raised in the block becomes one, too.
    """
    name = _shown_root(params.root, roots) + params.path
    try:
        files = _files(_resolve(roots, params.root, params.path), _EMBEDDING_SUFFIXES)
        ids = None
        if isinstance(params, ItemSourceParams) and params.ids is not None:
            ids = _resolve(roots, params.root, params.ids)
            _files(ids, _TABLE_SUFFIXES)
        snapshot = SourceSnapshot.take([*files, *([] if ids is None else [ids])])
        try:
            yield _open(params, files, ids, name, limits)
        except (ValueError, OSError):
            # What could not be read may have been neither the old file nor the new.
            snapshot.require_unchanged()
            raise
        snapshot.require_unchanged()
    except ArtifactError:
        raise
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # not about a file that was named here, so about the disk
        raise JobFailure(JobErrorKind.INVALID_SOURCE, _explain(error, params, roots)) from error


def _open(
    params: EmbeddingSourceParams,
    files: list[Path],
    ids: Path | None,
    name: str,
    limits: SourceLimits,
) -> OpenSource:
    check_embedding_limits(files, limits, params.column)
    embeddings: EmbeddingSource
    if files[0].suffix == ".parquet":
        embeddings = ParquetEmbeddings(files, params.column)
        leave_out = [embeddings.column]
    else:
        embeddings = open_embeddings(files[0])
        leave_out = []
    if not isinstance(params, ItemSourceParams):
        return OpenSource(embeddings, name, None)
    if ids is None and files[0].suffix != ".parquet":
        raise ValueError(f"{name} holds no item ids; name the file that does (ids)")
    if ids is not None:
        check_table_limits(ids, limits)
        leave_out = []
    items = read_item_table(
        files if ids is None else [ids],
        id_column=params.id_column,
        prior_column=params.prior_column,
        metadata_columns=params.metadata_columns,
        leave_out=leave_out,
    )
    if len(items.item_ids) != embeddings.num_rows:
        raise ValueError(
            f"{name} has {embeddings.num_rows:,} embeddings, but there are "
            f"{len(items.item_ids):,} item ids"
        )
    return OpenSource(embeddings, name, items)


def _resolve(roots: Mapping[str, Path], root_name: str, relative: str) -> Path:
    """A file or folder below a registered root, links followed.

    Raises:
        ValueError: an unknown root, a name that is not plain, a link that leads out.
        OSError: it is missing.
    """
    if root_name not in roots:
        known = ", ".join(map(repr, sorted(roots))) or "none"
        raise ValueError(f"source root is {root_name!r}; registered are {known}")
    try:
        require_plain_name(relative, "source")
    except ArtifactError as error:
        raise ValueError(str(error)) from error
    root = roots[root_name].resolve()
    try:
        path = (root / relative).resolve(strict=True)
    except RuntimeError as error:  # a loop
        raise ValueError(f"source {relative!r} is a link that leads nowhere") from error
    if not path.is_relative_to(root) or path == root:
        raise ValueError(f"source {relative!r} is a link that leads out of root {root_name!r}")
    return path


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The regular files that a source is.

    Raises:
        ValueError: another suffix, no files, a file that is not regular.
    """
    folder = path.is_dir()
    files = sorted(path.glob("*.parquet")) if folder else [path]
    if not files:
        raise ValueError(f"{path} is a folder without .parquet files")
    for file in files:
        if file.suffix not in suffixes:
            raise ValueError(
                f"{file.name} ends in {file.suffix!r}; allowed are {', '.join(suffixes)}"
            )
        # A link inside a folder could lead anywhere, so none is followed there.
        if not stat.S_ISREG((file.lstat() if folder else file.stat()).st_mode):
            raise ValueError(f"{file} is not a regular file")
    return files


def _explain(error: Exception, params: EmbeddingSourceParams, roots: Mapping[str, Path]) -> str:
    """The message, with the name of the root in place of where it lies."""
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror or error}"
    else:
        text = str(error)
    root = roots.get(params.root)
    if root is not None:
        shown = _shown_root(params.root, roots)
        for spelled in {str(root.resolve()), str(root.absolute())} - {"/"}:
            text = text.replace(f"{spelled}/", shown).replace(spelled, shown.rstrip("/") or ".")
    return " ".join(text.split())


def _shown_root(name: str, roots: Mapping[str, Path]) -> str:
    """What stands for a root before the path of a file in messages, with the slash between."""
    if name != COMMAND_ROOT or name not in roots:
        return name + "/"
    # Whoever gave the command knows the file by the path that it named.
    return os.path.join(roots[name], "") if roots[name] != Path() else ""
