"""Figures of a training as it runs, in a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rectokens.core.atomic_file import atomic_file

FILE_NAME = "metrics.csv"


class CsvLog(TrainerCallback):
    """Writes ``step,name,value`` rows; a run that goes on drops those its checkpoint is before.

    Args:
        folder: gets ``metrics.csv``.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the file, or cut it to the step of the checkpoint."""
        kept: list[list[str]] = []
        if state.global_step and self._path.exists():
            with open(self._path, newline="", encoding="utf-8") as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == 3]
            kept = [row for row in rows if int(row[0]) <= state.global_step]
        with (
            atomic_file(self._path) as partial,
            open(partial, "w", newline="", encoding="utf-8") as out,
        ):
            csv.writer(out).writerows([["step", "name", "value"], *kept])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the figures."""
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [state.global_step, name, f"{value:.6g}"]
                for name, value in logs.items()
                if isinstance(value, int | float)
            )
