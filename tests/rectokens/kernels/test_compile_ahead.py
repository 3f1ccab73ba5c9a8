"""Kernels are compiled for a device that is not there, by threads, and launches find them."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from rectokens.decoding.device_beams import BeamBuffers
from rectokens.decoding.device_requests import RequestTables
from rectokens.decoding.device_tables import StepShapes, TrieTable
from rectokens.kernels import beam_launch, compile_ahead, decoder_launch
from rectokens.kernels.beam_triton import score_kernel
from rectokens.schemas.catalog_trie import CatalogTrie

CODES = [(a, b) for a in range(6) for b in range(a + 1)]


class Hopper:
    """What Triton asks of a driver before it launches, of a device that no other test has."""

    _numbers = itertools.count(1000)

    def __init__(self) -> None:
        self._number = next(self._numbers)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Names of the kernels that were compiled, as by a machine that never compiled any."""
    names: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **known: names.append(known["fn"].name)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Hopper())
    yield names
    triton.runtime.driver._active = before
    triton.knobs.runtime.jit_post_compile_hook = hook


def search_of(batch: int, width: int) -> tuple[Callable[[], None], BeamBuffers]:
    """All launches of a search, and what they write to."""
    trie, _ = CatalogTrie.from_codes(torch.tensor(CODES), 8)
    shapes = StepShapes.of(trie, width)
    table, buffers = TrieTable(trie, shapes), BeamBuffers(batch, shapes, "cpu")
    requests = RequestTables(batch, 8, torch.device("cpu"))

    def launch() -> None:
        beam_launch.begin(buffers, requests)
        for depth in range(shapes.num_levels):
            logits = torch.zeros(batch, width if depth else 1, 8)
            beam_launch.step(table, buffers, requests, depth, logits, False, None, None)
        beam_launch.finish(table, buffers, requests)

    return launch, buffers


def launched_anew(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of a call, up to where the device would be needed."""

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> None:
            found = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            if isinstance(found, triton.FutureKernel):
                found.result()

        return launch

    with monkeypatch.context() as patch:
        patch.setattr(beam_launch, "launcher", launcher)
        patch.setattr(decoder_launch, "launcher", launcher)
        call()


def test_launches_find_what_was_compiled(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, buffers = search_of(2, 3)
    before = {
        name: value.clone() for name, value in vars(buffers).items() if torch.is_tensor(value)
    }
    seen = compile_ahead.compile_ahead([launch, launch])
    assert {name.rsplit(".", 1)[-1] for name in compiled} == {
        "begin_kernel", "score_kernel", "rank_kernel", "finish_kernel"
    }  # fmt: skip
    assert seen >= len(compiled) > 0
    for name, value in before.items():  # nothing was launched
        assert torch.equal(getattr(buffers, name), value), name
    count = len(compiled)
    launched_anew(launch, monkeypatch)
    assert len(compiled) == count


def test_a_batch_of_another_size_needs_no_other_kernels(compiled: list[str]) -> None:
    compile_ahead.compile_ahead([search_of(1, 16)[0]])
    count = len(compiled)
    assert count > 0
    compile_ahead.compile_ahead([search_of(batch, 16)[0] for batch in (2, 3, 4, 7)])
    assert len(compiled) == count


def test_a_call_that_fails_keeps_no_other_from_being_compiled(compiled: list[str]) -> None:
    def failing() -> None:
        raise ValueError("never mind")

    x, weight = torch.zeros(4, 24), torch.ones(24)

    def norm() -> None:
        decoder_launch.launch_add_norm(x, None, weight, 1e-6, offset=False)

    assert compile_ahead.compile_ahead([failing, norm]) == 1
    assert [name.rsplit(".", 1)[-1] for name in compiled] == ["add_norm_kernel"]


@triton.jit
def broken_kernel(x_ptr):
    tl.static_assert(False, "says why")


def test_a_kernel_that_does_not_compile_is_left_to_its_launch(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rectokens.kernels.compile_ahead")
    x, weight = torch.zeros(4, 40), torch.ones(40)

    def call() -> None:
        beam_launch.launcher(broken_kernel, (1,))(x)
        decoder_launch.launch_add_norm(x, None, weight, 1e-6, offset=False)

    assert compile_ahead.compile_ahead([call]) == 2
    assert {record.message for record in caplog.records} == {"a kernel is not compiled ahead"}
    assert "says why" in caplog.text
    assert [name.rsplit(".", 1)[-1] for name in compiled] == ["add_norm_kernel"], caplog.text
    with pytest.raises(triton.CompilationError, match="says why"):
        launched_anew(call, monkeypatch)


def test_a_compiler_that_fails_once_is_asked_again(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rectokens.kernels.compile_ahead")
    failures = ["killed", "killed again", "killed for good"]
    compiler = triton.compiler.compile

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise OSError(failures.pop(0))
        return compiler(*args, **kwargs)

    monkeypatch.setattr(triton.compiler, "compile", sometimes)
    x, weight = torch.zeros(4, 56), torch.ones(56)

    def norm() -> None:
        decoder_launch.launch_add_norm(x, None, weight, 1e-6, offset=False)

    assert compile_ahead.compile_ahead([norm]) == 1
    assert "killed" in caplog.text
    for _ in range(len(failures)):
        with pytest.raises(OSError, match="killed"):
            launched_anew(norm, monkeypatch)
    launched_anew(norm, monkeypatch)
    assert [name.rsplit(".", 1)[-1] for name in compiled] == ["add_norm_kernel"]
    launched_anew(norm, monkeypatch)
    assert len(compiled) == 1


@pytest.fixture
def collector_lets_go() -> Iterator[None]:
    """A collector that runs often, and lets other threads run each time."""

    def let_go(phase: str, info: dict[str, int]) -> None:
        time.sleep(0.0002)

    before = gc.get_threshold()
    gc.callbacks.append(let_go)
    gc.set_threshold(100, 100, 1000)  # mostly the youngest objects, which is soon done
    yield
    gc.set_threshold(*before)
    gc.callbacks.remove(let_go)


@pytest.mark.usefixtures("collector_lets_go")
def test_sources_are_parsed_one_at_a_time(
    compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rectokens.kernels.compile_ahead")
    calls = [search_of(1, width)[0] for width in (3, 20)]
    assert compile_ahead.compile_ahead(calls) >= len(compiled) > 0
    assert not caplog.records, caplog.text


def test_other_threads_launch_meanwhile(compiled: list[str]) -> None:
    found: list[Any] = []

    def ask() -> None:
        found.append(compile_ahead.launcher(score_kernel, (1,)))

    def call() -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        ask()

    compile_ahead.compile_ahead([call])
    ask()
    from_another, ahead, afterwards = (getattr(launch, "func", None) for launch in found)
    assert from_another is None
    assert ahead is not None
    assert afterwards is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_called() -> None:
    calls: list[int] = []
    assert compile_ahead.compile_ahead([lambda: calls.append(1)]) == 0
    assert not calls


def test_in_the_interpreter_nothing_is_called(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    calls: list[int] = []
    assert compile_ahead.compile_ahead([lambda: calls.append(1)]) == 0
    assert not calls
