import pytest
import torch

from rectokens.ops.nearest_reference import nearest_direct
from rectokens.quantizers.lloyd import EqualNormFit, MeansFit, SeparatingFit, separating_basis


def rows(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run_pass(fit, data, batch_size=64):
    for batch in data.split(batch_size):
        fit.observe(batch)
    return fit.finish_pass()


def test_means_move_to_the_means_of_their_rows():
    data = rows(300)
    fit = MeansFit(data, 10, generator())
    before = fit.codebook.clone()
    codes = nearest_direct(data, before)
    summary = run_pass(fit, data)
    for code in range(10):
        torch.testing.assert_close(fit.codebook[code], data[codes == code].mean(dim=0))
    assert torch.equal(fit.counts, torch.bincount(codes, minlength=10))
    assert summary.codes_used == 10
    assert summary.error == pytest.approx(float((data - before[codes]).square().sum(1).mean()))


@pytest.mark.parametrize("kind", [MeansFit, EqualNormFit])
def test_passes_lower_the_error_whatever_the_batches(kind):
    data = rows(500)
    errors = {}
    for batch_size in (500, 37):
        fit = kind(data, 16, generator())
        errors[batch_size] = [run_pass(fit, data, batch_size).error for _ in range(6)]
    assert errors[500] == pytest.approx(errors[37], rel=1e-4)
    assert errors[500][-1] < errors[500][1]


def test_equal_norms_have_the_best_length():
    data = rows(400)
    fit = EqualNormFit(data, 12, generator())
    for _ in range(30):
        run_pass(fit, data)
    lengths = fit.codebook.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(12))
    codes = nearest_direct(data, fit.codebook)

    def error(scale):
        return float((data - fit.codebook[codes] * scale).square().sum())

    assert error(1.0) <= min(error(0.97), error(1.03))


def test_equal_norms_use_codes_more_evenly_than_means_on_residuals():
    data = rows(3000, 48)
    used = {}
    for kind in (MeansFit, EqualNormFit):
        first = MeansFit(data, 32, generator())
        run_pass(first, data)
        residual = data - first.codebook[nearest_direct(data, first.codebook)]
        second = kind(residual, 32, generator())
        for _ in range(10):
            run_pass(second, residual)
        shares = second.counts[second.counts > 0] / len(data)
        used[kind] = float(-(shares * shares.log2()).sum())
    assert used[EqualNormFit] > used[MeansFit]
    assert used[EqualNormFit] > 4.8


def test_unused_codes_restart_where_the_error_is():
    near, far = torch.zeros(50, 2), torch.tensor([[100.0, 0.0]]).repeat(3, 1)
    data = torch.cat([near, far])
    fit = MeansFit(near, 2, generator())  # both codes at the origin
    fit._sample = fit._points = data
    summary = run_pass(fit, data)
    assert summary.codes_used == 1
    assert summary.restarted == 1
    assert run_pass(fit, data).codes_used == 2
    assert torch.equal(fit.codebook.max(dim=0).values, torch.tensor([100.0, 0.0]))


@pytest.mark.parametrize("kind", [MeansFit, EqualNormFit])
def test_rows_that_are_all_equal_or_fewer_than_codes(kind):
    for data in (torch.zeros(5, 3), torch.ones(5, 3), rows(2, 3)):
        fit = kind(data, 8, generator())
        for _ in range(3):
            summary = run_pass(fit, data)
        assert torch.isfinite(fit.codebook).all()
        assert summary.restarted >= 0


def test_separating_basis_finds_what_tells_groups_apart():
    codes = torch.arange(200).remainder(20)[:, None]
    data = rows(20, 6)[codes[:, 0]] * 5
    data[:, 4] = rows(200, 1, seed=3)[:, 0]  # differs within groups, not between
    basis = separating_basis(data, codes, 1)
    assert basis.shape == (6, 1)
    assert basis[4].abs() > 0.99
    wide = separating_basis(data, codes, 9)
    torch.testing.assert_close(wide.T @ wide, torch.eye(6), atol=1e-5, rtol=0)


def test_separating_basis_where_nothing_collides():
    data = rows(10)
    assert separating_basis(data, torch.arange(10)[:, None], 2) is None
    twins = data.repeat(2, 1)
    assert separating_basis(twins, torch.arange(10).repeat(2)[:, None], 2) is None


def test_separating_fit_searches_its_subspace_only():
    data = rows(300)
    basis = torch.eye(8)[:, :2]
    fit = SeparatingFit(data, 16, generator(), basis)
    for _ in range(5):
        run_pass(fit, data)
    assert fit.codebook.shape == (16, 8)
    assert fit.codebook[:, 2:].abs().max() == 0
    assert (fit.counts > 0).sum() == 16


def test_a_pass_needs_rows():
    with pytest.raises(ValueError, match="0 rows"):
        MeansFit(rows(4), 2, generator()).finish_pass()
