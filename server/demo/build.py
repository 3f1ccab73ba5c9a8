"""Builds the demo's artifacts: tokenizer, model, catalog, and the release that binds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import ParentRef, read_manifest
from rectokens.artifacts.model import RetrievalSpec, load_model_manifest, save_model
from rectokens.artifacts.release import load_release, save_release
from rectokens.artifacts.store import ArtifactStore
from rectokens.artifacts.tokenizer import save_tokenizer, tokenizer_fingerprint
from rectokens.catalog.artifact import load_catalog, save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.integrations.hf import ItemAwareCausalLM, ItemAwareTokenizer
from rectokens.prompts.builder import PromptBuilder
from rectokens.prompts.registry import prompt_builder
from rectokens.tokenizers.fitting import RQKMeansSettings, fit_rq_kmeans
from rectokens.tokenizers.quality import quality_report
from server.demo.data import DemoData, item_counts, leave_one_out
from server.demo.evaluate import sample_questions
from server.demo.recipe import DemoRecipe, ModelSize, recipe_key
from server.demo.samples import SampleMaker
from server.demo.text import BOS_TOKEN, PAD_TOKEN, fit_text_tokenizer
from server.demo.training import Progress, TrainReport, train

_RECIPE_NUMBER = "demo_recipe"


@dataclass(frozen=True, slots=True)
class BuildEvents:
    """Whom to tell how the build goes.

    Attributes:
        stage: called with a line when a stage begins.
        progress: called after every training step.
    """

    stage: Callable[[str], None] = lambda _: None
    progress: Callable[[Progress], None] | None = None


def find_release(out: Path, key: str) -> Path | None:
    """The release in the store ``out`` that was built with this key, checked; None without one.

    Raises:
        ArtifactError: there is one and it is damaged; names the file.
    """
    store = ArtifactStore(out)
    for version in store.versions("release"):
        path = store.path("release", version)
        try:
            built_with = read_manifest(path).numbers.get(_RECIPE_NUMBER)
        except ArtifactError:
            continue  # whichever it was, another recipe need not care
        if built_with == key:
            release = load_release(path)
            load_model_manifest(release.model_path)
            load_catalog(release.catalog_path)
            return path
    return None


def build_release(
    data: DemoData, out: Path, recipe: DemoRecipe, events: BuildEvents | None = None
) -> Path:
    """Build a release from data, unless the store has it already.

    Args:
        data: what to learn from; test items are not looked at.
        out: root of the artifact store.
        recipe: how.
        events: whom to tell.

    Returns:
        The release folder.

    Raises:
        ValueError: data that cannot be trained on (no user with three items).
        ArtifactError: the store holds damaged artifacts of this recipe.
    """
    events = events or BuildEvents()
    key = recipe_key(recipe, data)
    existing = find_release(out, key)
    if existing is not None:
        events.stage(f"using the release built before: {existing}")
        return existing

    store = ArtifactStore(out)
    split = leave_one_out(data.sequences)
    if not split.train:
        raise ValueError(f"none of the {split.skipped} users has three items; nothing to learn")

    events.stage(
        f"fitting {recipe.num_levels} x {recipe.codebook_size} codes "
        f"to {len(data.item_ids):,} items"
    )
    vectors = torch.from_numpy(data.embeddings)
    tokenizer = fit_rq_kmeans(
        [vectors],
        RQKMeansSettings(
            num_levels=recipe.num_levels,
            codebook_size=recipe.codebook_size,
            style=recipe.codebook_style,
            seed=recipe.seed,
        ),
    )
    fingerprint = tokenizer_fingerprint(tokenizer)
    codes = tokenizer.encode(vectors).codes
    tokenizer_path = save_tokenizer(
        store.folder("tokenizer"),
        tokenizer,
        report=quality_report(tokenizer, [vectors]),
        fitted_on={"data": data.name, "items": len(data.item_ids), "seed": recipe.seed},
    )

    events.stage("building the catalog")
    counts = item_counts(split.train, len(data.item_ids))
    catalog_path = save_catalog(
        store.folder("catalog"),
        build_catalog(
            data.item_ids,
            codes,
            codebook_size=recipe.codebook_size,
            tokenizer_fingerprint=fingerprint,
            prior=counts.tolist(),
            metadata=data.metadata,
        ),
        tokenizer_version=tokenizer_path.name,
    )

    text_tokenizer = ItemAwareTokenizer(
        fit_text_tokenizer(data.texts, recipe.text_vocab_size),
        tokenizer,
        num_levels=recipe.num_levels,
        codebook_size=recipe.codebook_size,
    )
    spec = RetrievalSpec(
        tokenizer_fingerprint=fingerprint,
        item_tokens=text_tokenizer.item_tokens,
        prompt=recipe.prompt(text_tokenizer.convert_tokens_to_ids(BOS_TOKEN)),
    )
    builder = prompt_builder(spec.prompt, spec.item_tokens, text_tokenizer)
    model = new_model(text_tokenizer, builder, recipe.model, recipe.seed)
    maker = SampleMaker(data, codes.numpy().astype(np.int64), builder, recipe.augmentation)
    questions = sample_questions(split.validation, recipe.validation_users, recipe.seed)

    events.stage(
        f"training {sum(p.numel() for p in model.parameters()):,} parameters "
        f"on {len(split.train):,} users"
    )
    report = train(
        model,
        spec.item_tokens,
        split.train,
        [maker.question(question) for question in questions],
        maker,
        text_tokenizer.convert_tokens_to_ids(PAD_TOKEN),
        recipe.train,
        seed=recipe.seed,
        report=events.progress,
    )
    model_path = save_model(
        store.folder("model"),
        model,
        spec,
        text_tokenizer=text_tokenizer,
        parents={"tokenizer": ParentRef(tokenizer_path.name, fingerprint)},
        numbers=_numbers(report),
    )
    release = save_release(
        out, model_path.name, catalog_path.name, numbers={_RECIPE_NUMBER: key, "data": data.name}
    )
    events.stage(
        f"built {release} in {report.seconds:.0f} s of training "
        f"({report.tokens_per_second:,.0f} tokens/s, validation loss {report.validation_loss:.3f})"
    )
    return release


def new_model(
    text_tokenizer: ItemAwareTokenizer, builder: PromptBuilder, size: ModelSize, seed: int
) -> Any:
    """A Qwen3 language model with fresh weights; codes start at their place in the codebooks."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    positions = builder.max_prompt_tokens + text_tokenizer.num_levels + 1
    config = Qwen3Config(
        vocab_size=text_tokenizer.original_vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        head_dim=size.hidden_size // size.num_heads,
        max_position_embeddings=1 << (positions - 1).bit_length(),
        tie_word_embeddings=True,
        # Of unit scale at the head: normalised states times rows of this size.
        initializer_range=size.hidden_size**-0.5,
        bos_token_id=text_tokenizer.convert_tokens_to_ids(BOS_TOKEN),
        eos_token_id=None,
        pad_token_id=text_tokenizer.convert_tokens_to_ids(PAD_TOKEN),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        ItemAwareCausalLM.from_causal_lm(
            model, text_tokenizer, init_item_embeddings="codebook", seed=seed
        )
    return model


def _numbers(report: TrainReport) -> dict[str, float | int | str]:
    return {
        "validation_loss": report.validation_loss,
        "best_epoch": report.best_epoch,
        "epochs": report.epochs,
        "steps": report.steps,
        "train_seconds": round(report.seconds, 1),
    }
