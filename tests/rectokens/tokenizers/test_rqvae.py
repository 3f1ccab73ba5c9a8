import pytest
import torch
from torch.nn import functional as F

from rectokens.core.tokenizer import Tokenizer, TokenSequence
from rectokens.tokenizers.rqvae import MLP, RQVAEConfig, RQVAEOutput, RQVAETokenizer, VQQuantizer


def rows(count, dim=12, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def small(**overrides):
    torch.manual_seed(0)
    return RQVAETokenizer(
        **{
            "input_dim": 12,
            "latent_dim": 6,
            "hidden_dim": 24,
            "num_levels": 3,
            "codebook_size": 8,
            **overrides,
        }
    )


def train(tokenizer, data, steps):
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        out = tokenizer(data)
        loss = F.mse_loss(out.recon, data) + out.commitment_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_mlp_layers():
    mlp = MLP(5, 7, 3, num_layers=3)
    shapes = [tuple(m.weight.shape) for m in mlp.net if isinstance(m, torch.nn.Linear)]
    assert shapes == [(7, 5), (7, 7), (3, 7)]
    assert sum(isinstance(m, torch.nn.ReLU) for m in mlp.net) == 2
    assert MLP(5, 7, 3, num_layers=1)(torch.zeros(2, 5)).shape == (2, 3)
    with pytest.raises(ValueError, match="num_layers is 0"):
        MLP(5, 7, 3, num_layers=0)


def test_config_fields():
    assert RQVAEConfig._fields[:6] == (
        "input_dim",
        "latent_dim",
        "hidden_dim",
        "num_levels",
        "codebook_size",
        "learnable_codebook",
    )
    config = RQVAEConfig(12, 6, 24, 2, 8, True)
    tokenizer = RQVAETokenizer.from_config(config)
    assert tokenizer.config == config
    assert tokenizer.learnable_codebook is True


def test_attributes():
    tokenizer = small()
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.input_dim, tokenizer.latent_dim) == (12, 6)
    assert (tokenizer.num_levels, tokenizer.codebook_size) == (3, 8)
    assert tokenizer._fitted is False
    assert tokenizer.rq.levels[0].codebook.embeddings.shape == (8, 6)
    assert all(isinstance(level, VQQuantizer) for level in tokenizer.rq.levels)
    assert "rq._module_levels.2._codebook.embeddings" in tokenizer.state_dict()


@pytest.mark.parametrize("learnable", [False, True])
def test_forward_in_training_with_fewer_rows_than_codes(learnable):
    out = small(codebook_size=64, learnable_codebook=learnable)(rows(5))
    assert isinstance(out, RQVAEOutput)
    assert out.recon.shape == (5, 12)
    assert out.commitment_loss.shape == ()
    assert out.codes.shape == (5, 3)
    assert out.codes.dtype == torch.long
    assert torch.isfinite(out.recon).all()


def test_p_unique_ids():
    tokenizer = small().eval()
    out = tokenizer(rows(1).repeat(4, 1))
    assert out.p_unique_ids.shape == ()
    assert out.p_unique_ids.item() == 0.25
    out = tokenizer(rows(50))
    assert out.p_unique_ids.item() == pytest.approx(len(set(map(tuple, out.codes.tolist()))) / 50)


@pytest.mark.parametrize("learnable", [False, True])
def test_training_lowers_the_loss(learnable):
    losses = train(small(learnable_codebook=learnable), rows(256), 300)
    assert losses[-1] < losses[0]


def test_encode_decode():
    tokenizer = small()
    train(tokenizer, rows(64), 3)
    data = rows(10, seed=4).requires_grad_()
    tokens = tokenizer.encode(data)
    assert tokens.codes.shape == (10, 3)
    latent = sum(
        level.codebook.embeddings[tokens.codes[:, index]]
        for index, level in enumerate(tokenizer.rq.levels)
    )
    decoded = tokenizer.decode(tokens)
    torch.testing.assert_close(decoded, tokenizer.decoder(latent).detach())
    assert not decoded.requires_grad
    one = tokenizer.encode(data[3])
    assert torch.equal(one.codes, tokens.codes[3])
    assert tokenizer.decode(one).shape == (12,)
    assert torch.equal(tokenizer.eval()(data).codes, tokens.codes)


def test_encode_changes_no_state_even_in_training_mode():
    for tokenizer in (small(), small()):
        tokenizer.train()
        before = {name: t.clone() for name, t in tokenizer.state_dict().items()}
        tokenizer.encode(rows(40))
        assert tokenizer.training
        assert all(torch.equal(t, before[name]) for name, t in tokenizer.state_dict().items())
        train(tokenizer, rows(40), 2)


def test_fit_step_is_not_for_rqvae():
    with pytest.raises(NotImplementedError, match="mse_loss"):
        small().fit_step(rows(3))


@pytest.mark.parametrize("learnable", [False, True])
def test_save_and_load(tmp_path, learnable):
    tokenizer = small(learnable_codebook=learnable, num_encoder_layers=2, commitment_weight=0.5)
    train(tokenizer, rows(64), 5)
    path = tmp_path / "new" / "rqvae.pt"
    tokenizer.save(path)
    payload = torch.load(path, weights_only=True)
    assert set(payload) == {"state_dict", "config"}
    loaded = RQVAETokenizer.load(path)
    data = rows(100, seed=2)
    assert loaded.encode(data) == tokenizer.encode(data)
    assert loaded._fitted is True
    assert not loaded.training
    assert loaded.config == tokenizer.config


def test_load_fills_in_what_older_files_lack(tmp_path):
    tokenizer = small()
    config = {name: tokenizer.config._asdict()[name] for name in RQVAEConfig._fields[:6]}
    torch.save({"state_dict": tokenizer.state_dict(), "config": config}, tmp_path / "old.pt")
    assert RQVAETokenizer.load(tmp_path / "old.pt").config == tokenizer.config


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "t.pt"
    torch.save({"state_dict": {}, "config": small().config._asdict()}, path)
    with pytest.raises(ValueError, match="holds no RQ-VAE tokenizer"):
        RQVAETokenizer.load(path)
    torch.save({"state_dict": {}, "config": {"widths": 3}}, path)
    with pytest.raises(ValueError, match="holds no RQ-VAE tokenizer"):
        RQVAETokenizer.load(path)


def test_bad_input():
    tokenizer = small()
    with pytest.raises(ValueError, match=r"expected \(B, 12\) with B >= 1"):
        tokenizer(rows(0))
    with pytest.raises(ValueError, match="expected"):
        tokenizer(rows(3, 11))
    bad = rows(3)
    bad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="first in row 0"):
        tokenizer.encode(bad)
    with pytest.raises(ValueError, match="allowed are 0 to 7"):
        tokenizer.decode(TokenSequence(torch.tensor([0, 0, 8])))
    with pytest.raises(ValueError, match="num_levels is 0"):
        small(num_levels=0)
