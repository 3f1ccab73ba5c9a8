import pytest
import torch
from torch import nn

from rectokens.core.quantizer import Quantizer, QuantizerOutput
from rectokens.quantizers.kmeans import KMeansQuantizer
from rectokens.quantizers.residual import ResidualQuantizer


class Rounding(Quantizer):
    """Rounds to multiples of a step; no Module, no codebook."""

    def __init__(self, step):
        self.step = step

    @property
    def codebook(self):
        raise NotImplementedError

    def quantize(self, x):
        codes = (x[:, 0] / self.step).round().long()
        quantized = codes[:, None] * self.step
        return QuantizerOutput(codes, quantized, x - quantized)


def test_levels_see_what_is_left():
    rq = ResidualQuantizer([Rounding(10.0), Rounding(1.0)])
    out = rq.quantize(torch.tensor([[37.2], [-4.0]]))
    assert out.codes.tolist() == [[4, -3], [0, -4]]
    assert out.quantized.flatten().tolist() == [37.0, -4.0]
    assert len(out.level_outputs) == 2
    torch.testing.assert_close(out.level_outputs[1].residuals, torch.tensor([[0.2], [0.0]]))


def test_levels_keep_their_order_and_modules_are_registered():
    levels = [KMeansQuantizer(2, 1), Rounding(1.0), KMeansQuantizer(3, 1)]
    rq = ResidualQuantizer(levels)
    assert rq.num_levels == 3
    assert rq.levels == levels
    assert isinstance(rq._module_levels, nn.ModuleList)
    assert list(rq.state_dict()) == [
        "_module_levels.0._codebook.embeddings",
        "_module_levels.1._codebook.embeddings",
    ]


def test_fit_step_fits_each_level_on_the_residuals():
    data = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rq = ResidualQuantizer([KMeansQuantizer(8, 6, seed=level) for level in range(3)])
    assert rq.fit_step(data) is rq
    residual = data.detach()
    for level, fitted in enumerate(rq.levels):
        alone = KMeansQuantizer(8, 6, seed=level).fit_step(residual)
        assert torch.equal(fitted.codebook.embeddings, alone.codebook.embeddings)
        residual = alone.quantize(residual).residuals
    out = rq(data)
    assert torch.equal(out.codes, rq.quantize(data).codes)
    errors = [level.residuals.square().mean() for level in out.level_outputs]
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(data.detach() - out.quantized, out.level_outputs[-1].residuals)


def test_empty_list():
    with pytest.raises(ValueError, match="empty"):
        ResidualQuantizer([])
