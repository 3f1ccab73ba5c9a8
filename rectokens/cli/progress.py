"""Progress bars, on stderr so that stdout stays for results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_stderr = Console(stderr=True)


def say(text: str) -> None:
    """Print one line about the outcome."""
    _stderr.print(text, soft_wrap=True, markup=False, highlight=False)


class Bar(Protocol):
    """Shows how far a command has come."""

    def __call__(self, done: float, description: str | None = None) -> None:
        """Show ``done`` of the total, and what is going on."""
        ...


@contextmanager
def progress_bar(description: str, total: float) -> Iterator[Bar]:
    """A bar that vanishes when the block ends, however it ends; none where nobody would see it.

    Yields:
        A function to call with the work done so far.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_stderr,
        transient=True,
        disable=not _stderr.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=total)

        def show(done: float, description: str | None = None) -> None:
            progress.update(task, completed=done, description=description)

        yield show
