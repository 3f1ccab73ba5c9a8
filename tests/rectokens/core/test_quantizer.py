import pytest
import torch

from rectokens.core.codebook import Codebook, SearchResult
from rectokens.core.quantizer import Quantizer, QuantizerOutput, ResidualQuantizerOutput


def level(loss):
    zeros = torch.zeros(2, 3)
    return QuantizerOutput(torch.zeros(2, dtype=torch.long), zeros, zeros, loss)


def test_commitment_loss_sums_the_levels_that_have_one():
    losses = [torch.tensor(1.5, requires_grad=True), None, torch.tensor(2.0)]
    out = ResidualQuantizerOutput(
        torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), [level(loss) for loss in losses]
    )
    assert out.commitment_loss.shape == ()
    assert out.commitment_loss.item() == 3.5
    out.commitment_loss.backward()
    assert losses[0].grad.item() == 1.0


def test_commitment_loss_is_zero_without_any():
    codes = torch.zeros(2, 1, dtype=torch.long)
    assert torch.equal(
        ResidualQuantizerOutput(codes, torch.zeros(2, 3)).commitment_loss, torch.tensor(0.0)
    )
    out = ResidualQuantizerOutput(codes, torch.zeros(2, 3), [level(None)])
    assert torch.equal(out.commitment_loss, torch.tensor(0.0))


def test_level_outputs_are_not_shared_between_instances():
    codes = torch.zeros(1, 1, dtype=torch.long)
    first = ResidualQuantizerOutput(codes, torch.zeros(1, 1))
    first.level_outputs.append(level(None))
    assert ResidualQuantizerOutput(codes, torch.zeros(1, 1)).level_outputs == []


def test_fit_step_does_nothing_by_default():
    class Fixed(Quantizer):
        @property
        def codebook(self):
            raise NotImplementedError

        def quantize(self, x):
            raise NotImplementedError

    quantizer = Fixed()
    assert not isinstance(quantizer, torch.nn.Module)
    assert quantizer.fit_step(torch.zeros(1, 1)) is quantizer


def test_abstract_classes_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Quantizer()
    with pytest.raises(TypeError, match="abstract"):
        Codebook()
    assert SearchResult(torch.tensor([3])).codes.tolist() == [3]
