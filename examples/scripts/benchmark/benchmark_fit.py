"""Time to fit an RQ-KMeans tokenizer, and what came of it.

``python -m examples.scripts.benchmark.benchmark_fit [--rows N] [--dim D] [--embeddings FILE.npy]``

Times both ways of fitting on the same rows: ``minibatch``, several passes of
``RQKMeansTokenizer.fit_step`` over mini-batches; and ``fit_rq_kmeans`` in each codebook style.
Checks, in the same run and before printing a time, that codes match a search in float64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rectokens.ops.nearest_reference import nearest_direct
from rectokens.tokenizers.fitting import (
    CODEBOOK_STYLES,
    RQKMeansSettings,
    fit_rq_kmeans,
    quality_report,
)
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer

_CHECKED_ROWS = 256


def clustered_rows(num_rows: int, dim: int, seed: int) -> Tensor:
    """Unit vectors in nested clusters, float32 (num_rows, dim): embeddings have such structure."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=generator) * 0.3
    for clusters in (64, 4096):
        centres = torch.randn(clusters, dim, generator=generator)
        rows += centres[torch.randint(clusters, (num_rows,), generator=generator)]
    return torch.nn.functional.normalize(rows, dim=1)


def check_exact(tokenizer: RQKMeansTokenizer, rows: Tensor) -> None:
    """Every code must be the nearest one in float64.

    Raises:
        RuntimeError: it is not.
    """
    residual = rows[:_CHECKED_ROWS]
    codes = tokenizer.encode(residual).codes
    for level, codebook in enumerate(tokenizer.codebooks):
        if not torch.equal(codes[:, level], nearest_direct(residual, codebook)):
            raise RuntimeError(f"codes of level {level} are not the nearest ones")
        residual = residual - codebook[codes[:, level]]


def main() -> None:
    """Parse arguments, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--passes", type=int, default=5, help="of the mini-batch fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embeddings", type=Path, help="(N, D) .npy file to fit instead")
    arguments = parser.parse_args()

    if arguments.embeddings is not None:
        rows = torch.from_numpy(np.load(arguments.embeddings).astype(np.float32))
    else:
        rows = clustered_rows(arguments.rows, arguments.dim, arguments.seed)
    batches: Sequence[Tensor] = rows.split(arguments.batch_size)
    print(
        f"{rows.shape[0]} x {rows.shape[1]} float32, {arguments.levels} x {arguments.codes} codes, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )

    def minibatch() -> RQKMeansTokenizer:
        tokenizer = RQKMeansTokenizer(
            arguments.levels, arguments.codes, rows.shape[1], seed=arguments.seed
        )
        for _ in range(arguments.passes):
            for batch in batches:
                tokenizer.fit_step(batch)
        return tokenizer

    fits: dict[str, Callable[[], RQKMeansTokenizer]] = {
        f"minibatch, {arguments.passes} passes": minibatch
    }
    for style in CODEBOOK_STYLES:
        settings = RQKMeansSettings(
            arguments.levels, arguments.codes, style=style, seed=arguments.seed
        )
        fits[f"fit_rq_kmeans, {style}"] = partial(fit_rq_kmeans, batches, settings)

    for name, fit in fits.items():
        start, cpu_start = time.perf_counter(), time.process_time()
        tokenizer = fit()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        check_exact(tokenizer, rows)
        report = quality_report(tokenizer, batches)
        errors = ", ".join(f"{error:.3f}" for error in report["reconstruction_error"])
        bits = ", ".join(f"{entropy:.2f}" for entropy in report["entropy_bits"])
        print(
            f"{name:28} {seconds:6.1f} s ({cpu_seconds:.1f} s of CPU)   "
            f"collisions {report['collision_rate']:.2%}   error {errors}   entropy {bits}"
        )


if __name__ == "__main__":
    main()
