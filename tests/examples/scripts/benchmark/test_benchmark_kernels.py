"""The kernel benchmarks, tried out on the CPU at small sizes: options, checks, CSV files."""

import csv

import pytest
import torch

from examples.scripts.benchmark import (
    benchmark_constrained_serving,
    benchmark_first_call,
    benchmark_fused_sample,
    benchmark_nn_quantize,
    benchmark_residual_quantize,
    benchmark_trie_build,
    benchmark_vtnk,
    kernel_timing,
)

MODULES = [
    benchmark_vtnk,
    benchmark_fused_sample,
    benchmark_nn_quantize,
    benchmark_constrained_serving,
]
SMALL = {
    benchmark_vtnk: ["--batches", "2", "4", "--vocabs", "40", "--hidden", "8"],
    benchmark_fused_sample: ["--batches", "2", "--vocabs", "300", "--hidden", "8", "--topk", "5"],
    benchmark_nn_quantize: ["--batches", "3", "--dims", "4", "8", "--codes", "5"],
    benchmark_constrained_serving: [
        *("--rows", "5", "--hiddens", "8", "--vocab", "60", "--nodes", "20", "--most", "9"),
        *("--topk", "3"),
    ],
    benchmark_residual_quantize: ["--batches", "40", "--dims", "8", "--codes", "12"],
    benchmark_trie_build: ["--items", "4000", "--repeats", "1"],
    benchmark_first_call: ["--hidden", "16", "--vocab", "64", "--most", "8"],
}


def run(module, folder, *more):
    """Lines of the table and, where there is one, of the table of details."""
    module.main(["--device", "cpu", "--out", str(folder), *SMALL[module], *more])
    tables = []
    for path in sorted(folder.glob("*.csv")):
        with path.open() as file:
            tables.append(list(csv.DictReader(file)))
    return tables


def test_vtnk(tmp_path):
    lines, details = run(benchmark_vtnk, tmp_path)
    assert (tmp_path / "bench_vtnk.csv").exists()
    assert [(line["B"], line["N"]) for line in lines] == [("2", "40"), ("4", "40")]
    assert list(lines[0]) == [
        *("B", "N", "ms_fused", "ms_kernel", "ms_pytorch", "ms_sparse_pytorch"),
        *("speedup_fused_vs_kernel", "speedup_fused_vs_pytorch"),
        "speedup_fused_vs_sparse_pytorch",
    ]
    assert all(float(line["ms_fused"]) > 0 for line in lines)
    for line in details:
        floor = max(float(line["floor_ms_write"]), float(line["floor_ms_product"]))
        assert float(line["times_floor"]) == pytest.approx(float(line["ms_fused"]) / floor, rel=0.2)


def test_vtnk_with_the_opt_in_arm_at_one_size(tmp_path):
    more = ["--algorithms", "fused", "trie_cpu", "--batches", "3"]
    lines, _ = run(benchmark_vtnk, tmp_path, *more)
    assert float(lines[0]["ms_trie_cpu"]) > 0
    assert "ms_kernel" not in lines[0]


def test_fused_sample(tmp_path):
    lines, details = run(benchmark_fused_sample, tmp_path)
    assert (tmp_path / "bench_fused_sample.csv").exists()
    assert list(lines[0]) == [
        *("B", "N", "ms_fused_sample", "ms_sparse_pytorch_sample", "ms_fused_topk"),
        *("ms_sparse_pytorch_topk", "speedup_fused_vs_sparse_pytorch_sample"),
        "speedup_fused_topk_vs_sparse_pytorch_topk",
    ]
    # Three of 300 tokens are allowed: k is capped.
    assert details[0]["k"] == "3"
    assert float(details[0]["times_floor_fused_topk"]) > 0


def test_nn_quantize(tmp_path):
    lines, details = run(benchmark_nn_quantize, tmp_path)
    assert (tmp_path / "bench_nn_quantize_N5.csv").exists()
    assert list(lines[0]) == [
        *("B", "D", "BN", "ms_quantize_fwd", "ms_quantize_fwd_mm", "ms_cdist_compiled"),
        *("ms_faiss_search", "speedup_fwd_vs_mm", "speedup_fwd_vs_cdist", "speedup_mm_vs_cdist"),
        *("speedup_fwd_vs_faiss", "speedup_mm_vs_faiss"),
    ]
    assert {line["agreement_quantize_fwd"] for line in details} == {"1.0"}


def test_serving(tmp_path):
    (lines,) = run(benchmark_constrained_serving, tmp_path)
    assert [line["algorithm"] for line in lines] == ["fused", "topk", "sample", "sparse_pytorch"]
    assert all(float(line["floor_ms"]) > 0 and line["M"] == "9" for line in lines)


def test_residual_quantize(tmp_path):
    ((line,),) = run(benchmark_residual_quantize, tmp_path)
    assert (line["B"], line["K"], line["L"]) == ("40", "12", "4")
    assert float(line["ms_one_pass"]) > 0
    assert float(line["agreement_cdist"]) > 0.9


def test_residual_quantize_times_nothing_that_differs(tmp_path, monkeypatch):
    def wrong(x, books):
        return torch.zeros(x.shape[0], books.shape[0], dtype=torch.long)

    monkeypatch.setattr(benchmark_residual_quantize, "residual_quantize_fwd", wrong)
    with pytest.raises(RuntimeError, match="differ"):
        run(benchmark_residual_quantize, tmp_path)


def test_trie_build(tmp_path):
    ((line,),) = run(benchmark_trie_build, tmp_path)
    assert line["items"] == "4000"
    assert float(line["median_s"]) > 0
    # At least a code an item, at most the 8 bytes of an edge a level.
    assert 4 < float(line["bytes_per_item"]) < 64


def test_first_call(tmp_path):
    (lines,) = run(benchmark_first_call, tmp_path)
    assert [line["op"] for line in lines] == [
        *("constrained_node_transition", "fused_linear_constrained_node_transition"),
        *("rank_children", "draw_children", "quantize_fwd", "residual_quantize_fwd"),
    ]
    assert all(float(line["again_s"]) > 0 for line in lines)


def test_the_grids_of_the_contract():
    options = benchmark_vtnk.parse([])
    assert tuple(options.batches) == (256, 1024, 4096)
    assert tuple(options.vocabs) == (512, 1024, 8192, 150_000)
    assert (options.hidden, options.dtype, options.sparsity) == (512, "float32", 0.01)
    assert "trie_cpu" not in options.algorithms
    assert benchmark_fused_sample.parse([]).topk == 50
    grid = benchmark_nn_quantize.parse([])
    assert tuple(grid.batches) == (32, 256, 1024, 4096, 16_384, 32_768, 65_536)
    assert (tuple(grid.dims), tuple(grid.codes)) == ((64, 128, 256), (64, 128, 256, 512))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_an_unknown_algorithm_is_refused(module, capsys):
    with pytest.raises(SystemExit):
        module.parse(["--algorithms", "magic"])
    assert "magic" in capsys.readouterr().err


def test_a_wrong_result_prints_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(
        benchmark_nn_quantize, "quantize_fwd", lambda x, _: torch.full((x.shape[0],), 0)
    )
    with pytest.raises(RuntimeError, match="agree with float64"):
        run(benchmark_nn_quantize, tmp_path, "--batches", "64")
    assert not list(tmp_path.iterdir())


def test_a_ratio_needs_both_times():
    assert kernel_timing.ratio(3.0, 2.0) == 1.5
    assert kernel_timing.ratio(None, 2.0) is None
    assert kernel_timing.ratio(float("nan"), 2.0) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_without_a_device_it_says_so(module):
    with pytest.raises(SystemExit, match="no CUDA device"):
        module.main([])
