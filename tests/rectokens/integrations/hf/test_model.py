from __future__ import annotations

import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    Qwen3ForCausalLM,
)

import rectokens.integrations.hf as package
from rectokens.decoding import constrained_decoding
from rectokens.integrations.hf import (
    ItemAwareCausalLM,
    ItemAwareCausalLMConfig,
    ItemAwareTokenizer,
)
from rectokens.schemas.config import GenerationConfig as ItemGenerationConfig


def test_package_exports():
    assert sorted(package.__all__) == [
        "ItemAwareCausalLM",
        "ItemAwareCausalLMConfig",
        "ItemAwareTokenizer",
    ]


@pytest.fixture
def ids(aware):
    return torch.tensor([[4, 5, 6, 7], [*aware.item_tokens.encode([0, 1, 2]), 8]])


# Configuration ------------------------------------------------------------------------------


def test_config_round_trip(tmp_path):
    config = ItemAwareCausalLMConfig(3, 5, {"model_type": "qwen3", "hidden_size": 16})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ItemAwareCausalLMConfig
    assert (loaded.num_levels, loaded.codebook_size) == (3, 5)
    assert loaded.base_model_config == {"model_type": "qwen3", "hidden_size": 16}
    default = ItemAwareCausalLMConfig()
    assert (default.num_levels, default.codebook_size, default.base_model_config) == (4, 256, None)
    assert default.model_type == "item_aware_causal_lm"


def test_config_refuses_bad_sizes():
    with pytest.raises(ValueError, match="num_levels is 0"):
        ItemAwareCausalLMConfig(num_levels=0)


# Wrapping -----------------------------------------------------------------------------------


def test_from_module(make_model, aware, ids):
    inner = make_model(aware.original_vocab_size)
    before = inner.get_input_embeddings().weight.detach().clone()
    head_before = inner.get_output_embeddings().weight.detach().clone()
    model = ItemAwareCausalLM.from_causal_lm(inner, aware)
    assert model.model is inner
    assert model.get_input_embeddings() is inner.get_input_embeddings()
    assert model.get_output_embeddings() is inner.get_output_embeddings()
    for weight, old in (
        (model.get_input_embeddings().weight, before),
        (model.get_output_embeddings().weight, head_before),
    ):
        assert weight.shape == (aware.vocab_size, 16)
        assert torch.equal(weight[: len(old)], old)
    assert inner.config.vocab_size == aware.vocab_size
    assert (model.config.num_levels, model.config.codebook_size) == (3, 5)
    assert model.config.base_model_config == inner.config.to_dict()
    assert torch.equal(model(ids).logits, inner(ids).logits)


def test_new_rows_lie_at_the_mean_by_default(make_model, aware):
    inner = make_model(aware.original_vocab_size)
    ItemAwareCausalLM.from_causal_lm(inner, aware)
    weight = inner.get_input_embeddings().weight
    old, new = weight[: aware.original_vocab_size], weight[aware.original_vocab_size :]
    torch.testing.assert_close(new, old.mean(0).expand_as(new), atol=1e-4, rtol=0)


def test_shrinks_padded_embeddings(make_model, aware, ids):
    inner = make_model(aware.vocab_size + 13)
    before = inner.get_input_embeddings().weight.detach().clone()
    model = ItemAwareCausalLM.from_causal_lm(inner, aware)
    assert torch.equal(model.get_input_embeddings().weight, before[: aware.vocab_size])
    assert model(ids).logits.shape[-1] == aware.vocab_size


def test_loss_and_labels(make_model, aware, ids):
    model = ItemAwareCausalLM.from_causal_lm(make_model(aware.original_vocab_size), aware)
    out = model(ids, labels=ids)
    logits = out.logits[:, :-1].reshape(-1, aware.vocab_size)
    expected = nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    assert model(ids).loss is None
    assert model.accepts_loss_kwargs


def test_neither_model_nor_config():
    with pytest.raises(ValueError, match="base_model_config"):
        ItemAwareCausalLM(ItemAwareCausalLMConfig())


def test_wrapping_keeps_unusual_weights(make_bare, aware):
    # The constructor must not initialise weights that it did not make.
    inner = make_bare(aware.vocab_size, tied=False, head=True, resizes_head=True)
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    model = ItemAwareCausalLM(ItemAwareCausalLMConfig(), hf_model=inner)
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("resizes_head", [True, False])
def test_bare_modules(make_bare, aware, tied, resizes_head):
    inner = make_bare(aware.original_vocab_size, tied=tied, head=True, resizes_head=resizes_head)
    old = inner.embed.weight.detach().clone()
    old_head = inner.head.weight.detach().clone()
    old_bias = inner.head.bias.detach().clone()
    model = ItemAwareCausalLM.from_causal_lm(inner, aware, dtype="ignored")
    assert model.model is inner
    assert model.config.base_model_config is None
    assert torch.equal(inner.embed.weight[: len(old)], old)
    assert torch.equal(inner.head.weight[: len(old)], old_head)
    assert torch.equal(inner.head.bias[: len(old)], old_bias)
    assert inner.embed.weight.shape[0] == inner.head.weight.shape[0] == aware.vocab_size
    assert (inner.head.weight is inner.embed.weight) == tied
    logits = model(input_ids=torch.tensor([[aware.item_end_token_id]]))
    assert logits.shape == (1, 1, aware.vocab_size)
    assert not model.accepts_loss_kwargs


def test_bare_module_without_head(make_bare, aware):
    inner = make_bare(aware.original_vocab_size, tied=False, head=False, resizes_head=False)
    model = ItemAwareCausalLM.from_causal_lm(inner, aware)
    assert model.get_output_embeddings() is None
    assert model.get_input_embeddings().weight.shape[0] == aware.vocab_size


def test_resizing_that_does_not_resize_is_reported(make_bare, aware):
    inner = make_bare(aware.original_vocab_size, tied=False, head=False, resizes_head=False)
    inner.resize_token_embeddings = lambda rows: None
    with pytest.raises(ValueError, match="left"):
        ItemAwareCausalLM.from_causal_lm(inner, aware)


def test_set_embeddings_delegate(make_model, aware):
    model = ItemAwareCausalLM.from_causal_lm(make_model(aware.original_vocab_size), aware)
    embeddings, head = nn.Embedding(aware.vocab_size, 16), nn.Linear(16, aware.vocab_size)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.model.get_input_embeddings() is embeddings
    assert model.model.get_output_embeddings() is head


# Saving -------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_model, aware, tmp_path):
    model = ItemAwareCausalLM.from_causal_lm(make_model(aware.original_vocab_size), aware)
    with torch.no_grad():  # item rows that no initialisation would give
        weight = model.get_input_embeddings().weight
        weight[aware.original_vocab_size :].normal_()
    model.save_pretrained(tmp_path)
    aware.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, ItemAwareCausalLM])
def test_save_and_load(saved, ids, tmp_path, loader):
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is ItemAwareCausalLM
    assert type(loaded.model) is type(saved.model)
    assert torch.equal(loaded(ids).logits, saved(ids).logits)
    tied = saved.get_input_embeddings().weight is saved.get_output_embeddings().weight
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert all(key.startswith("model.") for key in file.keys())  # noqa: SIM118
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ItemAwareTokenizer


def test_loading_reports_nothing_missing(saved, tmp_path):
    _, info = ItemAwareCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_sharded_and_other_dtype(saved, ids, tmp_path):
    folder = tmp_path / "sharded"
    saved.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, saved(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(folder / "half")
    full = AutoModelForCausalLM.from_pretrained(folder / "half", dtype=torch.float32)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    torch.testing.assert_close(full(ids).logits, saved(ids).logits, atol=0.05, rtol=0.05)


def test_attention_implementation_reaches_the_inner_model(saved, tmp_path, ids):
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids).logits, saved(ids).logits)
    eager.set_attn_implementation("sdpa")
    assert eager.model.config._attn_implementation == "sdpa"


def test_attention_implementation_is_the_inner_models(aware, ids):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma2Config(vocab_size=aware.vocab_size, **shape, **heads)
    inner = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = ItemAwareCausalLM.from_causal_lm(inner, aware)
    assert model.config._attn_implementation == "eager"
    rebuilt = ItemAwareCausalLM(model.config)
    assert rebuilt(ids).logits.shape == (2, 4, aware.vocab_size)


def test_generation_config_survives(saved, tmp_path):
    saved.model.generation_config = GenerationConfig(eos_token_id=7, max_new_tokens=3)
    saved.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.generation_config.eos_token_id == 7
    assert loaded.model.generation_config.max_new_tokens == 3


@pytest.mark.parametrize("through", ["wrapper", "inner"])
def test_resize_after_wrapping_is_saved(saved, ids, tmp_path, through):
    rows = saved.get_input_embeddings().weight.shape[0] + 4
    (saved if through == "wrapper" else saved.model).resize_token_embeddings(rows)
    saved.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(ids).logits.shape[-1] == rows
    assert torch.equal(loaded(ids).logits, saved(ids).logits)


def test_from_causal_lm_on_a_plain_folder(make_model, aware, tmp_path):
    inner = make_model(aware.original_vocab_size)
    inner.save_pretrained(tmp_path)
    model = ItemAwareCausalLM.from_causal_lm(str(tmp_path), aware, torch_dtype=torch.bfloat16)
    assert type(model.model) is type(inner)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("init", ["mean", "codebook"])
def test_from_causal_lm_does_not_wrap_twice(saved, ids, tmp_path, aware, init):
    folder = ItemAwareCausalLM.from_causal_lm(tmp_path, aware, init_item_embeddings=init)
    assert type(folder.model) is type(saved.model)
    assert torch.equal(folder(ids).logits, saved(ids).logits)
    assert ItemAwareCausalLM.from_causal_lm(saved, aware) is saved


def test_from_causal_lm_on_a_folder_of_other_sizes(saved, tmp_path, text_tokenizer):
    other = ItemAwareTokenizer(text_tokenizer, num_levels=2, codebook_size=5)
    with pytest.raises(ValueError, match="num_levels 3; the item tokenizer has 2"):
        ItemAwareCausalLM.from_causal_lm(tmp_path, other)


# Training and generating --------------------------------------------------------------------


def test_gradient_checkpointing(make_model, aware, ids):
    model = ItemAwareCausalLM.from_causal_lm(make_model(aware.original_vocab_size), aware).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradient():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.get_input_embeddings().weight.grad.clone()

    plain = gradient()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in later transformers
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
    calls = []
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            inner = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *a, f=inner, **kw: (
                calls.append(1),
                f(*a, **kw),
            )[1]
    torch.testing.assert_close(gradient(), plain)
    assert len(calls) >= 2  # one a layer


def test_generate_without_trie(make_model, aware, ids):
    model = ItemAwareCausalLM.from_causal_lm(make_model(aware.original_vocab_size), aware)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=2)
    mask = torch.ones_like(ids)
    expected = model.model.generate(ids, attention_mask=mask, generation_config=config)
    out = model.generate(ids, generation_config=config, attention_mask=mask)
    assert torch.equal(out, expected)
    assert out.shape == (2, 7)
    with pytest.raises(ValueError, match="lm_head"):
        model.generate(ids, attr_path="lm_head")


def test_generate_with_trie_returns_catalog_items(make_model, aware, ids):
    model = ItemAwareCausalLM.from_causal_lm(make_model(aware.original_vocab_size), aware).eval()
    catalog = torch.tensor([[0, 1, 2], [0, 1, 3], [4, 4, 4], [2, 0, 1]])
    trie = aware.build_item_trie(catalog)
    config = ItemGenerationConfig(steps=3, k=2, beam_size=2, temperature=0.0)
    mask = torch.ones_like(ids)
    out = model.generate(ids, trie=trie, generation_config=config, attention_mask=mask)
    assert out.shape == (2, 2, 3)
    assert out.dtype == torch.long
    allowed = {tuple(aware.item_tokens.encode(row)) for row in catalog.tolist()}
    assert {tuple(row) for row in out.reshape(-1, 3).tolist()} <= allowed
    expected = constrained_decoding.autoregressive_generate(
        model.model, trie, ids, config, attention_mask=mask
    )
    assert torch.equal(out, expected)


def test_generate_with_trie_needs_a_config(make_model, aware, ids):
    model = ItemAwareCausalLM.from_causal_lm(make_model(aware.original_vocab_size), aware)
    with pytest.raises(ValueError, match="generation_config"):
        model.generate(ids, trie=aware.build_item_trie(torch.tensor([[0, 0, 0]])))


def test_model_type_is_registered(saved):
    rebuilt = AutoModelForCausalLM.from_config(saved.config)
    assert type(rebuilt) is ItemAwareCausalLM
    assert isinstance(rebuilt.model, (Qwen3ForCausalLM, type(saved.model)))
