"""The tokenizer scripts: what they write, and what they refuse."""

from __future__ import annotations

import csv
import errno
import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

from examples.data.amazon import ItemData
from examples.data.item_codes import load_item_tokenizer
from examples.scripts.training import train_rqkmeans, train_rqvae
from examples.scripts.training.utils import batches_in_order, recon_loss, run_eval
from rectokens.artifacts.tokenizer import load_tokenizer

SMALL = {"num_levels": 2, "codebook_size": 6, "batch_size": 16, "num_epochs": 4}
SCRIPTS = {
    "rqkmeans": (train_rqkmeans.train, {}),
    "rqvae": (train_rqvae.train, {"latent_dim": 4, "hidden_dim": 8}),
}


@pytest.fixture
def train(data_root, tmp_path):
    def call(kind, **options):
        script, defaults = SCRIPTS[kind]
        where = {"root": str(data_root), "output_dir": str(tmp_path / "out")}
        return script(**{**SMALL, **where, **defaults, **options})

    return call


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", SCRIPTS)
def test_writes_epochs_the_final_file_figures_and_an_artifact(train, data_root, tmp_path, kind):
    artifact = train(kind, save_every=2, eval_every_n=2)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.pt")) == [
        "epoch_2.pt",
        "epoch_4.pt",
        "final.pt",
    ]
    final = load_item_tokenizer(out / "final.pt", kind, num_levels=2, codebook_size=6)
    loaded = load_tokenizer(artifact)
    x = ItemData(data_root).x
    assert torch.equal(final.encode(x).codes, loaded.tokenizer.encode(x).codes)
    last = load_item_tokenizer(out / "epoch_4.pt", kind)
    assert torch.equal(final.encode(x).codes, last.encode(x).codes)
    assert loaded.report["num_items"] == 40
    assert sum(map(sum, (use["histogram"] for use in loaded.report["code_use"]))) == 80
    names = {row["name"] for row in rows(out)}
    assert {"eval/avg_recon", "eval/p_unique", "eval/entropies/1"} <= names
    assert {row["epoch"] for row in rows(out) if row["name"] == "eval/avg_recon"} == {"2", "4"}
    assert list((out / "tensorboard").iterdir())


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_same_seed_gives_the_same_tokenizer(train, tmp_path, kind):
    versions = {train(kind, seed=3, output_dir=str(tmp_path / f"o{n}")).name for n in range(2)}
    assert len(versions) == 1
    assert train(kind, seed=4, output_dir=str(tmp_path / "o2")).name not in versions


def test_inspect_plots_the_code_use_of_a_tokenizer(train, capsys):
    from rectokens.cli.app import app

    artifact = train("rqkmeans")
    assert "items by code" in capsys.readouterr().out
    text = CliRunner().invoke(app, ["inspect", str(artifact)]).output
    assert "6 of 6" in text
    assert "collision_rate" in text
    summary = json.loads(CliRunner().invoke(app, ["inspect", str(artifact), "--json"]).output)
    assert [sum(level["histogram"]) for level in summary["details"]["levels"]] == [40, 40]


@pytest.mark.parametrize("style", train_rqkmeans.STYLES)
def test_every_style_fits(train, style):
    report = load_tokenizer(train("rqkmeans", style=style, codebook_size=12)).report
    assert report["reconstruction_error"][1] < 1.0
    assert report["num_semantic_ids"] > 12


def test_fitting_to_training_items_does_not_look_at_the_others(train, data_root, tmp_path):
    chosen = ItemData(data_root, train_test_split="train")
    train("rqkmeans", style="kmeans", num_levels=1, codebook_size=len(chosen))
    codebook = load_item_tokenizer(tmp_path / "out" / "final.pt", "rqkmeans").codebooks[0]
    assert torch.cdist(chosen.x, codebook).min(dim=1).values.max() < 1e-3
    left_out = ItemData(data_root, train_test_split="eval").x
    assert torch.cdist(left_out, codebook).min(dim=1).values.min() > 0.05


@pytest.mark.parametrize("kind", SCRIPTS)
def test_collaborative_features_widen_the_vectors(train, tmp_path, kind):
    train(kind, features="text+collaborative", behaviour_dims=5, behaviour_weight=0.5)
    assert load_item_tokenizer(tmp_path / "out" / "final.pt", kind).feature_dim == 13


def test_learnable_codebooks_and_the_profile(train, tmp_path):
    train("rqvae", learnable_codebook=True, profile=True)
    assert load_item_tokenizer(tmp_path / "out" / "final.pt", "rqvae").learnable_codebook
    assert list((tmp_path / "out" / "profile").glob("*.json*"))


def test_figures_go_to_weights_and_biases_on_request(train, monkeypatch):
    class FakeWandb:
        def __init__(self):
            self.calls = []

        def init(self, **options):
            self.calls.append(("init", options["project"], options["config"]["num_levels"]))
            return self

        def log(self, figures):
            self.calls.append(("log", figures["epoch"], "train/loss" in figures))

        def finish(self):
            self.calls.append(("finish",))

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train("rqvae", wandb_project="codes", log_every=2)
    assert wandb.calls == [("init", "codes", 2), ("log", 2, True), ("log", 4, True), ("finish",)]


def test_an_rqvae_learns(train, tmp_path):
    train("rqvae", num_epochs=60)
    losses = [float(row["value"]) for row in rows(tmp_path / "out") if row["name"] == "train/loss"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "num_epochs is 0; it must be at least 1"),
        ({"save_every": -1}, "save_every is -1; it must be at least 0"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"split": "toy"}, "split is 'toy'"),
        ({"train_test_split": "test"}, "train_test_split is 'test'"),
        ({"wandb_project": "x"}, "wandb is not installed"),
    ],
)
def test_bad_parameters_are_named_before_anything_is_fitted(
    train, tmp_path, monkeypatch, kind, options, message
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=message):
        train(kind, **options)
    assert not list(tmp_path.glob("out/*.pt"))


def test_a_loss_that_diverges_is_an_error(train):
    with pytest.raises(ValueError, match=r"the loss became .* in epoch \d+; lower lr"):
        train("rqvae", lr=1e30, num_epochs=20)


def test_a_full_disk_leaves_the_old_file_intact(train, tmp_path, monkeypatch):
    train("rqkmeans")
    path = tmp_path / "out" / "final.pt"
    before = path.read_bytes()
    real = torch.save

    def full(payload, file, *args, **kwargs):
        file.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train("rqkmeans", seed=7, save_every=0)
    monkeypatch.setattr(torch, "save", real)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir() if "partial" in one.name] == []


def test_recon_loss_is_the_mean_squared_error():
    assert float(recon_loss(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))) == 1.5


def test_run_eval_is_over_all_rows(data_root):
    items = ItemData(data_root)
    codes = torch.arange(40) % 4

    def step(batch):
        rows = codes[batch.ids]
        error = batch.ids.double().mean()
        return error, 2 * error, torch.stack([rows, torch.zeros_like(rows)], dim=1)

    figures = run_eval(batches_in_order(items, 16), step, 2, 8)
    assert figures["avg_recon"] == pytest.approx(19.5)
    assert figures["avg_commit"] == pytest.approx(39.0)
    assert figures["p_unique"] == 0.1
    assert figures["entropies"] == pytest.approx([math.log2(4), 0.0])
    with pytest.raises(ValueError, match="no batches"):
        run_eval([], step, 2, 8)
    with pytest.raises(ValueError, match="expected 3 levels"):
        run_eval(batches_in_order(items, 16), step, 3, 8)
