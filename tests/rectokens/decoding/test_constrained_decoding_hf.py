"""Constrained decoding of real architectures, with their caches, against enumeration."""

import pytest
import torch

from rectokens.decoding.constrained_decoding import (
    autoregressive_generate,
    decode_one_step,
    generate_with_item_constraints,
)
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig
from rectokens.schemas.state import ConstrainedGenerationState, ConstraintState

V = 64
# Item tokens as a real vocabulary has them: one block of 6 ids a level, after the text.
CODES = torch.cartesian_prod(*[torch.arange(6)] * 3)[::7]
ITEMS = CODES + 40 + 6 * torch.arange(3)
LEAVES = sorted(tuple(i) for i in ITEMS.tolist())
TRIE = CompactCSRTrie.from_sorted_batch(ITEMS, V, 1)
PROMPTS = [[3, 5, 8, 13], [21], [34, 1]]
PADDED = torch.tensor([[0] * (4 - len(p)) + p for p in PROMPTS])
MASK = torch.tensor([[0] * (4 - len(p)) + [1] * len(p) for p in PROMPTS])
KINDS = ["qwen3", "llama", "mistral-sliding", "gemma2", "gpt2"]


@pytest.fixture(params=KINDS)
def model(request, tiny_lm):
    if request.param != "gpt2":
        return tiny_lm(request.param, V)
    # Positions are absolute here: left padding is right only with position_ids.
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=64)
        network = GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.25)
    return network.eval()


def enumerated(model, prompt):
    """Every item with its score, best first, from forwards over prompt and item together."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *leaf] for leaf in LEAVES])).logits.double()
    scores = []
    for row, leaf in enumerate(LEAVES):
        total = 0.0
        for step, token in enumerate(leaf):
            children = sorted({x[step] for x in LEAVES if x[:step] == leaf[:step]})
            at = logits[row, len(prompt) - 1 + step, children].log_softmax(0)
            total += float(at[children.index(token)])
        scores.append(total)
    return sorted(zip(LEAVES, scores, strict=True), key=lambda pair: -pair[1])


@pytest.mark.parametrize(
    ("kernel", "path"),
    [("default", None), ("default", "lm_head"), ("topk", "lm_head"), ("sample", "lm_head")],
)
def test_all_leaves_in_exact_order(model, kernel, path):
    k = len(LEAVES) + 3
    config = GenerationConfig(3, k, k, 0.0, kernel)
    head = model.lm_head
    ids, scores = autoregressive_generate(
        model, TRIE, PADDED, config, path, attention_mask=MASK, return_scores=True
    )
    assert model.lm_head is head
    for b, prompt in enumerate(PROMPTS):
        exact = enumerated(model, prompt)
        n = len(exact)
        assert torch.allclose(scores[b, :n], torch.tensor([s for _, s in exact]).float(), atol=1e-4)
        # Neighbours closer than the arithmetic may change places, nothing else may.
        wanted = dict(exact)
        assert {tuple(i) for i in ids[b, :n].tolist()} == set(wanted)
        for sequence, score in zip(ids[b, :n].tolist(), scores[b, :n].tolist(), strict=True):
            assert score == pytest.approx(wanted[tuple(sequence)], abs=1e-4)
        assert (ids[b, n:] == -1).all()
        assert (scores[b, n:] == -torch.inf).all()


@pytest.mark.parametrize("dense", [1, 2])
def test_a_batch_equals_each_prompt_alone(model, dense):
    trie = CompactCSRTrie.from_sorted_batch(ITEMS, V, dense)
    config = GenerationConfig(3, k=4, beam_size=5, temperature=0.0)
    ids, scores = autoregressive_generate(
        model, trie, PADDED, config, attention_mask=MASK, return_scores=True
    )
    for b, prompt in enumerate(PROMPTS):
        alone = autoregressive_generate(
            model, trie, torch.tensor([prompt]), config, return_scores=True
        )
        assert torch.equal(ids[b], alone[0][0])
        torch.testing.assert_close(scores[b], alone[1][0], atol=1e-4, rtol=0)


def test_the_cache_has_a_row_for_each_beam_from_the_first_step(tiny_lm):
    model = tiny_lm("qwen3", V)
    config = GenerationConfig(3, k=4, beam_size=4, temperature=0.0)
    state = ConstrainedGenerationState(config, ConstraintState(0, TRIE, None))
    ids = PADDED
    for step in range(3):
        with torch.no_grad():
            state = decode_one_step(
                constrained_generation_state=state,
                model_fwd=model,
                input_ids=ids,
                attention_mask=MASK,
            )
        keys = state.generation_state.past_key_values.layers[0].keys
        assert keys.shape[0] == 12
        assert keys.shape[2] == 4 + step
        ids = state.generation_state.generated_ids.reshape(12, -1)[:, -1:]


def test_layers_with_recurrent_states():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3NextForCausalLM(
            Qwen3NextConfig(
                vocab_size=V,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                linear_num_key_heads=2,
                linear_num_value_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
                mlp_only_layers=[0, 1],
                num_experts=2,
            )
        ).eval()
        with torch.no_grad():
            model.lm_head.weight.normal_()
    config = GenerationConfig(3, k=len(LEAVES), beam_size=len(LEAVES), temperature=0.0)
    prompt = PROMPTS[0]
    ids, scores = autoregressive_generate(
        model, TRIE, torch.tensor([prompt]), config, return_scores=True
    )
    exact = dict(enumerated(model, prompt))
    assert {tuple(i) for i in ids[0].tolist()} == set(exact)
    for sequence, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True):
        assert score == pytest.approx(exact[tuple(sequence)], abs=1e-3)


def test_a_model_left_in_training_mode_keeps_its_cache(tiny_lm):
    model = tiny_lm("qwen3", V)
    config = GenerationConfig(3, k=3, beam_size=3, temperature=0.0)
    expected = autoregressive_generate(model, TRIE, PADDED, config, attention_mask=MASK)
    model.gradient_checkpointing_enable()
    model.train()
    found = autoregressive_generate(model, TRIE, PADDED, config, "lm_head", attention_mask=MASK)
    assert torch.equal(found, expected)
    assert all(m.training for m in model.modules())
    model.gradient_checkpointing_disable()
    model.eval()


def test_interleaved_generation_equals_whole_forwards(model):
    separator, prompt = 7, [3, 5, 7]
    new = generate_with_item_constraints(
        model, torch.tensor([prompt]), TRIE, separator, 3, max_new_tokens=10
    )
    ids = prompt + new.tolist()
    assert tuple(new[:3].tolist()) in LEAVES
    for at in range(6, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:at]])).logits[0, -1]
        since = ids[:at][::-1].index(separator)
        if since >= 3:
            assert ids[at] == int(logits.argmax())
