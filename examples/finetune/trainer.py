"""Fine-tuning on samples, judged by constrained search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from examples.trainer.trainer import KEPT_CHECKPOINTS, CheckpointedTrainer, reports

# What the trainer adds to figures: eval_runtime, eval_samples_per_second, eval_steps_per_second.
_TIMES = ("runtime", "samples", "steps")

Judge = Callable[[Any], Mapping[str, float]]


class FinetuneTrainer(CheckpointedTrainer):
    """A trainer whose evaluations tell perplexity and constrained recall too.

    Args:
        judge: figures of the model as it stands, added to each evaluation's; None adds none.
        patience: evaluations without a better Recall@10 (without a judge: loss) after which
            training ends; 0 never ends it.
        kwargs: of :class:`~examples.trainer.trainer.CheckpointedTrainer`.
    """

    def __init__(self, *, judge: Judge | None = None, patience: int = 0, **kwargs: Any) -> None:
        self._judge = judge
        super().__init__(**kwargs)
        if patience > 0:
            self.add_callback(EarlyStoppingCallback(early_stopping_patience=patience))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss, its perplexity, and the judge's figures."""
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        metrics = output.metrics
        loss = metrics.get(f"{metric_key_prefix}_loss")
        if loss is not None:
            metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700.0))
        if self._judge is not None:
            for name, value in self._judge(self.model).items():
                metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def best_figures(self) -> dict[str, float]:
        """Of the evaluation whose weights were kept; empty where there was none."""
        step = self.state.best_global_step
        rows = [row for row in self.state.log_history if row.get("step") == step]
        return {
            name.removeprefix("eval_"): float(value)
            for row in rows
            for name, value in row.items()
            if name.startswith("eval_") and name.split("_")[1] not in _TIMES
        }


def finetuning_arguments(
    folder: Path,
    *,
    batch_size: int,
    grad_accum: int,
    num_epochs: float,
    lr: float,
    weight_decay: float,
    log_every: int,
    save_every: int,
    eval_every: int,
    bf16: bool,
    gradient_checkpointing: bool,
    seed: int,
    judged: bool,
    wandb_project: str | None,
    run_name: str | None,
    progress_bar: bool,
    use_cpu: bool,
) -> TrainingArguments:
    """Arguments of the Hugging Face trainer.

    With ``eval_every`` above 0 there is a checkpoint after every evaluation, and the weights of
    the best one are what training ends with; with 0 one every ``save_every`` steps.
    """
    evaluates = eval_every > 0
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=grad_accum,
        num_train_epochs=num_epochs,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=weight_decay,
        logging_steps=log_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=eval_every if evaluates else None,
        save_strategy="steps",
        save_steps=eval_every if evaluates else save_every,
        save_total_limit=KEPT_CHECKPOINTS,
        load_best_model_at_end=evaluates,
        metric_for_best_model="eval_recall@10" if judged else "eval_loss",
        greater_is_better=judged,
        bf16=bf16,
        use_cpu=use_cpu,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        data_seed=seed,
        report_to=reports(wandb_project),
        run_name=run_name,
        disable_tqdm=not progress_bar,
        remove_unused_columns=False,
    )
