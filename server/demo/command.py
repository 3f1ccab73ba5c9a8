"""The demo as a command runs it: build once, and on request measure through HTTP."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release_store import ActivationConflictError
from server.demo import build, training
from server.demo.amazon import load_amazon
from server.demo.data import DemoData, leave_one_out
from server.demo.evaluate import Evaluation, EvaluationSettings, measure, sample_questions
from server.demo.recipe import DemoRecipe
from server.demo.running import serving
from server.demo.synthetic import generate
from server.demo.training import TrainSettings

# A model this small gains a third from a second thread and loses tenfold where a neighbour keeps
# that core busy; and with one thread machines of any size get the same weights.
_BUILD_THREADS = 1
# Chosen on validation items. On an idle core the generated data takes about a minute of training,
# Amazon Beauty about four.
_GENERATED = {"codebook_size": 256, "epochs": 8}
_FOLDER = {"codebook_size": 512, "epochs": 8}


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo made.

    Attributes:
        release: folder to serve.
        data: what it was made from.
        evaluation: figures measured through the endpoint, if that was asked for.
    """

    release: Path
    data: DemoData
    evaluation: Evaluation | None


def load_data(folder: Path | None, seed: int = 0) -> DemoData:
    """Data from a folder, or generated data where none is given.

    Raises:
        DataFolderError: the folder is not as it should be.
    """
    return generate(seed) if folder is None else load_amazon(folder)


def demo_recipe(
    folder: Path | None,
    *,
    seed: int = 0,
    epochs: int | None = None,
    train_seconds: float | None = None,
) -> DemoRecipe:
    """The recipe for generated data (no folder) or for a data folder.

    Args:
        folder: where the data is from.
        seed: of everything.
        epochs: instead of the default.
        train_seconds: time limit of the training; a result under a limit is not repeatable.

    Raises:
        ValueError: a value out of range.
    """
    defaults = _GENERATED if folder is None else _FOLDER
    return DemoRecipe(
        codebook_size=defaults["codebook_size"],
        train=TrainSettings(
            epochs=defaults["epochs"] if epochs is None else epochs, max_seconds=train_seconds
        ),
        seed=seed,
    )


def build_demo(
    data: DemoData, out: Path, recipe: DemoRecipe, *, console: Console | None = None
) -> Path:
    """Build the demo's release, or find it built before; tell the console how it goes.

    Returns:
        The release folder, in the artifact store ``out``.

    Raises:
        ValueError: data that cannot be trained on.
        ArtifactError: damaged artifacts in the store.
    """
    console = console or Console(stderr=True)
    with _fixed_threads(), _quiet_transformers(), _events(console) as events:
        return build.build_release(data, out, recipe, events)


def activate_first(out: Path, release: Path, *, console: Console | None = None) -> None:
    """Make a release the active one of its store, unless the store has one already.

    Raises:
        ArtifactError: the store or the release is damaged.
    """
    console = console or Console(stderr=True)
    store = open_release_store(str(out))
    active = store.active()
    if active is None:
        try:
            active = store.activate(release.name, expected_active=None, note="the demo")
        except ActivationConflictError:
            active = store.active()  # somebody was quicker
    if active is not None:
        console.print(f"active in the store: release {active.release}", highlight=False)


def run_demo(
    data: Path | None,
    out: Path,
    *,
    seed: int = 0,
    epochs: int | None = None,
    train_seconds: float | None = None,
    evaluate_users: int | None = None,
    evaluate: bool = False,
    settings: EvaluationSettings | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Build the demo from a data folder or from generated data, and measure it if asked to.

    Args:
        data: folder with the data; None generates some.
        out: root of the artifact store.
        seed: of everything.
        epochs: of training, instead of the default.
        train_seconds: time limit of the training.
        evaluate: start the server, ask it for every user's held-out last item, print a table.
        evaluate_users: ask for a sample of so many users only.
        settings: how to ask; ``evaluate_users`` goes before its ``users``.
        console: told how it goes.

    Raises:
        ValueError: bad settings or data (``DataFolderError``), damaged artifacts
            (``ArtifactError``).
        ServerStartError: the server did not become ready.
        EvaluationError: it did not answer.
    """
    console = console or Console(stderr=True)
    # Bad settings are found before the work begins.
    recipe = demo_recipe(data, seed=seed, epochs=epochs, train_seconds=train_seconds)
    settings = settings or EvaluationSettings()
    if evaluate_users is not None:
        settings = replace(settings, users=evaluate_users)
    loaded = load_data(data, seed)
    console.print(f"{loaded.name}: {len(loaded.sequences):,} users, {len(loaded.item_ids):,} items")
    release = build_demo(loaded, out, recipe, console=console)
    evaluation = None
    if evaluate:
        evaluation = evaluate_release(release, loaded, settings, console=console)
    return DemoResult(release, loaded, evaluation)


def evaluate_release(
    release: Path, data: DemoData, settings: EvaluationSettings, *, console: Console | None = None
) -> Evaluation:
    """Serve a release on a loopback port, measure it on the held-out items, print a table.

    Raises:
        ServerStartError: the server did not become ready.
        EvaluationError: it did not answer.
    """
    console = console or Console(stderr=True)
    total = len(sample_questions(leave_one_out(data.sequences).test, settings.users, settings.seed))
    console.print(f"starting the server to ask it about {total:,} users")
    with serving(release) as base_url, _bar(console) as bar:
        task = bar.add_task("asking", total=total, detail="")
        result = measure(base_url, data, settings, progress=lambda n: bar.advance(task, n))
    console.print(result.table())
    return result


def curl_example(data: DemoData, base_url: str) -> str:
    """A request to paste into a shell: the last three items of a user's known history."""
    history = leave_one_out(data.sequences).test[0].history[-3:]
    body = json.dumps({"history": [data.item_ids[row] for row in history], "top_k": 5})
    return (
        f"curl -s {base_url}/v1/recommend "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


@contextmanager
def _fixed_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(_BUILD_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its notes on saving and resizing, which are no news to a user of the demo."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def _events(console: Console) -> Iterator[build.BuildEvents]:
    """Lines for the stages; for training a bar on a terminal, else a line an epoch."""
    with _bar(console) as bar:
        task = bar.add_task("training", total=1.0, detail="", visible=False)
        told = 0

        def progress(state: training.Progress) -> None:
            nonlocal told
            detail = f"loss {state.loss:.3f}"
            if state.validation_loss is not None:
                detail += f", validation {state.validation_loss:.3f}"
            bar.update(task, completed=state.done, detail=detail, visible=True)
            if not console.is_terminal and state.epoch > told:
                told = state.epoch
                console.print(f"  epoch {state.epoch}: {detail}")

        def stage(line: str) -> None:
            # As it is: a path must stay in one piece, and may look like markup.
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield build.BuildEvents(stage=stage, progress=progress)
