"""Everything between a data set and a release: codes, training, evaluation, model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from examples.evaluation.ranks import Searches, figures, held_out_searches
from examples.evaluation.release import MODES
from examples.scratch.items import CodedItems, code_items
from examples.scratch.model import item_tokens, new_model, prompt_recipe
from examples.scratch.objective import Objective
from examples.scratch.settings import (
    AugmentationSettings,
    CodesSettings,
    DropoutSettings,
    ModelSettings,
    OptimizerSettings,
    TeacherSettings,
    ValidationSettings,
)
from examples.scratch.stream import WindowStream
from examples.scratch.teacher import Teacher
from examples.scratch.trainer import ScratchTrainer, Weights, training_arguments
from examples.scratch.windows import Histories
from examples.trainer.card import commit_of, data_facts, model_card
from examples.trainer.checkpoints import last_checkpoint
from rectokens.artifacts.manifest import ParentRef
from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release import save_release
from rectokens.artifacts.store import ArtifactStore
from rectokens.core.atomic_file import atomic_file
from rectokens.prompts.registry import prompt_builder
from server.demo.data import DemoData, leave_one_out
from server.demo.evaluate import sample_questions
from server.engine.engine import Engine
from server.engine.loading import choose_runner

STORE, FIGURES = "store", "figures.json"
_SUMMARY = (
    "A Qwen3-configuration language model of {parameters} parameters, trained from fresh weights "
    "over item tokens alone. It continues a history of semantic IDs; the server's constrained "
    "search over the catalog of its release makes items of that. Scores are meant with "
    "`normalization` `children` (the server's default); it knows no text."
)
_PROTOCOL = (
    "Full ranking over all items. Items that share a semantic ID are ranked in the order of the "
    "catalog (training count, then a hash of the id).",
    "Validation figures, with the history's items left out, chose the weights; test users were "
    "looked at once, afterwards.",
)


@dataclass(frozen=True)
class Recipe:
    """All choices of a run that make its result.

    Attributes:
        seed: of everything.
        bf16: whether steps are taken in bfloat16; weights stay float32.
    """

    codes: CodesSettings = field(default_factory=CodesSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    dropout: DropoutSettings = field(default_factory=DropoutSettings)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    seed: int = 0
    bf16: bool = False

    def flat(self) -> dict[str, Any]:
        """By dotted name, JSON values."""
        out: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                out |= {f"{name}.{inner}": v for inner, v in value.items()}
            else:
                out[name] = value
        return {n: list(v) if isinstance(v, tuple) else v for n, v in out.items()}


@dataclass(frozen=True)
class RunOptions:
    """What of a run does not change its result.

    Attributes:
        device: to train on.
        save_every: steps between checkpoints.
        evaluate_test: whether all test users are asked about in the end.
        wandb_project, run_name: for Weights & Biases; None leaves it out.
        progress_bar: whether to show one.
        tell: called with a line at each stage.
    """

    device: torch.device
    save_every: int = 500
    evaluate_test: bool = True
    wandb_project: str | None = None
    run_name: str | None = None
    progress_bar: bool = True
    tell: Callable[[str], None] = lambda _: None


def train_release(data: DemoData, folder: Path, recipe: Recipe, options: RunOptions) -> Path:
    """Train a model from scratch and write a release; goes on where an earlier call stopped.

    Args:
        data: what to learn from.
        folder: of the run: gets checkpoints, ``metrics.csv``, TensorBoard events,
            ``figures.json`` and, in ``store``, the artifacts, the release being the active one.
        recipe: how.
        options: how to go about it.

    Returns:
        The release folder.

    Raises:
        ValueError: data in which no user has three items; a setting out of range;
            ``CheckpointError`` for a folder of another run.
        OSError: the disk is full; checkpoints that were complete stay so.
    """
    # Its bars for the saving of small files would break up the training's.
    transformers_logging.disable_progress_bar()
    split = leave_one_out(data.sequences)
    if not split.train:
        raise ValueError(f"none of the {split.skipped} users has three items; nothing to learn")
    options.tell(
        f"{data.name}: {len(split.train):,} users ({split.skipped} with fewer than three items "
        f"left out), {len(data.item_ids):,} items"
    )
    # Before anything is written into a folder that is another run's.
    last_checkpoint(folder, recipe.flat(), some=True)
    store = folder / STORE
    items = code_items(data, split.train, recipe.codes, recipe.seed, store)
    options.tell(
        f"semantic IDs {recipe.codes.num_levels} x {recipe.codes.codebook_size}: "
        f"{items.report['collision_rate']:.2%} of the items share theirs with another"
    )
    device = options.device
    tokens = item_tokens(recipe.codes.num_levels, recipe.codes.codebook_size)
    spec = RetrievalSpec(items.fingerprint, tokens, prompt_recipe(recipe.model.max_items))
    builder = prompt_builder(spec.prompt, tokens)
    model: Any = new_model(tokens, recipe.model, recipe.dropout, recipe.seed).to(device)
    parameters = sum(p.numel() for p in model.parameters())

    teacher = None
    if recipe.teacher.weight > 0:
        teacher = Teacher.of(split.train, data.embeddings, recipe.teacher, device)
    stream = WindowStream(
        Histories.of(split.train, device),
        recipe.augmentation,
        recipe.model.max_items + 1,
        recipe.optimizer.batch_size,
        recipe.seed,
    )
    questions = sample_questions(split.validation, recipe.validation.users, recipe.seed)
    validation = Searcher(model, items, recipe, device)
    ranked = held_out_searches(
        items.catalog,
        builder,
        data.item_ids,
        questions,
        exclude_history=True,
        beam_width=recipe.validation.beam_width,
    )
    options.tell(
        f"training {parameters:,} parameters for at most "
        f"{recipe.optimizer.epochs * stream.steps_per_epoch:,} steps of "
        f"{recipe.optimizer.batch_size} histories on {device}"
    )
    trainer = ScratchTrainer(
        model,
        training_arguments(
            folder,
            stream,
            recipe.optimizer,
            recipe.validation,
            seed=recipe.seed,
            device=device,
            bf16=recipe.bf16,
            save_every=options.save_every,
            wandb_project=options.wandb_project,
            run_name=options.run_name,
            progress_bar=options.progress_bar,
        ),
        Objective(
            model,
            tokens,
            items.codes.to(device),
            recipe.dropout,
            recipe.optimizer,
            max_items=recipe.model.max_items,
            teacher=teacher,
        ),
        stream,
        optimizer=recipe.optimizer,
        validation=recipe.validation,
        questions=questions,
        validate=lambda weights: figures(validation.ranks(weights, ranked)),
        run_settings={**recipe.flat(), "tokenizer_fingerprint": items.fingerprint},
    )
    best = trainer.run()
    standing = trainer.standing
    model.load_state_dict(best, strict=False)  # the head is the embeddings, and so is not there
    options.tell(
        f"trained for {standing.seconds:.0f} s; best at step {standing.best_step}: "
        + _line(standing.best)
    )

    test: dict[str, dict[str, float]] = {}
    if options.evaluate_test:
        for title, excluded in MODES.items():
            ranked = held_out_searches(
                items.catalog,
                builder,
                data.item_ids,
                split.test,
                exclude_history=excluded,
                beam_width=recipe.validation.beam_width,
            )
            test[title] = figures(validation.ranks(best, ranked))
            options.tell(f"all {len(split.test):,} test users, {title}: {_line(test[title])}")

    commit = commit_of(Path(__file__).parent)
    report = {
        "best step": standing.best_step,
        "seconds of training": round(standing.seconds, 1),
        "stopped early": standing.stopped_early,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    card = model_card(
        summary=_SUMMARY,
        protocol=_PROTOCOL,
        data=data_facts(data, split, items.report["collision_rate"]),
        parameters=parameters,
        settings=recipe.flat(),
        report=report,
        validation=standing.best,
        test=test or None,
        commit=commit,
    )
    model_path = save_model(
        ArtifactStore(store).folder("model"),
        model.to("cpu"),
        spec,
        parents={"tokenizer": ParentRef(items.tokenizer_version, items.fingerprint)},
        numbers={f"validation_{n}": v for n, v in standing.best.items()},
        card=card,
    )
    numbers = {f"test_{n}": v for n, v in test.get(next(iter(MODES)), {}).items()}
    release = save_release(
        store, model_path.name, items.catalog_version, numbers={**numbers, "data": data.name}
    )
    open_release_store(store).activate(release.name)
    _write_figures(
        folder / FIGURES,
        {
            "seed": recipe.seed,
            "commit": commit,
            "parameters": parameters,
            "training": report,
            "validation": standing.best,
            "test": test,
            "release": release.name,
        },
    )
    options.tell(f"release {release}")
    return release


class Searcher:
    """A second model of the same shape, with an engine, to try weights with while training.

    Args:
        model: whose shape and device it has.
        items: the catalog.
        recipe: of the run.
        device: of the model.
    """

    def __init__(
        self, model: nn.Module, items: CodedItems, recipe: Recipe, device: torch.device
    ) -> None:
        kind: Any = type(model)
        with torch.random.fork_rng(devices=[]):
            self._model = kind(model.config).to(device).eval()
        tokens = item_tokens(recipe.codes.num_levels, recipe.codes.codebook_size)
        # Weights are copied into it again and again: an engine that packs them away would not see.
        self._engine: Any = Engine(self._model, tokens, choose_runner(self._model, tokens))
        self._trie = items.catalog.trie.to(device)
        self._batch_size = recipe.validation.batch_size

    def ranks(self, weights: Weights, questions: Searches) -> list[int | None]:
        """Ranks of the questions' targets with these weights (names as in the model)."""
        self._model.load_state_dict(weights, strict=False)
        return questions.ranks(self._engine, self._trie, batch_size=self._batch_size)


def _line(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def _write_figures(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
