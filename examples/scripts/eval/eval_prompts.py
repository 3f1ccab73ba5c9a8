"""Shows what a fine-tuned model answers to prompts; takes a gin file.

``python -m examples.scripts.eval.eval_prompts examples/configs/finetuning/eval_prompts_beauty.gin``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gin
import torch

from examples.data.chat_encoding import ChatEncoder
from examples.data.item_codes import ItemTokType
from examples.data.reviews import Features
from examples.finetune.chat_model import ChatModel, load_chat_model
from examples.finetune.generated import Leaves, generate_codes
from examples.utils import run
from rectokens.core.tokenizer import TokenSequence
from rectokens.core.validation import check_at_least_one
from rectokens.decoding.interleaved_generation import generate_with_item_constraints
from rectokens.prompts.markup import ItemMention, split_mentions

Answer = dict[str, Any]


@gin.configurable
def main(
    model_dir: str = gin.REQUIRED,
    item_tok_path: str = gin.REQUIRED,
    prompts: Sequence[str] = gin.REQUIRED,
    hf_model_name: str | None = None,
    num_levels: int = 3,
    codebook_size: int = 256,
    beam_prompts: Sequence[str] = (),
    num_beams: int = 4,
    beam_size: int = 4,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    item_tok_type: ItemTokType = "rqvae",
    root: str = "data/amazon",
    split: str = "beauty",
    encode_batch_size: int = 512,
    bf16: bool = False,
    seed: int = 42,
    attr_path: str | None = None,
    features: Features = "text",
    behaviour_weight: float = 1.0,
    behaviour_dims: int = 128,
    device: str = "auto",
) -> dict[str, list[Answer]]:
    """Print the answers.

    A prompt is what a user says; ``<item:B001>`` in it stands for that item. To ``prompts`` the
    model answers freely, every item in the answer being a real one. For ``beam_prompts`` the best
    items are searched for.

    Args:
        model_dir: a model that ``finetune_qwen`` wrote.
        item_tok_path, item_tok_type: its item tokenizer.
        prompts: answered freely.
        hf_model_name: where the text tokenizer is from if not from ``model_dir``.
        num_levels, codebook_size: L and K that the item tokenizer must have.
        beam_prompts: answered with ``num_beams`` semantic IDs.
        num_beams: semantic IDs of an answer, at most ``beam_size``.
        beam_size: W of the search.
        max_new_tokens: of a free answer.
        do_sample, temperature: draw the tokens of a free answer instead of taking the best.
        root, split: the data.
        encode_batch_size: items encoded at a time.
        bf16: weights in bfloat16.
        seed: of the draws.
        attr_path: dotted path of the model's output layer, to compute it for children only while
            searching; None leaves it.
        features, behaviour_weight, behaviour_dims: of the item vectors, as in training.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        ``prompts``: each with ``prompt`` and ``text``; ``beam_prompts``: each with ``prompt`` and
        ``items``, best first, of ``semantic_id``, ``score`` and the ids and texts of its items.

    Raises:
        ValueError: a prompt that names an unknown item; a parameter out of range.
    """
    check_at_least_one(num_beams=num_beams, max_new_tokens=max_new_tokens)
    if num_beams > beam_size:
        raise ValueError(f"num_beams is {num_beams}; allowed are 1 to beam_size, {beam_size}")
    loaded = load_chat_model(
        model_dir,
        hf_model_name,
        item_tok_path,
        item_tok_type,
        num_levels=num_levels,
        codebook_size=codebook_size,
        root=root,
        split=split,
        features=features,
        behaviour_weight=behaviour_weight,
        behaviour_dims=behaviour_dims,
        encode_batch_size=encode_batch_size,
        bf16=bf16,
        device=device,
    )
    speaker = _Speaker(loaded)
    torch.manual_seed(seed)
    answers: dict[str, list[Answer]] = {"prompts": [], "beam_prompts": []}
    for prompt in prompts:
        text = speaker.free(prompt, max_new_tokens, do_sample=do_sample, temperature=temperature)
        answers["prompts"].append({"prompt": prompt, "text": text})
        print(f"\n> {prompt}\n{text}")
    for prompt in beam_prompts:
        items = speaker.search(prompt, beam_size, attr_path)[:num_beams]
        answers["beam_prompts"].append({"prompt": prompt, "items": items})
        print(f"\n> {prompt}")
        for item in items:
            named = "; ".join(f"{i} {text}" for i, text in item["items"].items())
            print(f"{item['score']:8.3f}  {item['semantic_id']}  {named}")
    return answers


class _Speaker:
    """Puts prompts to a model."""

    def __init__(self, loaded: ChatModel) -> None:
        self._loaded = loaded
        self._encoder = ChatEncoder(loaded.tokenizer)
        catalog = loaded.items.catalog
        self._catalog, self._leaves = catalog, Leaves(catalog)
        reviews = loaded.reviews
        self._texts: Mapping[str, str] = dict(zip(reviews.item_ids, reviews.text, strict=True))

    def free(self, prompt: str, max_new_tokens: int, *, do_sample: bool, temperature: float) -> str:
        loaded = self._loaded
        tokens = loaded.tokenizer
        found = generate_with_item_constraints(
            loaded.model,
            torch.tensor([self._prompt(prompt)], device=loaded.model.device),
            loaded.trie,
            tokens.item_sep_token_id,
            tokens.num_levels,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            eos_token_id=tokens.eos_token_id,
        )
        ids = [token for token in found.tolist() if token != tokens.eos_token_id]
        said = []
        for part in tokens.decode_sequence(ids):
            if isinstance(part, TokenSequence):
                names = self._catalog.ids_of(self._leaves.items(part.codes.tolist()))
                said.append(f"<item:{'|'.join(names)}>")
            else:
                said.append(part)
        return "".join(said).strip()

    def search(self, prompt: str, beam_size: int, attr_path: str | None) -> list[Answer]:
        start = self._loaded.tokenizer.item_sep_token_id
        ids = [*self._prompt(prompt), start]
        codes, scores = generate_codes(self._loaded, ids, beam_size, attr_path)
        return [
            {"semantic_id": one, "score": score, "items": self._described(one)}
            for one, score in zip(codes, scores, strict=True)
        ]

    def _described(self, codes: Sequence[int]) -> dict[str, str]:
        names = self._catalog.ids_of(self._leaves.items(codes))
        return {name: self._texts[name] for name in names}

    def _prompt(self, prompt: str) -> list[int]:
        parts: list[dict[str, Any]] = []
        for piece in split_mentions(prompt, keep_blank=True):
            if isinstance(piece, ItemMention):
                index = self._catalog.index_of([piece.item_id])
                if int(index[0]) < 0:
                    raise ValueError(f"the data has no item {piece.item_id!r}: {prompt!r}")
                codes = self._catalog.codes_of(index)[0].tolist()
                parts.append({"type": "item", "codes": codes})
            else:
                parts.append({"type": "text", "text": piece})
        if not parts:
            raise ValueError("a prompt is empty; say something")
        return self._encoder.prompt([{"role": "user", "content": parts}])


if __name__ == "__main__":
    run(main)
