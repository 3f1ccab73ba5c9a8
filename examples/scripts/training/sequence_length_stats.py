"""Lengths of precomputed samples, to choose ``max_length`` by.

``python -m examples.scripts.training.sequence_length_stats --data_root out/precomputed``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from examples.data.amazon import PrecomputedSequenceDataset

PERCENTILES = (50, 75, 90, 95, 99, 100)


def length_percentiles(dataset: PrecomputedSequenceDataset) -> list[int]:
    """Tokens that so many percent of the samples have at most, for each of ``PERCENTILES``.

    Raises:
        ValueError: no samples.
    """
    if not len(dataset):
        raise ValueError("the file has no samples")
    lengths = [len(sample["input_ids"]) for sample in dataset.samples]
    # An actual length, not one between two.
    return np.percentile(lengths, PERCENTILES, method="higher").astype(int).tolist()


def main(argv: list[str] | None = None) -> None:
    """Print a line for each sample file below a folder; other files are left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_root", type=Path, default=Path(), help="searched for sample files")
    root: Path = parser.parse_args(argv).data_root
    table = Table(title=f"tokens of a sample, in {root}", title_justify="left")
    for heading in ("file", "samples", *(f"{p} %" for p in PERCENTILES)):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    for path in sorted(root.rglob("*.pt")):
        try:
            dataset = PrecomputedSequenceDataset(path)
            percentiles = length_percentiles(dataset)
        except ValueError:
            continue
        name = str(path.relative_to(root))
        table.add_row(name, f"{len(dataset):,}", *(f"{length:,}" for length in percentiles))
    if not table.row_count:
        sys.exit(f"sequence_length_stats: error: {root} holds no sample files (*.pt)")
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    main()
