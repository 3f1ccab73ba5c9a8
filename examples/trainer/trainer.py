"""The Hugging Face trainer, with checkpoints that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from examples.trainer.checkpoints import PREFIX, last_checkpoint, mark_whole, unmark
from examples.trainer.csv_log import CsvLog

# Rotation deletes the oldest one while the newest is not yet marked as whole.
KEPT_CHECKPOINTS = 2

assert f"{PREFIX_CHECKPOINT_DIR}-" == PREFIX


class CheckpointedTrainer(Trainer):
    """A trainer that can be stopped at any moment and goes on from its last checkpoint.

    Args:
        args: with ``save_total_limit`` of at least 2.
        run_settings: what makes the run, JSON values; a checkpoint of other ones is refused.
        kwargs: of the trainer.
    """

    def __init__(
        self, *, args: TrainingArguments, run_settings: Mapping[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(args=args, **kwargs)
        self._run_settings = dict(run_settings)
        self.add_callback(CsvLog(Path(args.output_dir)))

    def train_on(self) -> None:
        """Train from the last whole checkpoint of the output folder, or from the beginning.

        Raises:
            CheckpointError: the checkpoint is of a run with other settings.
            OSError: a checkpoint cannot be written; the one before is whole.
        """
        checkpoint = last_checkpoint(Path(self.args.output_dir), self._run_settings)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def write_more(self, checkpoint: Path) -> None:
        """Put into a checkpoint what a subclass needs beside what the trainer writes."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            unmark(folder)
            self.write_more(folder)
            super()._save_checkpoint(model, trial)
            mark_whole(folder, self._run_settings)
        except Exception as error:  # torch, safetensors and Python report a full disk differently
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"the checkpoint {folder} could not be written: {error}; the one before it, if "
                "any, is whole, and the same command goes on from there"
            ) from error


def reports(wandb_project: str | None) -> list[str]:
    """Where figures go beside the CSV file: TensorBoard where installed, W&B on request."""
    if wandb_project is not None:
        os.environ["WANDB_PROJECT"] = wandb_project  # the one way to tell the trainer
    return [
        *(["tensorboard"] if is_tensorboard_available() else []),
        *(["wandb"] if wandb_project is not None else []),
    ]
