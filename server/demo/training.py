"""Trains a small language model on item tokens: a plain loop, fit for two CPU cores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rectokens.prompts.sequence import IGNORED_LABEL
from rectokens.schemas.item_tokens import ItemTokens
from server.demo.samples import Batch, Sample, SampleMaker, batches

_EVAL_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: passes over the histories; the schedule is stretched over them.
        peak_lr: learning rate after the warm-up; a cosine takes it to zero.
        warmup_share: part of the steps during which it rises.
        weight_decay: on matrices.
        batch_tokens: of a step, padding included.
        dropout: on the embeddings and on what the head sees.
        label_smoothing: inside a level's codes.
        vocab_share: share of the positions that also learn to rank their level's codes before
            all other tokens, which only ``normalization="vocab"`` and free generation use.
        clip_norm: longest gradient.
        max_seconds: time limit; the schedule then ends early. None for none, and only then is
            the result repeatable.
    """

    epochs: int = 8
    peak_lr: float = 5e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.05
    batch_tokens: int = 2048
    dropout: float = 0.0
    label_smoothing: float = 0.1
    vocab_share: float = 0.125
    clip_norm: float = 1.0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it must be at least 1")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; it must be at least 1")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds is {self.max_seconds}; it must be above 0")
        for name in ("peak_lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup_share", "dropout", "label_smoothing", "vocab_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are 0 to below 1")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training is.

    Attributes:
        done: share of the schedule, 0 to 1.
        epoch: epochs finished.
        loss: mean of the last epoch's steps so far.
        validation_loss: after the last finished epoch; None before.
    """

    done: float
    epoch: int
    loss: float
    validation_loss: float | None


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What came out.

    Attributes:
        validation_loss: per semantic ID, in nats, of the weights that were kept.
        best_epoch: the epoch they are from, counted from 1.
        epochs: finished.
        steps: taken.
        tokens_per_second: trained on, padding included.
        seconds: in all.
    """

    validation_loss: float
    best_epoch: int
    epochs: int
    steps: int
    tokens_per_second: float
    seconds: float


def train(
    model: Any,
    item_tokens: ItemTokens,
    histories: Sequence[Sequence[int]],
    validation: Sequence[Sample],
    maker: SampleMaker,
    pad_token_id: int,
    settings: TrainSettings,
    *,
    seed: int,
    report: Callable[[Progress], None] | None = None,
) -> TrainReport:
    """Train in place; the model ends with the weights of the epoch of least validation loss.

    Args:
        model: a transformers causal LM with a decoder ``model.model`` and a bias-free head.
        item_tokens: where the item tokens lie in its vocabulary.
        histories: training parts, rows of the data.
        validation: samples whose labels are the answers to predict; never trained on.
        maker: makes samples of the histories.
        pad_token_id: for padding.
        settings: how to train.
        seed: of sampling, order and dropout.
        report: called after every step.

    Raises:
        ValueError: no histories or no validation samples.
        FloatingPointError: the loss is not finite.
    """
    if not histories or not validation:
        raise ValueError(
            f"there are {len(histories)} histories and {len(validation)} validation samples; "
            "training needs at least one of each"
        )
    rng = np.random.default_rng(seed)
    optimizer = _optimizer(model, settings)
    started = time.perf_counter()
    done, steps, tokens, epoch = 0.0, 0, 0, 0
    best: tuple[float, int, dict[str, Tensor]] | None = None
    validation_loss: float | None = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while epoch < settings.epochs and done < 1.0:
            model.train()
            epoch_batches = list(
                batches(maker.epoch(histories, rng), settings.batch_tokens, pad_token_id, rng)
            )
            total = 0.0
            for number, batch in enumerate(epoch_batches):
                done = (epoch + number / len(epoch_batches)) / settings.epochs
                if settings.max_seconds is not None:
                    done = max(done, (time.perf_counter() - started) / settings.max_seconds)
                if done >= 1.0:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = settings.peak_lr * _schedule(done, settings.warmup_share)
                total += _step(model, optimizer, batch, item_tokens, settings, rng)
                steps += 1
                tokens += batch.token_ids.numel()
                if report is not None:
                    report(Progress(done, epoch, total / (number + 1), validation_loss))
            epoch += 1
            validation_loss = answer_loss(model, item_tokens, validation, pad_token_id)
            if best is None or validation_loss < best[0]:
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                best = (validation_loss, epoch, weights)
            if report is not None:
                done_now = 1.0 if epoch == settings.epochs else done
                mean = total / max(len(epoch_batches), 1)
                report(Progress(done_now, epoch, mean, validation_loss))
    assert best is not None  # there is at least one epoch
    model.load_state_dict(best[2])
    model.eval()
    seconds = time.perf_counter() - started
    return TrainReport(best[0], best[1], epoch, steps, tokens / max(seconds, 1e-9), seconds)


@torch.inference_mode()
def answer_loss(
    model: Any, item_tokens: ItemTokens, samples: Sequence[Sample], pad_token_id: int
) -> float:
    """Mean negative log-probability of the answers' codes, in nats per semantic ID.

    Probabilities are among the K codes of a level (``normalization="level"``).
    """
    model.eval()
    total = 0.0
    for batch in batches(samples, _EVAL_TOKENS, pad_token_id):
        hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
        hidden, labels = _predicting(hidden, batch.labels)
        for level_hidden, codes, weight in _levels(model, hidden, labels, item_tokens):
            total += float(F.cross_entropy(level_hidden @ weight.T, codes, reduction="sum"))
    return total / len(samples)


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    item_tokens: ItemTokens,
    settings: TrainSettings,
    rng: np.random.Generator,
) -> float:
    """One step of gradient descent; its loss, in nats a code."""
    embeddings = F.dropout(model.get_input_embeddings()(batch.token_ids), settings.dropout)
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    hidden, labels = _predicting(hidden, batch.labels)
    hidden = F.dropout(hidden, settings.dropout)
    loss = _loss(model, hidden, labels, item_tokens, settings, rng)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the training loss is {value}; try a lower peak_lr")
    return value


def _loss(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    item_tokens: ItemTokens,
    settings: TrainSettings,
    rng: np.random.Generator,
) -> Tensor:
    """Cross-entropy among a level's codes, and for some positions among all tokens.

    The softmax over one level costs a fraction of one over the vocabulary, and it is what the
    default score rules look at. The few positions with the full softmax are enough to teach
    which level comes where.
    """
    loss = hidden.new_zeros(())
    for level_hidden, codes, weight in _levels(model, hidden, labels, item_tokens):
        loss = loss + F.cross_entropy(
            level_hidden @ weight.T,
            codes,
            reduction="sum",
            label_smoothing=settings.label_smoothing,
        )
    loss = loss / len(labels)
    chosen = max(int(len(labels) * settings.vocab_share), 1 if settings.vocab_share else 0)
    if chosen:
        picks = torch.from_numpy(rng.choice(len(labels), size=chosen, replace=False))
        logits = hidden[picks] @ model.get_output_embeddings().weight.T
        loss = loss + settings.vocab_share * F.cross_entropy(logits, labels[picks])
    return loss


def _predicting(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (n, H) of the positions whose next token has a label, and those labels."""
    following = labels[:, 1:]
    wanted = following != IGNORED_LABEL
    return hidden[:, :-1][wanted], following[wanted]


def _levels(
    model: Any, hidden: Tensor, labels: Tensor, item_tokens: ItemTokens
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per level: hidden states that predict it, the codes to predict, the head's rows (K, H)."""
    head = model.get_output_embeddings().weight
    place = labels - item_tokens.offset
    parts = []
    for level in range(item_tokens.num_levels):
        codes = place - level * item_tokens.level_stride
        mine = (codes >= 0) & (codes < item_tokens.codebook_size)
        parts.append((hidden[mine], codes[mine], head[item_tokens.level_slice(level)]))
    return parts


def _optimizer(model: Any, settings: TrainSettings) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.peak_lr,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        foreach=True,
    )


def _schedule(done: float, warmup_share: float) -> float:
    """Share of the peak learning rate: a straight rise, then half a cosine down to 0."""
    if done < warmup_share:
        # Not zero at the first step, which would be a step for nothing.
        return max(done / warmup_share, 0.02)
    return 0.5 * (1.0 + math.cos(math.pi * (done - warmup_share) / (1.0 - warmup_share)))
