"""Attention over context KV in pages: for packed prompts, and for beams that share a prompt.

The plain PyTorch here defines the result; on CUDA a kernel computes it where it can.

Shapes: B requests, W beams each, R packed rows, P pages, Hq query heads, Hkv key heads, D head
dimension. Keys and values in pages: (P, Hkv, page size, D); position t of a request lies in page
``page_table[request, t // page_size]`` at ``t % page_size``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rectokens.ops.dispatch import triton_is_installed


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """How attention scores are made from products.

    Attributes:
        scale: factor.
        window: positions a query sees, itself included; None for all.
        softcap: bound, by tanh; None for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def __call__(self, products: Tensor, distance: Tensor) -> Tensor:
        """Scores in float32, -inf where the key is out of sight.

        Args:
            products: query times key.
            distance: query position minus key position, broadcast over ``products``.
        """
        scores = products.float() * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        return scores.masked_fill(~seen, -torch.inf)


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """Where the rows of packed prompts and their keys are.

    Attributes:
        query_starts: int32 (B + 1,), first row of each request, then R.
        lengths: int32 (B,), positions of each in the pages: cached ones, then its rows.
        page_table: int32 (B, most pages).
        tile_request: int32 (tiles,), request of each tile of rows, then -1 where there is none.
        tile_start: int32 (tiles,), first row of each tile, counted within the request. Rows
            that no tile covers get no result.
        tile_rows: rows of a tile.
        longest: positions of the longest prompt, by which a kernel is chosen; 0 where that is not
            known, or tiles are of few rows. No result depends on it.
    """

    query_starts: Tensor
    lengths: Tensor
    page_table: Tensor
    tile_request: Tensor
    tile_start: Tensor
    tile_rows: int
    longest: int = 0


def prompt_tile_rows(dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows that prompts are best cut to for :func:`prompt_attention`.

    Args:
        dim: D.
        dtype: of queries and keys.
        device: where they are.
    """
    if device.type == "cuda" and triton_is_installed():
        from rectokens.kernels.context_attention_launch import prompt_tile

        return prompt_tile(dim, dtype).rows
    return 64


def long_prompts_from(
    dim: int, dtype: torch.dtype, page_size: int, device: torch.device, rows: int
) -> int | None:
    """Positions from which on :func:`prompt_attention` computes a prompt in another way.

    What is captured for prompts of any length is worth capturing twice then.

    Args:
        dim: D.
        dtype: of queries and keys.
        page_size: positions of a page.
        device: where they are.
        rows: of the prompts together.

    Returns:
        None where all go the same way.
    """
    if not has_kernel(dim, dtype, device):
        return None
    from rectokens.kernels.context_attention_launch import long_from

    return long_from(dim, dtype, page_size, device, rows)


def has_kernel(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels compute these attentions, which then never wait for the host.

    Args:
        dim: D.
        dtype: of queries and keys.
        device: where they are.
    """
    if device.type == "cuda" and triton_is_installed():
        from rectokens.kernels.context_attention_launch import takes

        return takes(dim, dtype)
    return False


def prompt_attention(
    query: Tensor, keys: Tensor, values: Tensor, prompts: PackedPrompts, rule: ScoreRule
) -> Tensor:
    """Causal attention of packed prompts over keys that are in the pages already.

    Args:
        query: (R, Hq, D).
        keys: (P, Hkv, page size, D).
        values: likewise.
        prompts: where rows and keys are.
        rule: of the scores.

    Returns:
        (R, Hq, D).
    """
    if query.is_cuda and triton_is_installed():
        from rectokens.kernels import context_attention_launch as kernels

        tile = kernels.prompt_tile(query.shape[-1], query.dtype)
        if kernels.fits(query, keys) and tile.rows == prompts.tile_rows:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
            kernels.launch_prompt(
                query,
                keys,
                values,
                prompts.tile_request,
                prompts.tile_start,
                prompts.query_starts,
                prompts.lengths,
                prompts.page_table,
                out,
                scale=rule.scale,
                window=rule.window,
                softcap=rule.softcap,
                longest=prompts.longest,
            )
            return out
    return prompt_attention_reference(query, keys, values, prompts, rule)


def prompt_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, prompts: PackedPrompts, rule: ScoreRule
) -> Tensor:
    """The definition of :func:`prompt_attention`; computes all rows, tiles or not."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    starts = prompts.query_starts.tolist()
    for request, length in enumerate(prompts.lengths.tolist()):
        rows = slice(starts[request], starts[request + 1])
        count = rows.stop - rows.start
        if not count:
            continue
        table = prompts.page_table[request]
        own_keys = _gathered(keys, table, length, query.shape[1])
        own_values = _gathered(values, table, length, query.shape[1])
        products = torch.einsum("rhd,hnd->hrn", query[rows].float(), own_keys.float())
        device = query.device
        positions = torch.arange(length - count, length, device=device)
        distance = positions[:, None] - torch.arange(length, device=device)
        weights = rule(products, distance).softmax(-1)
        out[rows] = torch.einsum("hrn,hnd->rhd", weights, own_values.float()).to(query.dtype)
    return out


def beam_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    paths: Tensor,
    step: int,
    rule: ScoreRule,
) -> Tensor:
    """Attention of beams over their request's context and their own positions.

    Args:
        query: (B * W, Hq, D).
        keys: (P, Hkv, page size, D), the context.
        values: likewise.
        lengths: int32 (B,), context lengths; 0 for a request that is not there.
        page_table: int32 (B, most pages).
        own_keys: (steps, B * W, Hkv, D), by the slot that made them; steps 0 to ``step`` are read.
        own_values: likewise.
        paths: int32 (B, W, at least step + 1), contiguous, slot of each beam's ancestor at steps 0
            to ``step``; at ``step`` its own.
        step: generated positions before this one; the query's position is ``lengths + step``.
        rule: of the scores.

    Returns:
        (B * W, Hq, D).
    """
    if query.is_cuda and triton_is_installed():
        from rectokens.kernels import context_attention_launch as kernels

        if kernels.fits(query, keys):
            return kernels.launch_beams(
                query,
                keys,
                values,
                lengths,
                page_table,
                own_keys,
                own_values,
                paths,
                step,
                scale=rule.scale,
                window=rule.window,
                softcap=rule.softcap,
            )
    return beam_attention_reference(
        query, keys, values, lengths, page_table, own_keys, own_values, paths, step, rule
    )


def beam_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    paths: Tensor,
    step: int,
    rule: ScoreRule,
) -> Tensor:
    """The definition of :func:`beam_attention`: one softmax over context and own positions."""
    heads = query.shape[1]
    width = paths.shape[1]
    device = query.device
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for request, length in enumerate(lengths.tolist()):
        rows = slice(request * width, (request + 1) * width)
        found = paths[request, :, : step + 1].long().T + rows.start  # (steps, W)
        steps = torch.arange(step + 1, device=device)[:, None]
        mine = [
            stored[steps, found].repeat_interleave(heads // stored.shape[2], 2).float()
            for stored in (own_keys, own_values)
        ]  # each (steps, W, Hq, D)
        context_keys = _gathered(keys, page_table[request], length, heads).float()
        context_values = _gathered(values, page_table[request], length, heads).float()
        queries = query[rows].float()
        products = torch.cat(
            [
                torch.einsum("whd,hnd->whn", queries, context_keys),
                torch.einsum("whd,swhd->whs", queries, mine[0]),
            ],
            dim=-1,
        )
        distance = length + step - torch.arange(length + step + 1, device=device)
        weights = rule(products, distance).softmax(-1)
        result = torch.einsum("whn,hnd->whd", weights[..., :length], context_values)
        result += torch.einsum("whs,swhd->whd", weights[..., length:], mine[1])
        out[rows] = result.to(query.dtype)
    return out


def _gathered(pages: Tensor, table: Tensor, length: int, heads: int) -> Tensor:
    """One request's keys or values in order of position, a copy a query head: (Hq, length, D)."""
    size = pages.shape[2]
    found = pages[table[: -(-length // size)].long()]  # (n, Hkv, page size, D)
    joined = found.transpose(0, 1).flatten(1, 2)[:, :length]
    return joined.repeat_interleave(heads // pages.shape[1], 0)


def cut_into_tiles(
    counts: list[int], lengths: list[int], tile_rows: int
) -> tuple[list[int], list[int]]:
    """Tiles of rows of packed prompts, those that read most positions first.

    Args:
        counts: rows of each request.
        lengths: positions of each in the pages.
        tile_rows: rows of a tile.

    Returns:
        Request and first row of each tile.
    """
    tiles = [
        (lengths[request] - count + start, request, start)
        for request, count in enumerate(counts)
        for start in range(0, count, tile_rows)
    ]
    tiles.sort(key=lambda tile: -tile[0])
    return [request for _, request, _ in tiles], [start for _, _, start in tiles]
