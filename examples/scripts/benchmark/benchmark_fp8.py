"""What FP8 changes in the answers of a trained model: the demo's, on held-out users.

    python -m server demo
    python -m examples.scripts.benchmark.benchmark_fp8 .demo

The same users are answered in float32, in bfloat16 and in bfloat16 with the layers in FP8. Compared
are the best items of each pair, the scores of the items in both, and how often the item that a user
took next is among the best. On a CPU the same rounding is computed, only without its speed; the
service refuses it there.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.console import Console

from rectokens.artifacts.model import load_model_manifest
from rectokens.artifacts.release import load_release
from rectokens.catalog.artifact import load_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.prompts.parts import ItemPart
from rectokens.prompts.registry import prompt_builder
from rectokens.schemas.search import SearchRequest, SearchResult
from server.demo.synthetic import generate
from server.engine import loading
from server.engine.device.buckets import Buckets
from server.engine.device.engine import DeviceOptions
from server.engine.pool_setup import PoolOptions
from server.release import load_text_tokenizer

_ARMS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "fp8": (torch.bfloat16, True),
}


@contextmanager
def fp8_anywhere() -> Iterator[None]:
    """Within, FP8 is not refused on a CPU."""
    with mock.patch.object(loading, "fp8_refusal", return_value=None):
        yield


def answers_of(
    release: Path, requests: list[SearchRequest], catalog: Catalog, device: str, arm: str
) -> list[SearchResult]:
    """What one arm answers."""
    from transformers import AutoModelForCausalLM

    dtype, fp8 = _ARMS[arm]
    artifact = load_model_manifest(release)
    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=dtype, local_files_only=True)
    options = DeviceOptions(Buckets((8,), (64,), 512), fp8=fp8)
    pool = PoolOptions(memory_bytes=64 << 20)
    engine = loading.build_engine(model.to(device), artifact.spec.item_tokens, pool, options)
    trie = catalog.trie.to(torch.device(device))
    found: list[SearchResult] = []
    for first in range(0, len(requests), 8):
        for result in engine.search(requests[first : first + 8], trie).results:
            if not isinstance(result, SearchResult):
                raise RuntimeError(result.message)
            found.append(result)
    return found


def compare(one: list[SearchResult], other: list[SearchResult]) -> tuple[float, float, float]:
    """Share of the items in both, share of equal first items, median difference of scores."""
    shares, firsts, gaps = [], [], []
    for mine, theirs in zip(one, other, strict=True):
        scores = {hit.item_index: hit.score for hit in mine.hits}
        found = {hit.item_index: hit.score for hit in theirs.hits}
        shares.append(len(scores.keys() & found.keys()) / max(len(scores), 1))
        firsts.append(mine.hits[:1] != () and mine.hits[0].item_index == theirs.hits[0].item_index)
        gaps += [abs(scores[item] - found[item]) for item in scores.keys() & found.keys()]
    return statistics.mean(shares), statistics.mean(firsts), statistics.median(gaps or [0.0])


def main(
    store: Annotated[Path, typer.Argument(help="What the demo wrote, with generated data.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    users: Annotated[int, typer.Option(min=1, help="Asked for.")] = 240,
    top_k: Annotated[int, typer.Option(min=1, max=50, help="Items compared.")] = 10,
) -> None:
    """Ask all arms the same."""
    console = Console(width=120)
    release = load_release(next(path for path in sorted((store / "releases").iterdir())))
    catalog = load_catalog(release.catalog_path)
    artifact = load_model_manifest(release.model_path)
    builder = prompt_builder(
        artifact.spec.prompt, artifact.spec.item_tokens, load_text_tokenizer(artifact)
    )
    data = generate()
    requests, taken = [], []
    for sequence in [one for one in data.sequences if len(one) >= 5][:users]:
        rows = catalog.index_of([data.item_ids[row] for row in sequence])
        history, last = rows[:-1], int(rows[-1])
        codes = catalog.codes_of(history).tolist()
        prompt = builder.build(tuple(ItemPart(tuple(code)) for code in codes)).token_ids
        requests.append(SearchRequest(prompt, 50, top_k, excluded_items=torch.unique(history)))
        taken.append(last)
    with fp8_anywhere():
        found = {
            arm: answers_of(release.model_path, requests, catalog, device, arm) for arm in _ARMS
        }
    for arm, results in found.items():
        hits = sum(
            last in {hit.item_index for hit in result.hits}
            for last, result in zip(taken, results, strict=True)
        )
        console.print(f"{arm}: the next item of {hits} of {len(taken)} users is among {top_k}")
    for one, other in (("float32", "bfloat16"), ("float32", "fp8"), ("bfloat16", "fp8")):
        share, first, gap = compare(found[one], found[other])
        console.print(
            f"{one} and {other}: {share:.1%} of the {top_k} best in both, {first:.1%} of the first "
            f"the same, scores {gap:.2g} apart"
        )


if __name__ == "__main__":
    typer.run(main)
