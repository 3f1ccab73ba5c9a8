"""Measures recommendations on held-out items; takes a gin file.

Of a release, through the library and, with ``base_url``, through a running server that serves
it: ``python -m examples.scripts.eval.eval_retrieval
examples/configs/evaluation/eval_release_beauty.gin``

Of a fine-tuned model on a file of samples: ``python -m examples.scripts.eval.eval_retrieval
examples/configs/finetuning/eval_retrieval_beauty.gin``
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gin
from rich.console import Console
from rich.table import Table

from examples.data.amazon import AmazonReviews
from examples.data.item_codes import ItemTokType
from examples.data.precomputed import PrecomputedSequenceDataset
from examples.data.reviews import Features
from examples.evaluation.ranks import LARGEST_K
from examples.evaluation.release import (
    MODES,
    Asking,
    Ranks,
    differing,
    figures_by_mode,
    held_out,
    library_ranks,
    server_ranks,
)
from examples.finetune.chat_model import ChatModel, load_chat_model
from examples.finetune.generated import generated_ranks
from examples.finetune.model import require_same_item_tokenizer, require_same_vocabulary
from examples.finetune.retrieval import sample_searches, search_in_training
from examples.utils import run
from rectokens.cli.progress import progress_bar
from rectokens.core.atomic_file import atomic_file


@gin.configurable
def main(
    model_dir: str | None = None,
    item_tok_path: str | None = None,
    precomputed_test_path: str | None = None,
    hf_model_name: str | None = None,
    item_tok_type: ItemTokType = "rqvae",
    root: str = "data/amazon",
    split: str = "beauty",
    num_examples: int | None = 10,
    top_k: int = 10,
    beam_size: int = 20,
    encode_batch_size: int = 512,
    bf16: bool = False,
    seed: int = 42,
    attr_path: str | None = None,
    features: Features = "text",
    behaviour_weight: float = 1.0,
    behaviour_dims: int = 128,
    release: str | None = None,
    base_url: str | None = None,
    batch_size: int = 64,
    concurrency: int = 16,
    device: str = "auto",
    output: str | None = None,
) -> dict[str, Any]:
    """Print Recall@{1,5,10,20} and NDCG@{5,10,20} up to ``top_k``, all items competing.

    Of a model: ``model_dir``, ``item_tok_path`` and ``precomputed_test_path``. Of a release:
    ``release``, ``base_url`` or both. Figures come with the history's items left out and not
    (samples that do not tell their history: not only). Items that share a semantic ID are ranked
    in the order of the catalog; an item that is not among the first ``top_k`` is not found.

    Args:
        model_dir: a model that ``finetune_qwen`` wrote.
        item_tok_path, item_tok_type: its item tokenizer.
        precomputed_test_path: samples; those answered with an item are asked about.
        hf_model_name: where the text tokenizer is from if not from ``model_dir``.
        root, split: the data, as of :class:`~examples.data.amazon.AmazonReviews`.
        num_examples: users or samples asked about, drawn with the seed; None for all.
        top_k: k of the search, at most ``beam_size``; of a release it is 20 always.
        beam_size: W of the search; of a release at least 20.
        encode_batch_size: items encoded at a time.
        bf16: weights in bfloat16.
        seed: of the sample.
        attr_path: dotted path of the model's output layer: search by the library's constrained
            generation, with that layer computed for children only; None searches by the engine.
            Items are left out of what was found then, not of the search.
        features, behaviour_weight, behaviour_dims: of the item vectors, as the samples'.
        release: a release folder; asked through the library.
        base_url: of a running server that serves the same release; asked too. Alone, only the
            server is asked.
        batch_size: searches together, by the engine.
        concurrency: requests in flight at a time to the server.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; not of the server.
        output: JSON file for the figures.

    Returns:
        The figures: by ``model``, or ``library`` and ``server``, and way to rank; ``users``; and
        ``different_ranks`` where both library and server were asked.

    Raises:
        ValueError: neither a whole model nor a release or server; a parameter out of range.
        EvaluationError: the server does not answer.
    """
    of_model = {
        "model_dir": model_dir,
        "item_tok_path": item_tok_path,
        "precomputed_test_path": precomputed_test_path,
    }
    missing = [name for name, value in of_model.items() if value is None]
    if release is None and base_url is None:
        if missing:
            raise ValueError(
                f"give {', '.join(missing)} to ask a model, or release or base_url to ask a "
                "release; there is nothing to ask"
            )
    elif len(missing) < len(of_model):
        given = [name for name in of_model if name not in missing]
        raise ValueError(f"{', '.join(given)} and release or base_url are given; give one kind")
    found: dict[str, Ranks] = {}
    seconds: dict[str, float] = {}
    if not missing:
        if not 1 <= top_k <= beam_size:
            raise ValueError(f"top_k is {top_k}; allowed are 1 to beam_size, {beam_size}")
        loaded = load_chat_model(
            str(model_dir),
            hf_model_name,
            str(item_tok_path),
            item_tok_type,
            num_levels=None,
            codebook_size=None,
            root=root,
            split=split,
            features=features,
            behaviour_weight=behaviour_weight,
            behaviour_dims=behaviour_dims,
            encode_batch_size=encode_batch_size,
            bf16=bf16,
            device=device,
        )
        name = loaded.reviews.data.name
        with _timed("model", seconds):
            found["model"] = _model_ranks(
                loaded,
                str(precomputed_test_path),
                beam_width=beam_size,
                top_k=top_k,
                num_examples=num_examples,
                seed=seed,
                attr_path=attr_path,
                batch_size=batch_size,
            )
    else:
        if beam_size < LARGEST_K:
            raise ValueError(
                f"beam_size is {beam_size}; of a release it must be at least {LARGEST_K}"
            )
        top_k = LARGEST_K
        data = AmazonReviews(root, split).data
        name = data.name
        questions = held_out(data, num_examples, seed)
        asking = Asking(beam_width=beam_size, batch_size=batch_size, concurrency=concurrency)
        total = 2 * len(questions)
        if release is not None:
            with _timed("library", seconds), _counting("asking the library", total) as count:
                found["library"] = library_ranks(
                    Path(release), data, questions, asking, device=device, progress=count
                )
        if base_url is not None:
            with _timed("server", seconds), _counting("asking the server", total) as count:
                found["server"] = server_ranks(base_url, data, questions, asking, progress=count)
    result: dict[str, Any] = {
        "data": name,
        "users": len(next(iter(next(iter(found.values())).values()))),
        "beam_size": beam_size,
        **{kind: figures_by_mode(ranks, top_k) for kind, ranks in found.items()},
        "seconds": seconds,
    }
    if len(found) == 2:
        result["different_ranks"] = differing(found["library"], found["server"])
    _show(result, list(found))
    if output is not None:
        with atomic_file(Path(output)) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _model_ranks(
    loaded: ChatModel,
    path: str,
    *,
    attr_path: str | None,
    batch_size: int,
    **how: Any,
) -> Ranks:
    samples = PrecomputedSequenceDataset(path)
    require_same_vocabulary(samples, path, loaded.tokenizer)
    require_same_item_tokenizer(samples, path, loaded.fingerprint)
    ranks: dict[str, list[int | None]] = {}
    for title, excluded in MODES.items():
        if excluded and "histories" not in samples.meta:
            continue
        searches = sample_searches(
            samples,
            loaded.items,
            loaded.tokenizer.item_sep_token_id,
            exclude_history=excluded,
            **how,
        )
        ranks[title] = (
            search_in_training(
                loaded.model, loaded.tokenizer.item_tokens, searches, loaded.items, batch_size
            )
            if attr_path is None
            else generated_ranks(loaded, searches, attr_path)
        )
    return ranks


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


@contextmanager
def _counting(description: str, total: int) -> Iterator[Callable[[int], None]]:
    with progress_bar(description, total) as show:
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            show(done)

        yield count


def _show(result: Mapping[str, Any], names: list[str]) -> None:
    columns = list(next(iter(result[names[0]].values())))
    table = Table(title=f"{result['data']}: held-out last items of {result['users']:,} users")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name in names:
        for title, values in result[name].items():
            table.add_row(f"{name}, {title}", *(f"{values[column]:.4f}" for column in columns))
    console = Console(width=120)
    console.print(table)
    if "different_ranks" in result:
        console.print(
            f"ranks that differ between library and server: {result['different_ranks']} "
            f"of {2 * result['users']:,}"
        )


if __name__ == "__main__":
    run(main)
