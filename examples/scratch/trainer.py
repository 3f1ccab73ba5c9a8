"""Training from scratch: the step, averaged weights, validation by search, early stopping."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainingArguments

from examples.scratch.objective import Objective
from examples.scratch.settings import OptimizerSettings, ValidationSettings
from examples.scratch.stream import WindowStream
from examples.trainer.checkpoints import last_checkpoint
from examples.trainer.trainer import KEPT_CHECKPOINTS, CheckpointedTrainer, reports

DECIDING = "recall@10"
_AVERAGE, _BEST, _STANDING = "average.safetensors", "best.safetensors", "standing.json"
_EMA_WARMUP = 10

Weights = dict[str, Tensor]
Validate = Callable[[Weights], Mapping[str, float]]


@dataclass
class Standing:
    """What a run knows beside its weights and its trainer's state.

    Attributes:
        seconds: trained for, all parts of a run that was continued together.
        best: validation figures of the best averaged weights; empty before the first look.
        best_step: they are of.
        rounds_without: looks since.
        loss, losses: sum and number of the steps' losses since they were last logged.
        finished: whether the run has come to its end.
        stopped_early: whether patience ended it.
    """

    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    rounds_without: int = 0
    loss: float = 0.0
    losses: int = 0
    finished: bool = False
    stopped_early: bool = False


class _Batches(IterableDataset[dict[str, Tensor]]):
    """The batches from wherever training stands when they are asked for."""

    def __init__(self, stream: WindowStream, step: Callable[[], int]) -> None:
        self._stream, self._step = stream, step

    def __iter__(self) -> Any:
        return ({"windows": windows} for windows in self._stream.from_step(self._step()))


class ScratchTrainer(CheckpointedTrainer):
    """Trains a language model over item tokens.

    The same seed on the same machine gives the same steps, whether a run is stopped and continued
    or not (unless ``max_seconds`` ends it: its schedule follows the clock).

    Args:
        model: on its device.
        args: see :func:`training_arguments`.
        objective: of that model.
        stream: the batches.
        optimizer, validation: how.
        questions: validation users, whom ``validate`` asks about.
        validate: figures of weights by the model's names, ``recall@10`` among them.
        run_settings: see :class:`~examples.trainer.trainer.CheckpointedTrainer`.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        objective: Objective,
        stream: WindowStream,
        *,
        optimizer: OptimizerSettings,
        validation: ValidationSettings,
        questions: Sequence[Any],
        validate: Validate,
        run_settings: Mapping[str, Any],
    ) -> None:
        if args.world_size > 1:
            raise ValueError(
                f"{args.world_size} processes were started; this model trains on one device"
            )
        args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs would mean data parallel
        self.standing = Standing()
        self._objective, self._stream = objective, stream
        self._how, self._validation, self._validate = optimizer, validation, validate
        self._named = dict(model.named_parameters())
        self._average = {n: p.detach().clone() for n, p in self._named.items()}
        self._best: Weights = {}
        self._began = 0.0
        self._loss = torch.zeros((), dtype=torch.float64, device=args.device)
        super().__init__(
            model=model,
            args=args,
            run_settings=run_settings,
            eval_dataset=list(questions),
            callbacks=[_Upkeep(self)],
        )

    def run(self) -> Weights:
        """Train to the end, from wherever the output folder stands; the best averaged weights.

        Raises:
            CheckpointError: the folder holds a run with other settings.
            FloatingPointError: the loss or the weights are not finite.
            OSError: a checkpoint cannot be written; the one before is whole.
        """
        checkpoint = last_checkpoint(Path(self.args.output_dir), self._run_settings)
        if checkpoint is not None and self._read_standing(checkpoint).finished:
            self._load_more(checkpoint)
        else:
            self.train_on()
        return self._best

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches as the stream makes them, on the model's device."""
        # A generator of its own: the loader must not draw from the one of the dropout.
        return DataLoader(
            _Batches(self._stream, lambda: int(self.state.global_step)),
            batch_size=None,
            generator=torch.Generator(),
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a window's items, in nats."""
        device = inputs["windows"].device.type
        autocast = torch.autocast(device, torch.bfloat16) if self.args.bf16 else nullcontext()
        with autocast:
            loss = self._objective(inputs["windows"])
        self._loss += loss.detach()
        self.standing.losses += 1
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures; the loss is a mean over all steps since the last, stopped or not."""
        if "loss" in logs:
            logs["loss"] = float(self._loss) / max(self.standing.losses, 1)
            self._loss.zero_()
            self.standing.losses = 0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A straight rise, then half a cosine, over the steps or the seconds allowed."""
        if self.lr_scheduler is None:

            def share(step: int) -> float:
                done = self.done(step, num_training_steps)
                return schedule(done, self._how.warmup_share, self._how.final_lr_share)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, share
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def done(self, step: int, num_steps: int) -> float:
        """Share of the schedule that is over."""
        done = step / num_steps
        if self._how.max_seconds is not None:
            done = max(done, self.seconds / self._how.max_seconds)
        return min(done, 1.0)

    @property
    def seconds(self) -> float:
        """Trained so far."""
        running = time.perf_counter() - self._began if self._began else 0.0
        return self.standing.seconds + running

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def follow(self) -> None:
        """Let the average follow a step."""
        # It forgets the fresh weights quickly, then at its own pace.
        step = int(self.state.global_step)
        decay = min(self._how.ema, (step + 1) / (step + _EMA_WARMUP))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self._average.values()), list(self._named.values()), 1.0 - decay
            )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Validation figures of the averaged weights, which are kept where they are the best."""
        if not all(bool(value.isfinite().all()) for value in self._average.values()):
            raise FloatingPointError("the weights are not finite; try a lower peak_lr")
        standing = self.standing
        over = self.done(self.state.global_step, self.state.max_steps) >= 1.0
        paused = time.perf_counter()
        figures = dict(self._validate(self._average))
        if not standing.best or figures[DECIDING] > standing.best[DECIDING]:
            standing.best, standing.best_step = figures, int(self.state.global_step)
            standing.rounds_without = 0
            self._best = {n: v.detach().cpu().clone() for n, v in self._average.items()}
        else:
            standing.rounds_without += 1
            if 0 < self._validation.patience <= standing.rounds_without:
                standing.stopped_early = standing.finished = True
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        standing.finished = standing.finished or over
        self.control.should_training_stop |= standing.finished
        self.control.should_save = True
        # Looking is not training: the schedule by the clock does not count it.
        self._began += time.perf_counter() - paused
        return metrics

    def write_more(self, checkpoint: Path) -> None:
        """The averaged and the best weights, and the standing."""
        now = time.perf_counter()
        self.standing.seconds += now - self._began
        self._began = now
        self.standing.loss = float(self._loss)
        save_file({n: v.contiguous() for n, v in self._average.items()}, checkpoint / _AVERAGE)
        if self._best:
            save_file(self._best, checkpoint / _BEST)
        (checkpoint / _STANDING).write_text(json.dumps(asdict(self.standing)), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_more(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_more(self, checkpoint: Path) -> None:
        self.standing = self._read_standing(checkpoint)
        self._loss.fill_(self.standing.loss)
        with torch.no_grad():
            for name, value in load_file(checkpoint / _AVERAGE).items():
                self._average[name].copy_(value)
        best = checkpoint / _BEST
        self._best = load_file(best) if best.exists() else {}

    @staticmethod
    def _read_standing(checkpoint: Path) -> Standing:
        return Standing(**json.loads((checkpoint / _STANDING).read_text(encoding="utf-8")))


class _Upkeep(TrainerCallback):
    """What happens around the trainer's steps."""

    def __init__(self, trainer: ScratchTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.follow()
        state.epoch = state.global_step / trainer._stream.steps_per_epoch
        if trainer.done(state.global_step, state.max_steps) >= 1.0:
            # Whatever ends the schedule, its last weights are looked at and kept.
            control.should_evaluate = control.should_save = control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss}; try a lower peak_lr")


def training_arguments(
    folder: Path,
    stream: WindowStream,
    optimizer: OptimizerSettings,
    validation: ValidationSettings,
    *,
    seed: int,
    device: torch.device,
    bf16: bool,
    save_every: int,
    wandb_project: str | None,
    run_name: str | None,
    progress_bar: bool,
) -> TrainingArguments:
    """Arguments of the Hugging Face trainer for these settings.

    Args:
        save_every: steps between checkpoints; there is one after every look at validation users
            too.
    """
    if save_every < 1:
        raise ValueError(f"save_every is {save_every}; it must be at least 1")
    steps = stream.steps_per_epoch
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=optimizer.epochs * steps,
        per_device_train_batch_size=optimizer.batch_size,
        learning_rate=optimizer.peak_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.clip_norm,
        optim="adamw_torch_fused",
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=seed,
        ignore_data_skip=True,
        logging_steps=steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=validation.every_epochs * steps,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=KEPT_CHECKPOINTS,
        report_to=reports(wandb_project),
        run_name=run_name,
        disable_tqdm=not progress_bar,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def schedule(done: float, warmup_share: float, final_share: float) -> float:
    """Share of the peak learning rate: a straight rise, then half a cosine to the final share."""
    if done < warmup_share:
        # Not zero at the first step, which would be a step for nothing.
        return max(done / warmup_share, 0.02)
    down = 0.5 * (1.0 + math.cos(math.pi * min((done - warmup_share) / (1.0 - warmup_share), 1.0)))
    return final_share + (1.0 - final_share) * down
