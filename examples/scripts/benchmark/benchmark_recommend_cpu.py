"""Requests per second of our engine and of Hugging Face ``generate``, same model, same answers.

    python -m server demo --help                 # how to build the demo release
    python -m examples.scripts.benchmark.benchmark_recommend_cpu --release DIR [--data DIR]

Both search the release's catalog from the same prompts with the score rule ``vocab``. First the
answers are compared, item by item; only if they agree are they timed, in turn, so that a busy
neighbour slows both.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rectokens.artifacts.model import load_model_manifest
from rectokens.artifacts.release import load_release
from rectokens.catalog.artifact import load_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.prompts.parts import ItemPart
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.schemas.search import SearchRequest, SearchResult
from server.demo.command import load_data
from server.demo.data import leave_one_out
from server.demo.evaluate import sample_questions
from server.engine.loading import load_engine

SCORE_TOLERANCE = 1e-4

# (item ids in order, score of each)
Answer = tuple[list[str], list[float]]
Search = Callable[[], list[Answer]]


@dataclass(frozen=True, slots=True)
class Case:
    """What both are asked.

    Attributes:
        model_path: Hugging Face folder.
        item_tokens: where the item tokens lie.
        catalog: what may be returned.
        prompts: token ids, one tuple a request.
        beam_width: W; W items are wanted.
    """

    model_path: Path
    item_tokens: ItemTokens
    catalog: Catalog
    prompts: tuple[tuple[int, ...], ...]
    beam_width: int


def load_case(
    release: Path, data: Path | None, batch: int, beam_width: int, seed: int, min_items: int
) -> Case:
    """Prompts of ``batch`` users, drawn from those with at least ``min_items`` in the history.

    Raises:
        ValueError: items of the data are not in the catalog, or too few such users.
    """
    from transformers import AutoTokenizer

    parts = load_release(release)
    model = load_model_manifest(parts.model_path)
    catalog = load_catalog(parts.catalog_path)
    loaded = load_data(data)
    index = catalog.index_of(list(loaded.item_ids))
    if bool((index < 0).any()):
        raise ValueError(
            f"{int((index < 0).sum())} of {len(index)} items of {loaded.name} are not in the "
            f"catalog {catalog.version}; give the --data that the release was built from"
        )
    long_enough = [
        question
        for question in leave_one_out(loaded.sequences).test
        if len(question.history) >= min_items
    ]
    if len(long_enough) < batch:
        raise ValueError(f"{len(long_enough)} users have {min_items} items; {batch} are needed")
    codes = catalog.codes_of(index).tolist()
    builder = prompt_builder(
        model.spec.prompt, model.spec.item_tokens, AutoTokenizer.from_pretrained(model.path)
    )
    prompts = tuple(
        builder.build([ItemPart(tuple(codes[row])) for row in question.history]).token_ids
        for question in sample_questions(long_enough, batch, seed)
    )
    return Case(model.path, model.spec.item_tokens, catalog, prompts, beam_width)


def engine_search(case: Case) -> Search:
    """Our engine, one batch."""
    engine = load_engine(case.model_path, case.item_tokens, device="cpu", dtype="float32")
    trie = case.catalog.trie
    width = case.beam_width
    requests = [
        SearchRequest(prompt=prompt, beam_width=width, top_k=width, normalization="vocab")
        for prompt in case.prompts
    ]

    def search() -> list[Answer]:
        answers = []
        for result in engine.search(requests, trie).results:
            if not isinstance(result, SearchResult):
                raise RuntimeError(f"the engine failed: {result.message}")
            hits = result.hits
            ids = case.catalog.ids_of([hit.item_index for hit in hits])
            answers.append((ids, [hit.score for hit in hits]))
        return answers

    return search


def generate_search(case: Case) -> Search:
    """Hugging Face beam search with ``prefix_allowed_tokens_fn``, one batch, padded on the left.

    The prefix function is a dictionary look-up, so that the search is what is timed.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.model_path, dtype=torch.float32).eval()
    tokens, trie, width = case.item_tokens, case.catalog.trie, case.beam_width
    leaves = trie.leaf_codes(torch.arange(trie.num_leaves))
    allowed = _allowed_tokens(leaves, tokens)
    longest = max(map(len, case.prompts))
    pad = model.config.pad_token_id or 0
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in case.prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in case.prompts]
    input_ids, attention_mask = torch.tensor(rows), torch.tensor(mask)

    def following(_: int, sequence: Tensor) -> list[int]:
        return allowed[tuple(sequence[longest:].tolist())]

    @torch.inference_mode()
    def search() -> list[Answer]:
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=trie.num_levels,
            do_sample=False,
            length_penalty=0.0,
            early_stopping=False,
            prefix_allowed_tokens_fn=following,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=pad,
            eos_token_id=None,
        )
        codes = torch.tensor(
            [tokens.decode(sequence) for sequence in output.sequences[:, longest:].tolist()]
        )
        found = trie.find_leaves(codes).tolist()
        scores = output.sequences_scores.tolist()
        return [
            _items_of_leaves(case.catalog, found[at : at + width], scores[at : at + width], width)
            for at in range(0, len(found), width)
        ]

    return search


def _allowed_tokens(leaves: Tensor, tokens: ItemTokens) -> dict[tuple[int, ...], list[int]]:
    """Token ids that may follow each prefix of a semantic ID, in token ids."""
    allowed: dict[tuple[int, ...], dict[int, None]] = {}
    for codes in leaves.tolist():
        path = tokens.encode(codes)
        for depth, token in enumerate(path):
            allowed.setdefault(tuple(path[:depth]), {})[token] = None
    return {prefix: list(following) for prefix, following in allowed.items()}


def _items_of_leaves(
    catalog: Catalog, leaves: Sequence[int], scores: Sequence[float], limit: int
) -> Answer:
    """Leaves, best first, as items: all of a leaf's in the catalog's order."""
    indices: list[int] = []
    item_scores: list[float] = []
    pointers = catalog.trie.leaf_item_ptrs
    for leaf, score in zip(leaves, scores, strict=True):
        items = range(int(pointers[leaf]), int(pointers[leaf + 1]))
        indices += items
        item_scores += [score] * len(items)
    return catalog.ids_of(indices[:limit]), item_scores[:limit]


def differences(ours: Sequence[Answer], theirs: Sequence[Answer]) -> list[str]:
    """What differs: scores by place, and items but for those that a tie puts elsewhere."""
    found = []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if len(mine[0]) != len(other[0]):
            found.append(f"request {number}: {len(mine[0])} items and {len(other[0])}")
            continue
        gap = float(np.abs(np.array(mine[1]) - np.array(other[1])).max())
        if gap > SCORE_TOLERANCE:
            found.append(f"request {number}: scores differ by up to {gap:.2g}")
        cut = min(mine[1][-1], other[1][-1]) + 2 * SCORE_TOLERANCE
        own = dict(zip(*mine, strict=True))
        for item, score in zip(*other, strict=True):
            if item not in own and score > cut:
                found.append(f"request {number}: only generate has {item} ({score:.4f})")
            elif abs(own.get(item, score) - score) > SCORE_TOLERANCE:
                found.append(f"request {number}: {item} scores {own[item]:.4f} and {score:.4f}")
    return found


def time_in_turn(searches: Sequence[Search], repeats: int) -> list[list[float]]:
    """Seconds of each search, run one after the other ``repeats`` times after a warm-up."""
    seconds: list[list[float]] = [[] for _ in searches]
    for turn in range(repeats + 1):
        for search, taken in zip(searches, seconds, strict=True):
            started = time.perf_counter()
            search()
            if turn:
                taken.append(time.perf_counter() - started)
    return seconds


def report(case: Case, threads: int, names: Sequence[str], seconds: Sequence[list[float]]) -> Table:
    """The figures and the conditions they hold under."""
    lengths = sorted(map(len, case.prompts))
    batch, trie = len(case.prompts), case.catalog.trie
    table = Table(
        title="recommendations on the CPU, same items and scores",
        caption=(
            f"batch of {batch} prompts ({lengths[0]} to {lengths[-1]} tokens), beam "
            f"{case.beam_width}, {trie.num_items:,} items in {trie.num_levels} x "
            f"{trie.codebook_size} codes; {threads} threads of {_processor()}; "
            f"torch {torch.__version__}, transformers {transformers.__version__}; "
            f"medians of {len(seconds[0])} runs in turn"
        ),
    )
    for column in ("", "batch, ms", "fastest, ms", "slowest, ms", "requests/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, taken in zip(names, seconds, strict=True):
        middle = statistics.median(taken)
        times = (f"{1e3 * value:.1f}" for value in (middle, min(taken), max(taken)))
        table.add_row(name, *times, f"{batch / middle:.1f}")
    return table


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(
    release: Annotated[Path, typer.Option(help="Release folder of a demo.")],
    data: Annotated[
        Path | None, typer.Option(help="Data folder it was built from; none: generated data.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests in a batch.")] = 8,
    beam_width: Annotated[int, typer.Option(min=1, help="Beams, and items wanted.")] = 50,
    min_items: Annotated[int, typer.Option(min=1, help="Shortest history taken.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the sample of users.")] = 0,
) -> None:
    """Compare answers, then speed."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    try:
        case = load_case(release, data, batch, beam_width, seed, min_items)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    searches = [engine_search(case), generate_search(case)]
    ours, theirs = (search() for search in searches)
    wrong = differences(ours, theirs)
    if wrong:
        console.print("the answers differ, so nothing is timed:", *wrong, sep="\n  ")
        raise typer.Exit(1)
    console.print(
        f"same items and scores (within {SCORE_TOLERANCE:g}) for all {len(ours)} requests"
    )
    seconds = time_in_turn(searches, repeats)
    console.print(report(case, threads, ["engine", "HF generate"], seconds))
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[0])
    console.print(f"engine: {ratio:.1f} x the requests/s of HF generate")


if __name__ == "__main__":
    typer.run(main)
