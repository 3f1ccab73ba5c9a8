"""Fine-tuning a tiny chat model on samples of a small data set."""

from __future__ import annotations

import csv

import gin
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.data.amazon import AmazonReviews, ItemData, PrecomputedSequenceDataset
from examples.evaluation.ranks import held_out_searches
from examples.finetune.model import LoraSettings, load_model, load_text_tokenizer, with_adapters
from examples.finetune.samples import TrainingSamples, collator
from examples.finetune.trainer import FinetuneTrainer
from examples.scripts.training.finetune_qwen import train
from examples.trainer.checkpoints import CheckpointError
from examples.utils import load_config
from rectokens.artifacts.release import load_release as load_release_manifest
from rectokens.integrations.hf import ItemAwareCausalLM, ItemAwareTokenizer
from rectokens.tokenizers.fitting import RQKMeansSettings, fit_rq_kmeans
from server.release import load_release
from server.settings import Settings


@pytest.fixture(autouse=True)
def _no_configuration():
    yield
    gin.clear_config()


@pytest.fixture
def world(finetune_world):
    return finetune_world


@pytest.fixture
def finetune(world, tmp_path):
    def call(**options):
        defaults = {
            "precomputed_path": str(world / "pre" / "beauty_train.pt"),
            "precomputed_eval_path": str(world / "pre" / "beauty_eval.pt"),
            "model_name": str(world / "model"),
            "num_levels": 2,
            "codebook_size": 8,
            "batch_size": 4,
            "grad_accum": 2,
            "num_epochs": 2,
            "lr": 5e-3,
            "max_length": 600,
            "output_dir": str(tmp_path / "out"),
            "amazon_root": str(world),
            "item_tok_path": str(world / "tok.pt"),
            "item_tok_type": "rqkmeans",
            "log_every": 2,
            "eval_every": 3,
            "device": "cpu",
            "progress_bar": False,
        }
        return train(**{**defaults, **options})

    return call


def logged(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_it_ends_in_a_model_and_a_release_that_asks_as_it_was_trained(finetune, world, tmp_path):
    final = finetune()
    assert isinstance(AutoModelForCausalLM.from_pretrained(final), ItemAwareCausalLM)
    tokenizer = ItemAwareTokenizer.from_pretrained(final)
    (path,) = (tmp_path / "out" / "store" / "releases").iterdir()
    release = load_release(Settings(release=path, device="cpu"))

    # Prompts of the release are those of the samples.
    samples = PrecomputedSequenceDataset(world / "pre" / "beauty_eval.pt")
    reviews = AmazonReviews(world)
    questions = reviews.leave_one_out.validation
    searches = held_out_searches(
        release.catalog, release.prompts, reviews.item_ids, questions, exclude_history=False
    )
    for sample, search in zip(samples, searches.requests, strict=True):
        answer = int((sample["labels"] != -100).nonzero()[0])
        assert int(sample["input_ids"][answer]) == tokenizer.item_sep_token_id
        assert list(search.prompt) == sample["input_ids"][: answer + 1].tolist()

    # And what it finds is what the best evaluation said.
    ranks = searches.ranks(release.engine, release.trie)
    recall = np.mean([rank is not None and rank <= 10 for rank in ranks])
    told = [float(v) for _, name, v in logged(tmp_path / "out") if name == "eval_recall@10"]
    assert len(told) >= 2
    manifest = load_release_manifest(path)
    card = (manifest.model_path / "README.md").read_text()
    assert recall == pytest.approx(max(told), abs=1e-4)
    assert f"| recall@10 | {max(told):.4f} |" in card
    assert "perplexity" in card
    assert "| precomputed_path | " in card


@pytest.mark.parametrize("rank", [0, 2])
def test_stopped_and_continued(finetune, tmp_path, monkeypatch, rank):
    config = tmp_path / "lora.gin"
    config.write_text(f"LoraSettings.rank = {rank}\n")
    load_config(config)
    straight = weights(finetune(output_dir=str(tmp_path / "straight")))
    original = FinetuneTrainer.training_step
    steps = iter(range(1000))

    def stopping(self, *args, **kwargs):
        if next(steps) == 9:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            finetune()
    continued = weights(finetune())
    assert straight.keys() == continued.keys()
    assert all(straight[name].equal(continued[name]) for name in straight)
    rows = [logged(tmp_path / name) for name in ("straight", "out")]
    assert [r for r in rows[0] if "@" in r[1]] == [r for r in rows[1] if "@" in r[1]]
    with pytest.raises(CheckpointError, match=r"lr 0\.005, now 0\.001"):
        finetune(lr=1e-3)


def test_aligning_trains_the_item_rows_alone(finetune, world):
    final = finetune(align_sid_finetuning=True, weight_decay=0.5, eval_every=0, num_epochs=1)
    before = load_model(
        str(world / "model"),
        load_text_tokenizer(str(world / "model"), 2, 8, expand=True),
        expand=True,
        seed=42,
    ).state_dict()
    after = weights(final)
    first = ItemAwareTokenizer.from_pretrained(final).original_vocab_size
    for name, value in after.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert value[:first].equal(before[name][:first])
            assert not value[first:].equal(before[name][first:])
        else:
            assert value.equal(before[name]), name


def test_adapters_are_merged_into_an_ordinary_model(finetune, world, tmp_path):
    config = tmp_path / "lora.gin"
    config.write_text("LoraSettings.rank = 4\n")
    load_config(config)
    final = finetune(num_epochs=1)
    plain = load_model(
        str(world / "model"),
        load_text_tokenizer(str(world / "model"), 2, 8, expand=True),
        expand=True,
        seed=42,
    )
    after = weights(final)
    assert after.keys() == plain.state_dict().keys()
    tokenizer = ItemAwareTokenizer.from_pretrained(final)
    first, rows = tokenizer.original_vocab_size, tokenizer.vocab_size
    assert "lora" in repr(with_adapters(plain.model, LoraSettings(rank=4), first, rows, 0)).lower()
    assert list((tmp_path / "out" / "store" / "releases").iterdir())


def test_a_model_that_was_saved_with_its_item_tokens(finetune, tmp_path):
    first = finetune(num_epochs=1, eval_every=0)
    options = {"model_name": str(first), "no_expand_vocab": True, "eval_every": 0}
    second = finetune(**options, num_epochs=1, output_dir=str(tmp_path / "again"))
    assert weights(first).keys() == weights(second).keys()
    with pytest.raises(ValueError, match="was saved with codebook_size 8; 16 was asked for"):
        finetune(**options, codebook_size=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 16}, "beauty_train.pt was made for codebook_size 8; the model's tok"),
        ({"num_levels": 3}, "was made for num_levels 2; the model's tokenizer has 3"),
        ({"precomputed_eval_path": None}, "give precomputed_eval_path to evaluate with"),
        ({"eval_every": 0, "patience": 2}, "patience is 2; give eval_every"),
        ({"item_eval_top_k": 30}, "item_eval_top_k is 30; allowed are 1 to item_eval_beam_size"),
        ({"max_length": 10}, r"none of the \d+ samples has at most 10 tokens"),
        ({"loss_on": "prompt"}, "loss_on is 'prompt'; allowed are 'all', 'items', 'text'"),
    ],
)
def test_what_does_not_fit_is_refused(finetune, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(**options)


def test_another_item_tokenizer_than_the_samples_is_refused(finetune, world, tmp_path):
    other = fit_rq_kmeans([ItemData(world).x], RQKMeansSettings(2, 8, style="kmeans", seed=9))
    other.save(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="was made with the item tokenizer"):
        finetune(item_tok_path=str(tmp_path / "other.pt"))


def test_packed_samples_do_not_see_each_other(world):
    """A packed batch has the loss of its samples alone, weighted by their labels."""
    name = str(world / "model")
    tokenizer = load_text_tokenizer(name, 2, 8, expand=True)
    model = load_model(name, tokenizer, expand=True, seed=1).model.eval()
    model.config.use_cache = False
    samples = TrainingSamples(
        PrecomputedSequenceDataset(world / "pre" / "beauty_train.pt"), 600, "all", "train"
    )
    chosen = [samples[at] for at in (0, 5, 9)]
    total = labels = 0
    with torch.no_grad():
        for sample in chosen:
            count = int((sample["labels"] != -100).sum())
            alone = model(**{name: value[None] for name, value in sample.items()})
            total, labels = total + count * float(alone.loss), labels + count
        packed = collator(packing=True, pad_token_id=0)(chosen)
        assert packed["input_ids"].shape[0] == 1
        padded = collator(packing=False, pad_token_id=0)(chosen)
        for batch in (packed, padded):
            assert float(model(**batch).loss) == pytest.approx(total / labels, rel=1e-4)


@pytest.mark.parametrize("loss_on", ["all", "items", "text"])
def test_what_the_loss_is_on(world, loss_on):
    file = PrecomputedSequenceDataset(world / "pre" / "beauty_train.pt")
    sample = TrainingSamples(file, 600, loss_on, "train")[0]
    learned = sample["labels"] != -100
    assert learned.any()
    assert sample["labels"][learned].equal(sample["input_ids"][learned])
    items = sample["input_ids"][learned] >= file.original_vocab_size
    assert {"all": items.any() and not items.all(), "items": items.all(), "text": not items.any()}[
        loss_on
    ]
