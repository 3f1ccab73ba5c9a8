"""Train a language model over item tokens from fresh weights, and write a release to serve.

``python -m examples.scripts.training.train_scratch
examples/configs/finetuning/scratch_beauty.gin``; the same command goes on where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gin
import torch

from examples.data.amazon import AmazonReviews
from examples.scratch import settings
from examples.scratch.build import Recipe, RunOptions, train_release
from examples.utils import run

_SETTINGS: dict[str, type] = {
    "codes": settings.CodesSettings,
    "model": settings.ModelSettings,
    "dropout": settings.DropoutSettings,
    "augmentation": settings.AugmentationSettings,
    "teacher": settings.TeacherSettings,
    "optimizer": settings.OptimizerSettings,
    "validation": settings.ValidationSettings,
}
for _class in _SETTINGS.values():
    gin.external_configurable(_class, _class.__name__)


@gin.configurable
def train(
    root: str = "data/amazon",
    split: str = "beauty",
    output_dir: str = gin.REQUIRED,
    seed: int = 0,
    device: str = "auto",
    bf16: bool | None = None,
    save_every: int = 500,
    evaluate_test: bool = True,
    progress_bar: bool = True,
    wandb_project: str | None = None,
    run_name: str | None = None,
) -> Path:
    """Train from scratch; every class of :mod:`examples.scratch.settings` is configurable too.

    Args:
        root, split: of the data, see :class:`examples.data.amazon.AmazonReviews`.
        output_dir: of checkpoints, figures and the artifact store; one folder a run.
        seed: of everything.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        bf16: take steps in bfloat16; None does on CUDA.
        save_every: steps between checkpoints.
        evaluate_test: ask about all test users in the end.
        progress_bar: show one.
        wandb_project, run_name: log to Weights & Biases too.

    Returns:
        The release folder.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on = torch.device(device)
    chosen: dict[str, Any] = {
        name: gin.get_configurable(kind.__name__)() for name, kind in _SETTINGS.items()
    }
    recipe = Recipe(**chosen, seed=seed, bf16=on.type == "cuda" if bf16 is None else bf16)
    options = RunOptions(
        device=on,
        save_every=save_every,
        evaluate_test=evaluate_test,
        wandb_project=wandb_project,
        run_name=run_name,
        progress_bar=progress_bar,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return train_release(AmazonReviews(root, split).data, Path(output_dir), recipe, options)


if __name__ == "__main__":
    run(train)
