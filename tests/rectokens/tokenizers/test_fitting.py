import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from rectokens.tokenizers import fitting
from rectokens.tokenizers.fitting import (
    CODEBOOK_STYLES,
    RQKMeansSettings,
    RQVAETraining,
    fit_rq_kmeans,
    fit_rqvae,
    quality_report,
)
from rectokens.tokenizers.rqvae import RQVAEConfig


def clustered(count=1500, dim=16, clusters=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dim, generator=generator)
    member = torch.randint(clusters, (count,), generator=generator)
    return centres[member] + 0.3 * torch.randn(count, dim, generator=generator)


def settings(**overrides):
    return RQKMeansSettings(**{"num_levels": 3, "codebook_size": 16, "epochs": 8, **overrides})


@pytest.mark.parametrize("style", CODEBOOK_STYLES)
def test_fits_better_than_one_minibatch_pass(style):
    data = clustered()
    batches = data.split(256)
    tokenizer = fit_rq_kmeans(batches, settings(style=style))
    assert tokenizer._fitted
    report = quality_report(tokenizer, batches)
    errors = report["reconstruction_error"]
    assert errors[0] < 0.7
    assert errors[0] > errors[1] >= errors[2]
    single = type(tokenizer)(3, 16, 16)
    for batch in batches:
        single.fit_step(batch)
    assert errors[1] < quality_report(single, batches)["reconstruction_error"][1] * 1.2
    # The first level is plain k-means in every style.
    assert errors[0] <= quality_report(single, batches)["reconstruction_error"][0] * 1.02


def test_separating_codebooks_collide_least():
    batches = clustered(4000).split(512)
    rates = {
        style: quality_report(
            fit_rq_kmeans(batches, settings(codebook_size=32, style=style)), batches
        )["collision_rate"]
        for style in CODEBOOK_STYLES
    }
    assert rates["separating"] < 0.8 * rates["balanced"]
    assert rates["separating"] < rates["kmeans"]


def test_same_seed_same_tokenizer_whatever_the_batches():
    data = clustered(600)
    first = fit_rq_kmeans([data], settings())
    again = fit_rq_kmeans(data.numpy().reshape(6, 100, 16), settings())
    assert all(map(torch.equal, first.codebooks, again.codebooks))
    other = fit_rq_kmeans([data], settings(seed=7))
    assert not torch.equal(first.codebooks[0], other.codebooks[0])


def test_more_rows_than_the_sample_holds():
    data = clustered(3000)
    reads = []

    class Source:
        def __iter__(self):
            reads.append(0)
            for batch in data.split(500):
                reads[-1] += len(batch)
                yield batch

    progress = []
    tokenizer = fit_rq_kmeans(
        Source(),
        settings(sample_rows=400, full_passes=2, style="kmeans"),
        on_progress=progress.append,
    )
    assert reads == [3000] * (1 + 3 * 2)
    # The counts are those of all rows, not of the sample.
    assert all(int(level._counts.sum()) == 3000 for level in tokenizer._rq.levels)
    whole = quality_report(fit_rq_kmeans([data], settings(style="kmeans")), [data])
    sampled = quality_report(tokenizer, [data])
    for error, reference in zip(
        sampled["reconstruction_error"], whole["reconstruction_error"], strict=True
    ):
        assert error < 1.15 * reference
    assert {step.stage for step in progress} == {
        "sampling",
        "level 1 of 3",
        "level 2 of 3",
        "level 3 of 3",
        "done",
    }


def test_progress_rises_to_one():
    progress = []
    fit_rq_kmeans(clustered(500).split(100), settings(), on_progress=progress.append)
    fractions = [step.fraction for step in progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert progress[-1].rows == 500
    losses = [step.loss for step in progress if step.stage == "level 1 of 3"]
    assert losses[-1] < losses[0]


def test_an_exception_from_the_callback_cancels():
    class CancelledError(Exception):
        pass

    def cancel(progress):
        raise CancelledError

    with pytest.raises(CancelledError):
        fit_rq_kmeans([clustered(50)], settings(), on_progress=cancel)


@pytest.mark.parametrize("style", CODEBOOK_STYLES)
@pytest.mark.parametrize(
    "data", [torch.ones(30, 4), torch.zeros(3, 4), torch.eye(4)], ids=["equal", "zero", "few"]
)
def test_degenerate_data(style, data):
    tokenizer = fit_rq_kmeans([data], settings(style=style))
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(data)), data, atol=1e-4, rtol=1e-4)
    assert all(torch.isfinite(codebook).all() for codebook in tokenizer.codebooks)


def test_a_single_level():
    assert fit_rq_kmeans([clustered(100)], settings(num_levels=1)).num_levels == 1


def test_bad_data():
    with pytest.raises(ValueError, match="no rows"):
        fit_rq_kmeans([], settings())
    with pytest.raises(ValueError, match="no rows"):
        fit_rq_kmeans([torch.zeros(0, 4)], settings())
    with pytest.raises(TypeError, match="read only once"):
        fit_rq_kmeans((batch for batch in [torch.zeros(2, 4)]), settings())
    bad = clustered(20)
    bad[3] = torch.nan
    with pytest.raises(ValueError, match="first in row 3"):
        fit_rq_kmeans([bad], settings())


def test_data_that_changes_between_passes():
    class Shrinking:
        rows = 400

        def __iter__(self):
            self.rows -= 100
            return iter([clustered(self.rows)])

    with pytest.raises(ValueError, match="300 rows at first and 200 rows later"):
        fit_rq_kmeans(Shrinking(), settings(sample_rows=50))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_levels", 0),
        ("epochs", 0),
        ("full_passes", -1),
        ("tolerance", 1.0),
        ("style", "magic"),
        ("separation_dims", 0),
        ("sample_rows", 0),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        settings(**{field: value})


def test_rqvae_learns_and_leaves_the_global_generator_alone():
    data = clustered(800)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    progress = []
    config = RQVAEConfig(16, latent_dim=8, hidden_dim=32, num_levels=2, codebook_size=16)
    training = RQVAETraining(epochs=40, batch_size=100)
    tokenizer = fit_rqvae(data.split(300), config, training, on_progress=progress.append)
    assert torch.equal(torch.rand(3), expected)
    assert tokenizer._fitted
    assert not tokenizer.training
    assert progress[-1].fraction == 1.0
    assert progress[-1].loss < 0.7 * progress[0].loss
    fractions = [step.fraction for step in progress]
    assert fractions == sorted(fractions)
    report = quality_report(tokenizer, [data])
    assert report["reconstruction_error"][-1] < 1.0
    again = fit_rqvae(data.split(300), config, training)
    assert all(map(torch.equal, tokenizer.codebooks, again.codebooks))


def test_rqvae_bad_data_and_settings():
    config = RQVAEConfig(4, 2, 4, 2, 4)
    with pytest.raises(ValueError, match="no rows"):
        fit_rqvae([], config)
    with pytest.raises(ValueError, match="expected \\(B, 4\\)"):
        fit_rqvae([torch.zeros(2, 5)], config)
    with pytest.raises(ValueError, match="learning_rate is 0"):
        RQVAETraining(learning_rate=0)
    with pytest.raises(ValueError, match="weight_decay is -1"):
        RQVAETraining(weight_decay=-1)
    with pytest.raises(RuntimeError, match="loss became"):
        fit_rqvae([torch.full((8, 4), 1e30)], config, RQVAETraining(epochs=2))


def test_report_against_counting_by_hand():
    data = clustered(300)
    data[10:13] = data[0]
    tokenizer = fit_rq_kmeans([data], settings(num_levels=2, codebook_size=8, style="kmeans"))
    report = quality_report(tokenizer, data.split(70))
    ids = [tuple(row) for row in tokenizer.encode(data).codes.tolist()]
    shared = sum(ids.count(each) > 1 for each in ids)
    assert report["num_items"] == 300
    assert report["num_semantic_ids"] == len(set(ids))
    assert report["collision_rate"] == pytest.approx(shared / 300)
    assert report["duplicates_rate"] == pytest.approx(1 - len(set(ids)) / 300)
    assert report["p_unique"] == pytest.approx(len(set(ids)) / 300)
    assert report["collision_rate_floor"] == pytest.approx(4 / 300)
    assert report["duplicates_rate_floor"] == pytest.approx(3 / 300)
    variance = (data - data.mean(0)).square().sum()
    gaps = data - tokenizer.decode(tokenizer.encode(data))
    assert report["reconstruction_error"][1] == pytest.approx(float(gaps.square().sum() / variance))
    first = [each[0] for each in ids]
    shares = [first.count(code) / 300 for code in set(first)]
    assert report["codes_used"][0] == len(shares)
    assert report["entropy_bits"][0] == pytest.approx(-sum(p * math.log2(p) for p in shares))


def test_report_is_finite_json_for_equal_rows():
    import json

    data = torch.full((5, 3), 0.1)
    report = quality_report(fit_rq_kmeans([data], settings(num_levels=1)), [data])
    json.dumps(report, allow_nan=False)
    assert report["reconstruction_error"][0] < 1e-6
    with pytest.raises(ValueError, match="no rows"):
        quality_report(fit_rq_kmeans([data], settings()), [])


def test_sample_size_default_grows_with_the_codebook():
    assert RQKMeansSettings().resolved_sample_rows == fitting._SAMPLE_ROWS
    assert RQKMeansSettings(codebook_size=8192).resolved_sample_rows == 32 * 8192


def test_real_embeddings_collide_under_two_percent():
    folder = os.environ.get("RECTOKENS_DATA_DIR")
    path = Path(folder or "") / "amazon-beauty" / "embeddings.f16.npy"
    if not folder or not path.exists():
        pytest.skip("RECTOKENS_DATA_DIR names no folder with amazon-beauty/embeddings.f16.npy")
    batches = np.array_split(np.load(path, mmap_mode="r"), 4)
    report = quality_report(fit_rq_kmeans(batches, RQKMeansSettings()), batches)
    assert report["collision_rate"] < 0.02
    assert report["reconstruction_error"][1] < 0.45
    assert min(report["entropy_bits"]) > 7.5
