"""Several runs as one summary."""

from __future__ import annotations

import json

import pytest

from examples.evaluation.ranks import figures
from examples.scripts.eval.summarize_seeds import main, summarize


def write(path, key, excluded, everything, **more):
    path.write_text(
        json.dumps(
            {
                **more,
                key: {
                    "history left out": figures(excluded),
                    "all items ranked": figures(everything),
                },
            }
        )
    )
    return path


def test_mean_and_spread(tmp_path, capsys):
    runs = [
        write(tmp_path / "a.json", "test", [1, 7, None, None], [2, 8, None, None], seed=4),
        write(tmp_path / "b.json", "server", [1, 2, 6, None], [3, 4, 6, None]),
    ]
    out = tmp_path / "out" / "beauty.json"
    main([*map(str, runs), "--command", "train it", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["recall@5"] == pytest.approx((1 / 4 + 2 / 4) / 2, abs=1e-4)
    assert found["recall@10"] == pytest.approx((2 / 4 + 3 / 4) / 2, abs=1e-4)
    assert found["ndcg@5"] == pytest.approx((0.25 + 1.63093 / 4) / 2, abs=1e-4)
    assert found["spread"]["recall@5"] == pytest.approx(0.1768, abs=1e-4)
    assert found["all_items"]["recall@5"] == pytest.approx((1 / 4 + 2 / 4) / 2, abs=1e-4)
    assert [one["seed"] for one in found["seeds"]] == [4, 1]
    assert found["command"] == "train it"
    assert json.loads(capsys.readouterr().out) == found


def test_one_run_has_no_spread(tmp_path):
    found = summarize([write(tmp_path / "a.json", "test", [1], [1])], "x")
    assert found["spread"] == {}
    assert found["recall@5"] == 1.0


def test_files_without_figures_are_named(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a.json"), "--command", "x", "--out", str(tmp_path / "b.json")])
    assert "a.json has no figures on test users" in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()
