"""Kernels compiled side by side before they are needed. Nothing here is public.

Triton compiles a kernel when it is first launched, while the launch waits. A warm-up that launches
dozens of variants for the first time therefore compiles them one after another. Here the same
calls are gone through once without launching anything: every kernel that they would launch is
compiled by threads meanwhile (machine code is made outside the interpreter's lock), and finds its
way to where the launch looks for it. No list of variants is kept, so none can go out of date.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from rectokens.kernels.optional_triton import triton

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MAX_THREADS = 32
_ALIGNED = 16  # bytes: Triton makes variants by whether a pointer is a multiple of this

# Launches that were seen, while this thread only compiles.
_seen: ContextVar[set[Any] | None] = ContextVar("rectokens_compiling_ahead", default=None)


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``; while compiling ahead, what compiles the kernel for the same arguments.

    Args:
        kernel: a function under ``triton.jit``.
        grid: programs in each dimension.
    """
    seen = _seen.get()
    if seen is None:
        launch: Callable[..., Any] = kernel[grid]
        return launch
    return partial(_compile, kernel, seen)


def compile_ahead(calls: Iterable[Callable[[], object]]) -> int:
    """Compile what the calls will launch; returns once all of it is compiled.

    The calls run without their kernels, so that what kernels would have written is undefined;
    everything else that they do happens. They must not index by what a kernel has written, nor wait
    for it. A call that fails and a kernel that does not compile are left to their turn, which says
    why.

    Without a GPU that Triton knows, or in its interpreter, the calls are not made.

    Args:
        calls: made one after another, in this thread. Launches of other threads are launches.

    Returns:
        Launches that differ in what a kernel is compiled for, or more.
    """
    if not can_compile():
        return 0
    threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    with (
        _Compilers(threads, thread_name_prefix="compile") as executor,
        _noting() as seen,
        triton.AsyncCompileMode(executor, ignore_errors=True),
    ):
        for call in calls:
            try:
                call()
            except Exception:
                logger.info("not all that a call launches is compiled ahead", exc_info=True)
    return len(seen)


def can_compile() -> bool:
    """Whether Triton is there and knows a device to compile for."""
    try:
        if triton.knobs.runtime.interpret:
            return False
        triton.runtime.driver.active.get_current_target()
    except (ImportError, RuntimeError):  # no Triton, no driver
        return False
    return True


class _Compilers(ThreadPoolExecutor):
    """Threads whose compilations are repeated by who asks for them, if they failed."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        compilation = _Compilation(partial(fn, *args, **kwargs))
        super().submit(compilation.run)
        return compilation


class _Compilation(Future[_T]):
    """The kernel, compiled ahead or, where that failed, at last.

    Triton keeps this for every launch of the variant. What has failed for a reason that passes, as
    of a machine without memory, must not fail for as long as the process lives.
    """

    def __init__(self, compiler: Callable[[], _T]) -> None:
        super().__init__()
        self._compiler = compiler

    def run(self) -> None:
        try:
            self.set_result(self._compiler())
        except BaseException as error:  # the future must end, however its compiler did
            logger.info("a kernel is not compiled ahead", exc_info=True)
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> _T:
        return super().result() if self.exception(timeout) is None else self._compiler()


@contextmanager
def _noting() -> Iterator[set[Any]]:
    seen: set[Any] = set()
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def _compile(kernel: Any, seen: set[Any], *args: Any, **kwargs: Any) -> None:
    # Once a variant is enough, and layers of a model launch the same ones.
    key = (kernel.__module__, kernel.__name__, *map(_kind, args), *kwargs.items())
    if key not in seen:
        seen.add(key)
        kernel.run(*args, grid=(1,), warmup=True, **kwargs)


def _kind(value: Any) -> Any:
    """What an argument can make of a variant, at least."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _ALIGNED
    base = getattr(value, "base", None)
    if isinstance(base, Tensor):  # a descriptor of bulk copies
        return base.dtype, *value.shape, *value.strides, *value.block_shape
    return value
