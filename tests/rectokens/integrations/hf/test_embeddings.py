from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rectokens.integrations.hf import ItemAwareCausalLM, ItemAwareTokenizer
from rectokens.integrations.hf.embeddings import codebook_rows, resize_and_initialize
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer
from rectokens.tokenizers.rqvae import RQVAETokenizer


def rq(attribute, codebooks):
    """Something with residual levels, as RQ-VAE (`rq`) and RQ-KMeans (`_rq`) have them."""
    levels = [SimpleNamespace(codebook=SimpleNamespace(embeddings=c)) for c in codebooks]
    return SimpleNamespace(**{attribute: SimpleNamespace(levels=levels)})


@pytest.fixture
def codebooks():
    generator = torch.Generator().manual_seed(3)
    # Later levels are smaller, as residuals are.
    return [torch.randn(5, 6, generator=generator) * 0.1**level for level in range(3)]


@pytest.mark.parametrize("hidden", [6, 16, 33])
def test_geometry_is_kept_and_the_scale_is_that_of_existing_rows(codebooks, hidden):
    existing = torch.randn(40, hidden) * 0.3 + 2.0
    scale = (existing - existing.mean(0)).norm(dim=1).square().mean().sqrt()
    for codebook, rows in zip(codebooks, codebook_rows(codebooks, existing), strict=True):
        assert rows.shape == (5, hidden)
        torch.testing.assert_close(rows.mean(0), existing.mean(0))
        spread = (rows - rows.mean(0)).norm(dim=1).square().mean().sqrt()
        torch.testing.assert_close(spread, scale)
        distances, before = torch.cdist(rows, rows), torch.cdist(codebook, codebook)
        torch.testing.assert_close(distances / distances.max(), before / before.max())


def test_fewer_dimensions_than_the_codebook(codebooks):
    existing = torch.randn(40, 4)
    rows = codebook_rows(codebooks, existing)
    assert [r.shape for r in rows] == [(5, 4)] * 3
    assert len({tuple(r.tolist()) for r in rows[2]}) == 5


def test_seeded(codebooks):
    existing = torch.randn(40, 16)
    first = codebook_rows(codebooks, existing, seed=1)
    torch.manual_seed(123)
    torch.randn(3)
    again = codebook_rows(codebooks, existing, seed=1)
    other = codebook_rows(codebooks, existing, seed=2)
    assert all(map(torch.equal, first, again))
    assert not torch.allclose(first[0], other[0])


def test_degenerate_codebooks():
    existing = torch.randn(40, 16)
    (rows,) = codebook_rows([torch.ones(5, 6)], existing)
    torch.testing.assert_close(rows, existing.mean(0).expand(5, -1))
    with pytest.raises(ValueError, match="level 1 has NaN"):
        codebook_rows([torch.ones(5, 6), torch.full((5, 6), torch.nan)], existing)
    with pytest.raises(ValueError, match=r"\[6, 7\]"):
        codebook_rows([torch.ones(5, 6), torch.ones(5, 7)], existing)
    with pytest.raises(ValueError, match="no existing"):
        codebook_rows([torch.ones(5, 6)], existing[:0])


@pytest.mark.parametrize("attribute", ["rq", "_rq"])
def test_model_rows_come_from_the_codebooks(make_model, aware, codebooks, attribute):
    aware.item_tokenizer = rq(attribute, codebooks)
    inner = make_model(aware.original_vocab_size)
    old = inner.get_input_embeddings().weight.detach().clone()
    head = inner.get_output_embeddings().weight.detach().clone()
    model = ItemAwareCausalLM.from_causal_lm(inner, aware, init_item_embeddings="codebook", seed=4)
    for weight, before in (
        (model.get_input_embeddings().weight, old),
        (model.get_output_embeddings().weight, head),
    ):
        assert torch.equal(weight[: len(before)], before)
        expected = codebook_rows(codebooks, before, seed=4)
        for level in range(3):
            start = aware.item_token_id(level, 0)
            torch.testing.assert_close(weight[start : start + 5].detach(), expected[level])


def test_a_level_without_codebook_keeps_the_default(make_bare, aware, codebooks):
    aware.item_tokenizer = rq("_rq", codebooks[:2])
    inner = make_bare(aware.original_vocab_size, tied=True, head=True, resizes_head=True)
    inner.resize_token_embeddings(aware.vocab_size)
    before = inner.embed.weight.detach().clone()
    resize_and_initialize(inner, aware, init_item_embeddings="codebook")
    changed = (inner.embed.weight != before).any(dim=1).nonzero().flatten()
    first = aware.original_vocab_size
    assert changed.tolist() == list(range(first, first + 10))


def test_bad_options(make_bare, aware, text_tokenizer, codebooks):
    def make():
        return make_bare(aware.original_vocab_size, tied=True, head=True, resizes_head=True)

    with pytest.raises(ValueError, match="'zeros'; allowed are 'mean', 'codebook'"):
        ItemAwareCausalLM.from_causal_lm(make(), aware, init_item_embeddings="zeros")
    with pytest.raises(ValueError, match="residual codebooks"):
        ItemAwareCausalLM.from_causal_lm(make(), aware, init_item_embeddings="codebook")
    aware.item_tokenizer = rq("rq", [*codebooks, codebooks[0]])
    with pytest.raises(ValueError, match="4 levels"):
        ItemAwareCausalLM.from_causal_lm(make(), aware, init_item_embeddings="codebook")
    small = ItemAwareTokenizer(text_tokenizer, rq("rq", codebooks), num_levels=3, codebook_size=4)
    with pytest.raises(ValueError, match="5 codes"):
        ItemAwareCausalLM.from_causal_lm(make(), small, init_item_embeddings="codebook")


def test_helper_works_in_place(make_model, aware):
    inner = make_model(aware.original_vocab_size)
    assert ItemAwareCausalLM._resize_and_initialize(inner, aware) is None
    assert inner.get_input_embeddings().weight.shape[0] == aware.vocab_size


def fitted_kmeans():
    tokenizer = RQKMeansTokenizer(num_levels=3, codebook_size=5, dim=6)
    return tokenizer.fit_step(torch.randn(60, 6, generator=torch.Generator().manual_seed(0)))


def fresh_rqvae():
    torch.manual_seed(0)
    tokenizer = RQVAETokenizer(6, latent_dim=4, hidden_dim=8, num_levels=3, codebook_size=5)
    return tokenizer.eval()


@pytest.mark.parametrize("make_tokenizer", [fitted_kmeans, fresh_rqvae], ids=lambda f: f.__name__)
def test_with_the_librarys_tokenizers(make_model, text_tokenizer, make_tokenizer):
    item_tokenizer = make_tokenizer()
    aware = ItemAwareTokenizer(text_tokenizer, item_tokenizer, num_levels=3, codebook_size=5)
    inner = make_model(aware.original_vocab_size)
    existing = inner.get_input_embeddings().weight.detach().clone()
    model = ItemAwareCausalLM.from_causal_lm(inner, aware, init_item_embeddings="codebook")
    residual = item_tokenizer.rq if hasattr(item_tokenizer, "rq") else item_tokenizer._rq
    expected = codebook_rows([lv.codebook.embeddings for lv in residual.levels], existing)
    start = aware.item_token_id(2, 0)
    rows = model.get_input_embeddings().weight[start : start + 5]
    torch.testing.assert_close(rows.detach(), expected[2])

    vectors = torch.randn(2, 6)
    codes = item_tokenizer.encode(vectors).codes.tolist()
    ids = aware.encode_sequence(list(vectors))
    first, second = (aware.item_tokens.encode(row) for row in codes)
    assert ids == [*first, aware.item_end_token_id, *second, aware.item_end_token_id]


def test_padding_rows_are_made_anew_and_tokens_rows_kept(text_tokenizer, make_model):
    aware = ItemAwareTokenizer(text_tokenizer, num_levels=3, codebook_size=50)
    original = aware.original_vocab_size
    model = make_model(original + 20)  # as Qwen pads its checkpoints
    before = model.get_input_embeddings().weight.detach().clone()
    resize_and_initialize(model, aware)
    after = model.get_input_embeddings().weight.detach()
    assert after.shape[0] == aware.vocab_size
    torch.testing.assert_close(after[:original], before[:original])
    assert (after[original : original + 20] != before[original:]).any(dim=1).all()


def test_a_model_that_has_all_rows_already_is_left_alone(text_tokenizer, make_model):
    aware = ItemAwareTokenizer(text_tokenizer, num_levels=3, codebook_size=5)
    model = make_model(aware.vocab_size)
    before = model.get_input_embeddings().weight.detach().clone()
    resize_and_initialize(model, aware)
    torch.testing.assert_close(model.get_input_embeddings().weight.detach(), before)


def test_a_bare_tied_model_stays_tied(text_tokenizer, make_bare):
    aware = ItemAwareTokenizer(text_tokenizer, num_levels=3, codebook_size=5)
    model = make_bare(len(text_tokenizer), tied=True, head=True, resizes_head=False)
    resize_and_initialize(model, aware)
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    assert head.out_features == head.weight.shape[0] == aware.vocab_size
