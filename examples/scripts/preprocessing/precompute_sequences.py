"""Turns histories and items into token sequences, once, for fine-tuning; takes a gin file.

Writes ``{split}_{seq_split}.pt`` for each part of the histories and, with item samples,
``{split}_{seq_split}_item.pt``: chats in the model's own template, items as semantic IDs.
``python -m examples.scripts.preprocessing.precompute_sequences
examples/configs/preprocessing/precompute_sequences_beauty.gin``
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import gin
import numpy as np
import torch

from examples.data.amazon import AmazonReviews, UserSequenceDataset
from examples.data.batch import PADDING
from examples.data.chat_encoding import ChatEncoder
from examples.data.item_codes import ItemTokType, encode_all_items, load_item_tokenizer
from examples.data.precomputed import write_samples
from examples.data.reviews import Features
from examples.data.samples import SEQUENCE_TEMPLATES, ChatMaker, MadeChat, Question
from examples.data.sequences import SeqSplit
from examples.utils import run
from rectokens.artifacts.tokenizer import tokenizer_fingerprint
from rectokens.cli.progress import progress_bar
from rectokens.integrations.hf.tokenizer import ItemAwareTokenizer

_log = logging.getLogger(__name__)


@gin.configurable
def main(
    root: str = "data/amazon",
    split: str = "beauty",
    seq_splits: Sequence[SeqSplit] = ("train", "eval"),
    item_tok_path: str = gin.REQUIRED,
    item_tok_type: ItemTokType = "rqvae",
    num_levels: int = 3,
    codebook_size: int = 256,
    model_name: str = "Qwen/Qwen3.5-2B",
    max_seq_len: int = 20,
    include_item_samples: bool = True,
    include_future: bool = True,
    output_dir: str = gin.REQUIRED,
    batch_size: int = 512,
    seed: int = 42,
    templates: Sequence[str] = SEQUENCE_TEMPLATES,
    samples_per_user: int = 1,
    max_length: int | None = None,
    features: Features = "text",
    behaviour_weight: float = 1.0,
    behaviour_dims: int = 128,
) -> list[Path]:
    """Write the sample files of some parts of the histories.

    Args:
        root: folder of the data.
        split: ``beauty``, ``sports`` or ``toys``.
        seq_splits: of ``train``, ``eval``, ``test``.
        item_tok_path: a file of the tokenizer scripts, or a tokenizer artifact.
        item_tok_type: ``rqvae`` or ``rqkmeans``.
        num_levels: L that the item tokenizer must have.
        codebook_size: K that the item tokenizer must have.
        model_name: a model, by name or folder: its text tokenizer and chat template are used.
        max_seq_len: newest items of a history.
        include_item_samples: also write the item files: ``train`` has the items that tokenizers
            are fitted on, the others those that are not.
        include_future: whether the item that came next is what samples answer with. Without it
            that item is nowhere in the file, and the last of the history is asked for.
        output_dir: where to.
        batch_size: items encoded at a time.
        seed: of the draw of templates.
        templates: of :mod:`examples.data.chat_templates`, those of sequences to draw from.
        samples_per_user: how many different ones each user gets.
        max_length: longest sequence sample in tokens: longer ones lose their oldest items, down
            to the newest one. None keeps all. Fine-tuning cuts the end off, answer and all.
        features: of the item vectors, as the item tokenizer was fitted; this and the next two
            as of :meth:`~examples.data.reviews.AmazonReviews.vectors`.
        behaviour_weight: norm of the behaviour vectors.
        behaviour_dims: of the behaviour vectors.

    Returns:
        The files.

    Raises:
        ValueError: a parameter outside its range; an item tokenizer of another type, L, K or
            width; a model without a chat template.
        DataFolderError, OSError: data or model that cannot be read; a full disk.
    """
    from transformers import AutoTokenizer

    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1, or None")
    item_tok = load_item_tokenizer(
        item_tok_path, item_tok_type, num_levels=num_levels, codebook_size=codebook_size
    )
    reviews = AmazonReviews(root, split)
    datasets = {
        seq_split: UserSequenceDataset(reviews, split, seq_split, max_seq_len)
        for seq_split in seq_splits
    }
    aware = ItemAwareTokenizer(
        AutoTokenizer.from_pretrained(model_name),
        item_tok,
        num_levels=num_levels,
        codebook_size=codebook_size,
    )
    encoder = ChatEncoder(aware)
    vectors = reviews.vectors(
        features, behaviour_weight=behaviour_weight, behaviour_dims=behaviour_dims
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = encode_all_items(vectors, item_tok, aware, batch_size, device)
    maker = ChatMaker(reviews.text, codes.tolist())
    common = {
        "data": reviews.folder.name,
        "split": split,
        "model_name": model_name,
        "tokenizer_fingerprint": tokenizer_fingerprint(item_tok),
        "features": features,
        "max_seq_len": max_seq_len,
        "max_length": max_length,
        "include_future": include_future,
        "seed": seed,
    }

    written = []
    for seq_split, dataset in datasets.items():
        questions = list(_questions(dataset, include_future=include_future))
        rng = np.random.default_rng([seed, get_args(SeqSplit).index(seq_split)])
        files = {
            f"{split}_{seq_split}.pt": maker.sequence_chats(
                questions, templates, samples_per_user, rng
            )
        }
        if include_item_samples:
            mask = reviews.is_train if seq_split == "train" else ~reviews.is_train
            rows = mask.nonzero().squeeze(1).tolist()
            files[f"{split}_{seq_split}_item.pt"] = maker.item_chats(rows)
        for name, made in files.items():
            path = Path(output_dir) / name
            samples, chats = _encoded(path.name, list(made), encoder, maker, max_length)
            count = write_samples(
                path,
                samples,
                original_vocab_size=aware.original_vocab_size,
                num_levels=num_levels,
                codebook_size=codebook_size,
                meta={**common, "seq_split": seq_split, **_described(chats)},
            )
            _log.info("%s: %d samples", path, count)
            written.append(path)
    return written


def _encoded(
    name: str,
    chats: list[MadeChat],
    encoder: ChatEncoder,
    maker: ChatMaker,
    max_length: int | None,
) -> tuple[list[tuple[list[int], list[int]]], list[MadeChat]]:
    """Ids and labels of chats, and the chats as they are after shortening."""
    samples = []
    with progress_bar(name, len(chats)) as show:
        for done, made in enumerate(chats):
            sample = encoder.sample(made.chat["messages"])
            while max_length is not None and len(sample[0]) > max_length:
                shorter = maker.shortened(chats[done])
                if shorter is None:
                    break
                chats[done] = shorter
                sample = encoder.sample(shorter.chat["messages"])
            samples.append(sample)
            if done % 256 == 0:
                show(done)
    return samples, chats


def _questions(dataset: UserSequenceDataset, *, include_future: bool) -> Iterator[Question]:
    """A question of each user; without the future those with one item only have none."""
    for user, ids, following in zip(
        dataset.user_ids.tolist(), dataset.ids.tolist(), dataset.ids_fut.tolist(), strict=True
    ):
        history = tuple(row for row in ids if row != PADDING)
        if include_future:
            yield Question(user, history, following)
        elif len(history) > 1:
            yield Question(user, history[:-1], history[-1])


def _described(chats: Sequence[MadeChat]) -> dict[str, Any]:
    """What the samples were made of, for whoever evaluates them."""
    longest = max((len(one.question.history) for one in chats), default=0)
    padded = [
        [*one.question.history, *[PADDING] * (longest - len(one.question.history))] for one in chats
    ]
    return {
        "user_ids": torch.tensor([one.question.user for one in chats], dtype=torch.long),
        "targets": torch.tensor([one.question.target for one in chats], dtype=torch.long),
        "histories": torch.tensor(padded, dtype=torch.long).reshape(len(chats), longest),
        "templates": [one.template for one in chats],
    }


if __name__ == "__main__":
    run(main)
