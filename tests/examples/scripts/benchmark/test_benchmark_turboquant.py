"""The benchmark checks before it times, and writes what it prints."""

import csv

import pytest
import torch

from examples.scripts.benchmark import benchmark_turboquant as benchmark
from examples.scripts.benchmark import turboquant_arms as arms


def test_every_arm_is_timed_and_written(tmp_path):
    path = tmp_path / "out.csv"
    arguments = ["--device", "cpu", "--dims", "64", "768", "--bits", "4", "--rows", "3"]
    records = benchmark.main([*arguments, "--repeats", "2", "--csv", str(path)])
    found = {(r.direction, r.arm, r.dim, r.dtype) for r in records}
    assert found == {
        (direction, arm, dim, dtype)
        for direction, arm in (("encode", "kernel"), ("decode", "kernel"), ("encode", "dense"))
        for dim in (64, 768)
        for dtype in ("bf16", "fp32")
    }
    assert all(record.microseconds > 0 for record in records)
    with path.open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(records)
    assert written[0]["dim"] == "64"


def test_bytes_of_the_contract():
    # d = 4,096, bf16 in, 4 bits out: 10,244 bytes a row.
    assert benchmark.ideal_bytes("encode", 4096, 4, 2, 1) == 10_244
    assert benchmark.ideal_bytes("decode", 4096, 4, 2, 2) == 2 * 18_436


@pytest.mark.parametrize(("dim", "bits"), [(64, 4), (512, 2), (1024, 8)])
def test_the_two_step_form_gives_the_same_codes(dim, bits):
    x = torch.randn(40, dim, generator=torch.Generator().manual_seed(dim))
    cpu = torch.device("cpu")
    transform = arms.product_transform(dim, torch.float32, cpu)
    packed, norms = arms.two_step(dim, bits, transform, torch.float32, cpu)(x)
    expected = benchmark.quantizer_for(dim, bits).encode(x)
    differing = benchmark.unpack(packed, bits, dim) != benchmark.unpack(expected[0], bits, dim)
    assert differing.double().mean() < 0.002
    torch.testing.assert_close(norms, expected[1])


def test_a_wrong_result_ends_the_run(monkeypatch):
    class Wrong:
        def __init__(self, right):
            self.right, self.calls = right, 0

        def encode(self, x):
            packed, norms = self.right.encode(x)
            self.calls += 1
            return (packed ^ 0x11 if self.calls > 1 else packed), norms

        def decode(self, packed, norms):
            return self.right.decode(packed, norms)

    wrong = Wrong(benchmark.quantizer_for(64, 4))
    monkeypatch.setattr(benchmark, "quantizer_for", lambda *_: wrong)
    with pytest.raises(RuntimeError, match="of indices differ"):
        benchmark.check(64, 4, torch.float32, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA device"):
        benchmark.main([])
