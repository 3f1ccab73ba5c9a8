"""Catalog beam search on static buffers: begin, one step a level, finish.

The definition is ``rectokens.decoding.beam_step``. Here the same step reads and writes tensors
whose addresses and shapes never change and takes everything that differs between batches from
device memory (:class:`TrieTable`, :class:`RequestTables`), so that on CUDA a whole search, with the
model's forward passes in between, is captured in one graph and replayed for any batch, any
constraint set and any catalog that fits. Elsewhere plain PyTorch does the same, slower::

    shapes = StepShapes.of(trie, width=256)
    table = TrieTable(trie, shapes)
    buffers = BeamBuffers(batch, shapes, device)
    requests = RequestTables(batch, max_exclusions, device)
    requests.load(batch_of_requests, trie.num_items)

    begin_search_(buffers, requests)
    beam_step_(table, buffers, requests, 0, logits)                  # (B, 1, K)
    for depth in range(1, shapes.num_levels):
        hidden = ...buffers.codes[depth], buffers.ancestors[depth]...  # (B, W, H)
        if shapes.levels[depth].gathers:
            logits = child_logits(table, buffers, depth, hidden, weight)  # (B, W, M)
            beam_step_(table, buffers, requests, depth, logits, compact=True)
        else:
            beam_step_(table, buffers, requests, depth, hidden @ weight.T)
    finish_search_(table, buffers, requests)
    answers = unpack_answers(buffers.answers.cpu(), shapes)          # the one wait
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from rectokens.decoding import device_search_reference
from rectokens.decoding.device_beams import BeamBuffers
from rectokens.decoding.device_requests import RequestTables
from rectokens.decoding.device_tables import TrieTable
from rectokens.ops.dispatch import triton_is_installed


def begin_search_(buffers: BeamBuffers, requests: RequestTables) -> None:
    """Start a search for the batch in ``requests``: every request at the root, none poisoned.

    Raises:
        ValueError: buffers and requests that do not belong together.
    """
    _check_batch(buffers, requests)
    _implementation(buffers.device).begin(buffers, requests)


def beam_step_(
    table: TrieTable,
    buffers: BeamBuffers,
    requests: RequestTables,
    depth: int,
    logits: Tensor,
    *,
    compact: bool = False,
    vocab_log_norm: Tensor | None = None,
    level_log_norm: Tensor | None = None,
) -> None:
    """Extend every beam by one code and keep each request's best, exactly: depth to depth + 1.

    Ties go to the earlier parent, then to the smaller code. Nothing waits for the device on CUDA.

    Args:
        table: the trie.
        buffers: read at ``depth``, written at ``depth + 1``.
        requests: the batch.
        depth: 0 to L - 1.
        logits: floating (B, W, K), last dimension contiguous, the LM's logits of this level's
            codes; (B, 1, K) will do at depth 0. With ``compact``, (B, W, M) as from
            :func:`child_logits`, M = ``buffers.shapes.levels[depth].max_children``.
        compact: the last dimension of ``logits`` is the beam's children, in order, not the codes.
        vocab_log_norm: float32 (B, W), log-sum-exp over the whole vocabulary. Needed when a
            request's normalization is ``vocab``: without it such a request has no answer.
        level_log_norm: float32 (B, W), log-sum-exp over the level's K codes. Computed from dense
            logits where it is None; needed with compact ones when a request's normalization is
            ``level``: without it such a request has no answer.

    Raises:
        ValueError: a depth, shape, dtype or device that does not fit.
    """
    _check_batch(buffers, requests)
    _check_depth(table, buffers, depth)
    width = 1 if depth == 0 and logits.ndim == 3 and logits.shape[1] == 1 else buffers.shapes.width
    last = buffers.shapes.levels[depth].max_children if compact else buffers.shapes.codebook_size
    _check_tensor("logits", logits, (buffers.batch, width, last), buffers.device)
    for name, norm in (("vocab_log_norm", vocab_log_norm), ("level_log_norm", level_log_norm)):
        if norm is not None:
            _check_tensor(name, norm, (buffers.batch, width), buffers.device)
    _implementation(buffers.device).step(
        table, buffers, requests, depth, logits, compact, vocab_log_norm, level_log_norm
    )


def child_logits(
    table: TrieTable,
    buffers: BeamBuffers,
    depth: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Logits of the children of every beam alone: gathers their weight rows, no (rows, K) product.

    ``(hidden . weight[code] + bias[code]) * factor``, then ``softcap * tanh(... / softcap)``,
    accumulated in float32.

    Args:
        table: the trie.
        buffers: whose beams at ``depth`` are looked at.
        depth: 0 to L - 1.
        hidden: floating (B, W, H).
        weight: floating (K, H), rows of the LM head for this level's codes.
        bias: floating (K,) or None.
        factor: constant that the head's outputs are multiplied by.
        softcap: bound of the head's outputs, or None.

    Returns:
        float32 (B, W, M), M = ``buffers.shapes.levels[depth].max_children``: children in order,
        -inf in slots that hold none and in dead beams.

    Raises:
        ValueError: a depth, shape, dtype or device that does not fit.
    """
    _check_depth(table, buffers, depth)
    shapes = buffers.shapes
    _check_tensor("weight", weight, (shapes.codebook_size, weight.shape[-1]), buffers.device)
    _check_tensor("hidden", hidden, (buffers.batch, shapes.width, weight.shape[1]), buffers.device)
    if bias is not None:
        _check_tensor("bias", bias, (shapes.codebook_size,), buffers.device)
    found: Tensor = _implementation(buffers.device).child_logits(
        table, buffers, depth, hidden, weight, bias, factor, softcap
    )
    return found


def finish_search_(table: TrieTable, buffers: BeamBuffers, requests: RequestTables) -> None:
    """Turn the beams at the leaves into items and pack all a caller wants into ``answers``.

    Raises:
        ValueError: buffers and requests that do not belong together.
    """
    _check_batch(buffers, requests)
    _check_depth(table, buffers, buffers.shapes.num_levels - 1)
    _implementation(buffers.device).finish(table, buffers, requests)


def _implementation(device: torch.device) -> Any:
    """The module whose functions do the work: kernels on CUDA, plain PyTorch elsewhere."""
    if device.type == "cuda" and triton_is_installed():
        return importlib.import_module("rectokens.kernels.beam_launch")
    return device_search_reference


def _check_batch(buffers: BeamBuffers, requests: RequestTables) -> None:
    if buffers.batch != requests.batch or buffers.device != requests.device:
        raise ValueError(
            f"the requests are for batches of {requests.batch} on {requests.device}; "
            f"the buffers for {buffers.batch} on {buffers.device}"
        )


def _check_depth(table: TrieTable, buffers: BeamBuffers, depth: int) -> None:
    if table.shapes != buffers.shapes or table.device != buffers.device:
        raise ValueError("the table and the buffers are for other shapes or devices")
    if not 0 <= depth < buffers.shapes.num_levels:
        raise ValueError(
            f"depth is {depth}; allowed are 0 to {buffers.shapes.num_levels - 1} "
            f"for {buffers.shapes.num_levels} levels"
        )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
            f"expected floating point {shape} on {device}"
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; expected 1")
