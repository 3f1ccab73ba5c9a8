"""Fine-tunes a causal language model on precomputed samples; takes a gin file.

Writes the model to ``output_dir/final`` and, where the item tokenizer is named, a release to
``output_dir/store`` that a server takes as it is. ``python -m
examples.scripts.training.finetune_qwen examples/configs/finetuning/finetune_qwen_beauty.gin``;
the same command goes on where it was stopped.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gin
import torch

from examples.data.amazon import AmazonReviews
from examples.data.item_codes import ItemTokType, encode_all_items, load_item_tokenizer
from examples.data.precomputed import PrecomputedSequenceDataset
from examples.data.reviews import Features
from examples.finetune.model import (
    LoraSettings,
    load_model,
    load_text_tokenizer,
    require_same_item_tokenizer,
    require_same_vocabulary,
    train_item_rows_only,
    with_adapters,
)
from examples.finetune.release import write_release
from examples.finetune.retrieval import ItemCatalog, recalls, sample_searches, search_in_training
from examples.finetune.samples import TrainingSamples, collator
from examples.finetune.trainer import FinetuneTrainer, finetuning_arguments
from examples.utils import run
from rectokens.artifacts.tokenizer import tokenizer_fingerprint
from rectokens.integrations.hf.collator import LossOn

_log = logging.getLogger(__name__)
gin.external_configurable(LoraSettings, "LoraSettings")


@gin.configurable
def train(
    precomputed_path: str = gin.REQUIRED,
    precomputed_eval_path: str | None = None,
    model_name: str = "Qwen/Qwen3.5-2B",
    num_levels: int = 3,
    codebook_size: int = 256,
    batch_size: int = 8,
    grad_accum: int = 4,
    num_epochs: float = 3,
    lr: float = 2e-4,
    weight_decay: float = 1e-2,
    max_length: int = 256,
    no_expand_vocab: bool = False,
    align_sid_finetuning: bool = False,
    output_dir: str = gin.REQUIRED,
    log_every: int = 10,
    save_every: int = 5000,
    eval_every: int = 0,
    bf16: bool = False,
    wandb_project: str | None = None,
    run_name: str | None = None,
    amazon_root: str = "data/amazon",
    amazon_split: str = "beauty",
    item_tok_path: str | None = None,
    item_tok_type: ItemTokType = "rqvae",
    item_eval_beam_size: int = 20,
    item_eval_top_k: int = 10,
    item_eval_examples: int | None = 200,
    loss_on: LossOn = "all",
    gradient_checkpointing: bool = False,
    packing: bool = True,
    patience: int = 0,
    features: Features = "text",
    behaviour_weight: float = 1.0,
    behaviour_dims: int = 128,
    encode_batch_size: int = 512,
    seed: int = 42,
    device: str = "auto",
    progress_bar: bool = True,
) -> Path:
    """Fine-tune; ``LoraSettings`` is configurable too.

    Args:
        precomputed_path: samples to train on, of ``precompute_sequences``.
        precomputed_eval_path: samples to evaluate with; needed by ``eval_every``.
        model_name: a model with a chat template, by name or folder.
        num_levels, codebook_size: L and K of the samples.
        batch_size, grad_accum: samples of a forward pass, and passes of a step.
        num_epochs, lr, weight_decay: of AdamW, the rate falling by half a cosine.
        max_length: longest sample in tokens; longer ones are left out and counted.
        no_expand_vocab: the model was saved with its item tokens.
        align_sid_finetuning: train the rows of the item tokens alone (without weight decay).
        output_dir: of checkpoints, figures, ``final`` and ``store``.
        log_every, save_every: steps between figures, and between checkpoints.
        eval_every: steps between evaluations, each with a checkpoint; 0 for none. The best one
            is kept.
        bf16: take steps in bfloat16; weights stay float32.
        wandb_project, run_name: log to Weights & Biases too.
        amazon_root, amazon_split: the data, for its items.
        item_tok_path, item_tok_type: the item tokenizer of the samples; named, evaluations tell
            constrained Recall@1/5/10 (temperature 0) and training ends in a release.
        item_eval_beam_size, item_eval_top_k: of those searches.
        item_eval_examples: samples that are asked about; None for all.
        loss_on: ``all`` of the answer, its ``items`` or its ``text`` alone.
        gradient_checkpointing: compute activations anew instead of keeping them.
        packing: samples of a batch one behind the other in one row, without padding.
        patience: evaluations without a better Recall@10 after which training ends; 0 for none.
        features, behaviour_weight, behaviour_dims: of the item vectors, as the samples'.
        encode_batch_size: items encoded at a time.
        seed: of everything.
        device: ``auto`` (CUDA where there is one) or ``cpu``.
        progress_bar: show one.

    Returns:
        ``output_dir/final``.

    Raises:
        ValueError: samples of another vocabulary or item tokenizer; a parameter out of range.
        OSError: a full disk; the checkpoint before is whole.
    """
    if eval_every > 0 and precomputed_eval_path is None:
        raise ValueError("eval_every is above 0; give precomputed_eval_path to evaluate with")
    if eval_every == 0 and patience > 0:
        raise ValueError(f"patience is {patience}; give eval_every, the steps between evaluations")
    if item_eval_top_k > item_eval_beam_size:
        raise ValueError(
            f"item_eval_top_k is {item_eval_top_k}; allowed are 1 to item_eval_beam_size, "
            f"{item_eval_beam_size}"
        )
    lora: LoraSettings = gin.get_configurable("LoraSettings")()
    if lora.rank and align_sid_finetuning:
        raise ValueError("align_sid_finetuning trains the item tokens alone; set LoRA's rank to 0")

    tokenizer = load_text_tokenizer(
        model_name, num_levels, codebook_size, expand=not no_expand_vocab
    )
    samples = PrecomputedSequenceDataset(precomputed_path)
    require_same_vocabulary(samples, precomputed_path, tokenizer)
    evaluation = None
    if precomputed_eval_path is not None:
        evaluation = PrecomputedSequenceDataset(precomputed_eval_path)
        require_same_vocabulary(evaluation, precomputed_eval_path, tokenizer)

    reviews, items, item_tok, fingerprint, vectors = None, None, None, None, None
    if item_tok_path is not None:
        item_tok = load_item_tokenizer(
            item_tok_path, item_tok_type, num_levels=num_levels, codebook_size=codebook_size
        )
        fingerprint = tokenizer_fingerprint(item_tok)
        require_same_item_tokenizer(samples, precomputed_path, fingerprint)
        reviews = AmazonReviews(amazon_root, amazon_split)
        vectors = reviews.vectors(
            features, behaviour_weight=behaviour_weight, behaviour_dims=behaviour_dims
        )
        codes = encode_all_items(vectors, item_tok, tokenizer, encode_batch_size, "cpu")
        items = ItemCatalog.of(reviews, codes, codebook_size, fingerprint)

    wrapped = load_model(model_name, tokenizer, expand=not no_expand_vocab, seed=seed)
    model: Any = wrapped.model
    model.config.use_cache = False  # a cache would hide where packed samples begin
    if align_sid_finetuning:
        train_item_rows_only(model, tokenizer.original_vocab_size)
    trained = model
    if lora.rank:
        first, rows = tokenizer.original_vocab_size, tokenizer.vocab_size
        trained = with_adapters(model, lora, first, rows, seed)

    judge = None
    if evaluation is not None and items is not None:
        searches = sample_searches(
            evaluation,
            items,
            tokenizer.item_sep_token_id,
            beam_width=item_eval_beam_size,
            top_k=item_eval_top_k,
            num_examples=item_eval_examples,
            seed=seed,
        )

        def judge(current: Any) -> dict[str, float]:
            inner = current.get_base_model() if lora.rank else current
            return recalls(
                search_in_training(inner, tokenizer.item_tokens, searches, items, batch_size)
            )

    settings = {
        "precomputed_path": precomputed_path,
        "model_name": model_name,
        "batch_size": batch_size,
        "grad_accum": grad_accum,
        "num_epochs": num_epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "max_length": max_length,
        "loss_on": loss_on,
        "packing": packing,
        "align_sid_finetuning": align_sid_finetuning,
        "lora_rank": lora.rank,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": fingerprint,
        "seed": seed,
    }
    trainer = FinetuneTrainer(
        model=trained,
        args=finetuning_arguments(
            Path(output_dir),
            batch_size=batch_size,
            grad_accum=grad_accum,
            num_epochs=num_epochs,
            lr=lr,
            weight_decay=0.0 if align_sid_finetuning else weight_decay,
            log_every=log_every,
            save_every=save_every,
            eval_every=eval_every,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            judged=judge is not None,
            wandb_project=wandb_project,
            run_name=run_name,
            progress_bar=progress_bar,
            use_cpu=device == "cpu" or not torch.cuda.is_available(),
        ),
        train_dataset=TrainingSamples(samples, max_length, loss_on, precomputed_path),
        eval_dataset=None
        if evaluation is None
        else TrainingSamples(evaluation, max_length, loss_on, str(precomputed_eval_path)),
        data_collator=collator(packing=packing, pad_token_id=tokenizer.pad_token_id or 0),
        run_settings=settings,
        judge=judge,
        patience=patience,
    )
    trainer.train_on()
    if lora.rank:
        wrapped.model = model = trainer.model.merge_and_unload()
    model.config.use_cache = True
    final = Path(output_dir) / "final"
    wrapped.save_pretrained(final)
    tokenizer.save_pretrained(final)
    _log.info("model: %s", final)
    if reviews is not None and items is not None and item_tok is not None:
        release = write_release(
            Path(output_dir),
            model,
            tokenizer,
            item_tok,
            items,
            reviews,
            vectors,
            max_items=int(samples.meta.get("max_seq_len", 20)),
            figures=trainer.best_figures(),
            settings=settings,
            report={"steps": trainer.state.global_step, "torch": torch.__version__},
        )
        _log.info("release: %s", release)
    return final


if __name__ == "__main__":
    run(train)
