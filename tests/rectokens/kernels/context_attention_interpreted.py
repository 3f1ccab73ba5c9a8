"""Run the context attention kernels in Triton's interpreter against the definition; print JSON.

A program of its own, because the interpreter is chosen when triton is first imported.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from rectokens.kernels import context_attention_launch as launch
from rectokens.ops.context_attention import (
    PackedPrompts,
    ScoreRule,
    beam_attention_reference,
    cut_into_tiles,
    prompt_attention_reference,
)
from tests.rectokens.kernels import poisoned

torch.set_num_threads(1)
SMALL = launch.AttentionTile(16, 16, 4, 1)
RULES = {
    "plain": ScoreRule(0.3),
    "window": ScoreRule(0.3, window=5),
    "softcap": ScoreRule(0.3, softcap=2.0),
    "both": ScoreRule(0.3, window=21, softcap=2.0),
}


Tensor.new_empty = poisoned.new_empty


def pages(generator, lengths, kv_heads, page_size, dim, dtype):
    """Shuffled pages, NaN wherever no prompt is."""
    counts = [-(-length // page_size) for length in lengths]
    total = sum(counts) + 2
    order = torch.randperm(total, generator=generator)[: sum(counts)]
    table = torch.full((len(lengths), max([*counts, 1])), 10_000, dtype=torch.int32)
    pool = [torch.full((total, kv_heads, page_size, dim), float("nan")).to(dtype) for _ in "kv"]
    taken = 0
    for request, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        own = order[taken : taken + count]
        table[request, :count] = own.int()
        taken += count
        for tensor in pool:
            row = torch.full((kv_heads, count * page_size, dim), float("nan"))
            row[:, :length] = torch.randn(kv_heads, length, dim, generator=generator)
            tensor[own] = row.view(kv_heads, count, page_size, dim).transpose(0, 1).to(dtype)
    return *pool, table


def close(found, wanted):
    atol = 1e-5 if wanted.dtype == torch.float32 else 4e-3
    return bool(torch.allclose(found.float(), wanted.float(), rtol=0, atol=atol))


def prompts(results):
    cases = [([37, 1, 16], [0, 3, 48]), ([5], [70]), ([40], [0])]
    for number, (counts, cached) in enumerate(cases):
        for name, rule in RULES.items():
            for page_size, dim, dtype, cut_rows, bulk in (
                (16, 16, torch.float32, 16, False),
                (64, 24, torch.float16, 16, False),
                (32, 16, torch.float16, 32, True),
            ):
                if bulk and rule.window is not None:
                    continue  # all positions need a mask then
                g = torch.Generator().manual_seed(number)
                lengths = [a + b for a, b in zip(counts, cached, strict=True)]
                keys, values, table = pages(g, lengths, 2, page_size, dim, dtype)
                # Wider rows than heads, as slices of a fused projection are.
                query = torch.randn(sum(counts), 4 * dim + 8, generator=g).to(dtype)
                query = query[:, : 4 * dim].unflatten(1, (4, dim))
                tiles = cut_into_tiles(counts, lengths, cut_rows)
                packed = PackedPrompts(
                    torch.tensor([0, *counts]).cumsum(0).int(),
                    torch.tensor(lengths).int(),
                    table,
                    torch.tensor([*tiles[0], -1]).int(),
                    torch.tensor([*tiles[1], 0]).int(),
                    cut_rows,
                )
                out = query.new_empty(tuple(query.shape))
                launch.launch_prompt(
                    query, keys, values, packed.tile_request, packed.tile_start,
                    packed.query_starts, packed.lengths, packed.page_table, out,
                    scale=rule.scale, window=rule.window, softcap=rule.softcap, tile=SMALL,
                    cut_rows=cut_rows, bulk=bulk,
                )  # fmt: skip
                wanted = prompt_attention_reference(query, keys, values, packed, rule)
                results[f"prompt/{number}/{name}/{page_size}"] = close(out, wanted)


def beams(results):
    for lengths, width, parts in (([33, 0, 70], 7, 3), ([5], 1, 1), ([48], 20, 4)):
        for name, rule in RULES.items():
            for page_size, dim, dtype, bulk in (
                (16, 16, torch.float32, False),
                (64, 24, torch.float16, False),
                (32, 16, torch.float16, True),
            ):
                if bulk and rule.window is not None:
                    continue
                for step in (0, 2):
                    g = torch.Generator().manual_seed(width)
                    keys, values, table = pages(g, lengths, 2, page_size, dim, dtype)
                    rows = len(lengths) * width
                    query = torch.randn(rows, 4 * dim + 8, generator=g).to(dtype)
                    query = query[:, : 4 * dim].unflatten(1, (4, dim))
                    own = [torch.randn(4, rows, 2, dim, generator=g).to(dtype) for _ in "kv"]
                    paths = torch.randint(0, width, (len(lengths), width, 4), generator=g).int()
                    paths[:, :, step] = torch.arange(width)
                    arguments = (query, keys, values, torch.tensor(lengths).int(), table, *own)
                    found = launch.launch_beams(
                        *arguments, paths, step, scale=rule.scale, window=rule.window,
                        softcap=rule.softcap, tile=SMALL, parts=parts, bulk=bulk,
                    )  # fmt: skip
                    wanted = beam_attention_reference(*arguments, paths, step, rule)
                    key = f"beams/{len(lengths)}/{width}/{name}/{page_size}/{step}"
                    results[key] = close(found, wanted)


results: dict[str, bool] = {}
prompts(results)
beams(results)
json.dump(results, sys.stdout)
