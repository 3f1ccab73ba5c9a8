import pytest
import torch
from torch.nn import functional as F

from rectokens.core.quantizer import Quantizer
from rectokens.quantizers.vq import VQQuantizer


def rows(count, dim=3, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def seeded(quantizer, vectors):
    """The quantizer with given code vectors, as if its first batch had set them."""
    quantizer.codebook.update(torch.arange(len(vectors)), vectors)
    quantizer._initialized.fill_(True)
    return quantizer


def test_state():
    quantizer = VQQuantizer(5, 3)
    assert isinstance(quantizer, Quantizer)
    assert list(quantizer.parameters()) == []
    state = {name: (tuple(t.shape), t.dtype) for name, t in quantizer.state_dict().items()}
    assert state == {
        "_codebook.embeddings": ((5, 3), torch.float32),
        "_ema_cluster_size": ((5,), torch.float32),
        "_ema_embed_sum": ((5, 3), torch.float32),
        "_initialized": ((1,), torch.bool),
        "_steps_since_active": ((5,), torch.long),
    }
    assert quantizer.codebook.embeddings.std() > 0
    assert quantizer.fit_step(rows(4)) is quantizer
    assert not quantizer._initialized


def test_first_training_batch_seeds_the_codebook():
    batch = rows(20)
    quantizer = VQQuantizer(6, 3)
    before = quantizer.codebook.embeddings.clone()
    quantizer.eval().quantize(batch)
    assert torch.equal(quantizer.codebook.embeddings, before)
    out = quantizer.train().quantize(batch)
    assert quantizer._initialized.item()
    # The codes were seeded with rows of the batch, so those rows are met exactly.
    exact = (out.residuals.abs().sum(dim=1) == 0).sum()
    assert exact >= 6


@pytest.mark.parametrize("learnable", [False, True])
def test_batch_smaller_than_the_codebook(learnable):
    quantizer = VQQuantizer(16, 3, learnable_codebook=learnable)
    out = quantizer.quantize(rows(4))
    assert out.codes.shape == (4,)
    assert torch.isfinite(quantizer.codebook.embeddings).all()


def test_straight_through_and_detached_residuals():
    quantizer = seeded(VQQuantizer(4, 3), rows(4, seed=1)).eval()
    x = rows(6).requires_grad_()
    out = quantizer(x)
    expected = quantizer.codebook.embeddings[out.codes]
    torch.testing.assert_close(out.quantized, expected)
    torch.testing.assert_close(out.residuals, x.detach() - expected)
    assert not out.residuals.requires_grad
    out.quantized.backward(torch.full_like(x, 2.0))
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_losses():
    vectors, x = rows(4, seed=1), rows(6).requires_grad_()
    ema = seeded(VQQuantizer(4, 3, commitment_weight=0.5), vectors)
    learnable = seeded(VQQuantizer(4, 3, commitment_weight=0.5, learnable_codebook=True), vectors)
    nearest = vectors[ema.eval()(x).codes]
    torch.testing.assert_close(ema(x).commitment_loss, 0.5 * F.mse_loss(x, nearest))
    loss = learnable(x).commitment_loss
    squared = (x - nearest).square().sum(dim=1).mean()
    torch.testing.assert_close(loss, squared + 0.5 * squared)
    assert loss.shape == ()

    loss.backward()
    assert learnable.codebook.embeddings.grad.abs().sum() > 0
    torch.testing.assert_close(x.grad, 0.5 * 2 * (x.detach() - nearest) / len(x))


def test_averages_follow_hit_codes_only():
    vectors = torch.tensor([[0.0], [10.0], [20.0]])
    quantizer = seeded(VQQuantizer(3, 1, ema_decay=0.9), vectors)
    quantizer._ema_cluster_size.copy_(torch.tensor([2.0, 5.0, 7.0]))
    quantizer._ema_embed_sum.copy_(torch.tensor([[0.0], [50.0], [140.0]]))
    quantizer.quantize(torch.tensor([[1.0], [2.0], [11.0]]))
    torch.testing.assert_close(quantizer._ema_cluster_size, torch.tensor([2.0, 4.6, 7.0]))
    torch.testing.assert_close(quantizer._ema_embed_sum, torch.tensor([[0.3], [46.1], [140.0]]))
    torch.testing.assert_close(
        quantizer.codebook.embeddings, torch.tensor([[0.15], [46.1 / 4.6], [20.0]])
    )
    assert quantizer._steps_since_active.tolist() == [0, 0, 1]


def test_evaluation_changes_nothing():
    quantizer = seeded(VQQuantizer(4, 3), rows(4)).eval()
    before = {name: t.clone() for name, t in quantizer.state_dict().items()}
    quantizer.quantize(rows(9, seed=2))
    assert all(torch.equal(t, before[name]) for name, t in quantizer.state_dict().items())


def test_dead_codes_restart_on_rows_of_the_batch():
    vectors = torch.tensor([[0.0], [1000.0], [2000.0]])
    quantizer = seeded(VQQuantizer(3, 1, restart_after_steps=3), vectors)
    batch = torch.tensor([[-1.0], [1.0], [0.5], [0.25]])
    for step in range(2):
        quantizer.quantize(batch)
        assert quantizer._steps_since_active.tolist() == [0, step + 1, step + 1]
        assert quantizer.codebook.embeddings[1:].flatten().tolist() == [1000.0, 2000.0]
    quantizer._ema_cluster_size[1:] = 9.0
    quantizer.quantize(batch)
    moved = quantizer.codebook.embeddings[1:].flatten().tolist()
    assert set(moved) <= set(batch.flatten().tolist())
    assert moved[0] != moved[1]
    assert quantizer._steps_since_active.tolist() == [0, 0, 0]
    assert quantizer._ema_cluster_size[1:].tolist() == [0.0, 0.0]
    assert quantizer._ema_embed_sum[1:].flatten().tolist() == [0.0, 0.0]


def test_a_hit_starts_the_wait_anew():
    quantizer = seeded(VQQuantizer(2, 1, restart_after_steps=2), torch.tensor([[0.0], [100.0]]))
    near, both = torch.tensor([[0.0]]), torch.tensor([[0.0], [100.0]])
    for batch in (near, both, near):
        quantizer.quantize(batch)
    assert quantizer.codebook.embeddings[1].item() == pytest.approx(100.0)


def test_learnable_codebook_has_no_averages_and_no_restarts():
    quantizer = seeded(
        VQQuantizer(2, 1, restart_after_steps=1, learnable_codebook=True),
        torch.tensor([[0.0], [100.0]]),
    )
    for _ in range(3):
        quantizer.quantize(torch.tensor([[1.0]]))
    assert quantizer.codebook.embeddings.flatten().tolist() == [0.0, 100.0]
    assert quantizer._ema_cluster_size.tolist() == [0.0, 0.0]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"ema_decay is 1\.0"):
        VQQuantizer(2, 2, ema_decay=1.0)
    with pytest.raises(ValueError, match="commitment_weight is -1"):
        VQQuantizer(2, 2, commitment_weight=-1)
    with pytest.raises(ValueError, match="restart_after_steps is 0"):
        VQQuantizer(2, 2, restart_after_steps=0)
    with pytest.raises(ValueError, match="0 rows"):
        VQQuantizer(2, 2).quantize(torch.zeros(0, 2))
