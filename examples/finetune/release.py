"""From a fine-tuned model to a release."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.data.amazon import AmazonReviews
from examples.finetune.frame import chat_recipe
from examples.finetune.retrieval import ItemCatalog
from examples.trainer.card import commit_of, data_facts, model_card
from rectokens.artifacts.manifest import ParentRef
from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release import save_release
from rectokens.artifacts.store import ArtifactStore
from rectokens.artifacts.tokenizer import save_tokenizer
from rectokens.catalog.artifact import save_catalog
from rectokens.integrations.hf.tokenizer import ItemAwareTokenizer
from rectokens.tokenizers.quality import quality_report
from rectokens.tokenizers.residual import ResidualTokenizer

_SUMMARY = (
    "A language model of {parameters} parameters, fine-tuned on chats about items and histories "
    "of users. Its prompts are those of the chat template; the server's constrained search over "
    "the catalog of its release answers with items."
)
_PROTOCOL = (
    "Constrained recall on samples that are answered with an item, every item of the catalog "
    "competing, those of the history too. Items that share a semantic ID are ranked in the order "
    "of the catalog (training count, then a hash of the id).",
)


def write_release(
    folder: Path,
    model: Any,
    tokenizer: ItemAwareTokenizer,
    item_tok: ResidualTokenizer,
    items: ItemCatalog,
    reviews: AmazonReviews,
    vectors: Any,
    *,
    max_items: int,
    figures: Mapping[str, float],
    settings: Mapping[str, Any],
    report: Mapping[str, Any],
) -> Path:
    """Write tokenizer, catalog, model and release to ``folder/store``; the release is active then.

    Args:
        folder: of the run.
        model: the causal LM, not wrapped.
        tokenizer: with item tokens and a chat template.
        item_tok: that gave the codes.
        items: the catalog.
        reviews: the data.
        vectors: of all items, which ``item_tok`` encodes.
        max_items: newest items of a history in a prompt.
        figures: of the best evaluation; empty where there was none.
        settings: of the run, for the card.
        report: how training went, for the card.

    Raises:
        ValueError: the chat template has no fixed frame around a history.
        OSError: a full disk; there is no half artifact.
    """
    store = ArtifactStore(folder / "store")
    data = reviews.data
    quality = quality_report(item_tok, [vectors])
    fingerprint = items.catalog.tokenizer_fingerprint
    tokenizer_version = save_tokenizer(
        store.folder("tokenizer"),
        item_tok,
        report=quality,
        fitted_on={"data": data.name, "items": len(data.item_ids)},
    ).name
    catalog_path = save_catalog(
        store.folder("catalog"), items.catalog, tokenizer_version=tokenizer_version
    )
    card = model_card(
        summary=_SUMMARY,
        protocol=_PROTOCOL,
        data=data_facts(data, reviews.leave_one_out, quality["collision_rate"]),
        parameters=sum(p.numel() for p in model.parameters()),
        settings=settings,
        report=report,
        validation=figures,
        test=None,
        commit=commit_of(Path(__file__).parent),
    )
    model_path = save_model(
        store.folder("model"),
        model,
        RetrievalSpec(fingerprint, tokenizer.item_tokens, chat_recipe(tokenizer, max_items)),
        text_tokenizer=tokenizer,
        parents={"tokenizer": ParentRef(tokenizer_version, fingerprint)},
        numbers={f"validation_{name}": value for name, value in figures.items()},
        card=card,
    )
    release = save_release(
        folder / "store", model_path.name, catalog_path.name, numbers={"data": data.name}
    )
    open_release_store(folder / "store").activate(release.name)
    return release
