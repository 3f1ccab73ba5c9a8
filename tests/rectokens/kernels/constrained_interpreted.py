"""Run the constrained kernels in Triton's interpreter against the references; print JSON.

A program of its own, because the interpreter is chosen when triton is first imported. Every output
is poisoned: `new_empty` gives NaN, or an id that no trie has.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from torch import Tensor

from rectokens.kernels import constrained_launch as launch
from rectokens.kernels import constrained_node_transition as ops
from rectokens.kernels.selection_triton import gumbel_of, hash_of
from rectokens.ops.counter_rng import gumbel, hash64
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from tests.rectokens.kernels import poisoned

torch.set_num_threads(1)
NAMES = ("transition", "linear", "topk", "sampling")
INF = float("inf")


Tensor.new_empty = poisoned.new_empty


def random_trie(shape: str, vocab: int, g) -> CompactCSRTrie:
    if shape == "chains":
        items = torch.arange(vocab).unsqueeze(1).repeat(1, 2)
    elif shape == "one item":
        items = torch.randint(vocab, (1, 2), generator=g)
    elif shape == "all children":
        items = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    else:
        items = torch.randint(vocab, (3 * vocab, 2), generator=g)
        if shape == "skewed":
            items[: 2 * vocab, 0] = vocab - 1
    return CompactCSRTrie.from_sorted_batch(items, vocab, 1)


def nodes_of(trie, step, rows, kind, g):
    """Rows at the root, at one node, or anywhere at that depth with leaves and no nodes between."""
    first = 0 if step == 0 else 1
    count = 1 if step == 0 else int(trie.row_ptrs[1])
    if kind == "one":
        return torch.full((rows,), first)
    node = first + torch.randint(count, (rows,), generator=g)
    draw = torch.rand(rows, generator=g)
    node[draw < 0.1] = -1
    node[draw > 0.9] = trie.num_edges
    node[(draw > 0.5) & (draw < 0.55)] = trie.num_edges + 5
    return node


def layer(rows, hidden, vocab, dtype, seed, g):
    a = torch.randn(rows, hidden, generator=g).to(dtype)
    weight = torch.randn(vocab, hidden, generator=g).to(dtype)
    bias = torch.randn(vocab, generator=g).to(dtype) if seed % 2 else None
    return a, (weight.T if seed % 3 else weight.T.contiguous()), bias


def same(got, wanted, *, exact):
    for left, right in zip(got, wanted, strict=True):
        if left.shape != right.shape or left.dtype != right.dtype or not left.is_contiguous():
            return f"{left.shape} {left.dtype} for {right.shape} {right.dtype}"
        if left.dtype.is_floating_point and not exact:
            if not torch.allclose(left, right, atol=1e-4, rtol=1e-4):
                return f"off by {(left - right).abs().nan_to_num().max()}"
        elif not torch.equal(left.nan_to_num(123.0), right.nan_to_num(123.0)):
            return f"{int((left != right).sum())} of {left.numel()} differ"
    return "ok"


def compare(name, shape, vocab, rows, step, kind, dtype, seed, settings, k=3, heat=1.0):
    g = torch.Generator().manual_seed(seed)
    trie = random_trie(shape, vocab, g)
    node = nodes_of(trie, step, rows, kind, g)
    m = trie.layer_max_branches[step]
    tables = (trie.row_ptrs, trie.stacked_cols_vals, node, m)
    if name == "transition":
        logits = torch.randn(rows, vocab + seed % 2, generator=g).to(dtype)
        logits[0, vocab // 2] = float("nan")
        if seed % 3 == 0:
            logits = logits.T.contiguous().T
        return same(launch.launch_transition(logits, *tables), ops._transition(logits, *tables),
                    exact=True)  # fmt: skip
    a, b, bias = layer(rows, 13 + seed % 7, vocab, dtype, seed, g)
    linear, select = settings
    if name == "linear":
        if linear is None:
            got = ops._linear_cuda(a, b, bias, *tables)
        else:
            got = launch.launch_linear(a, b, bias, *tables, settings=linear)
        return same(got, ops._linear(a, b, bias, *tables), exact=False)
    temperature = torch.full((1, 1), heat)
    if seed % 2:
        temperature = torch.rand(rows, 1, generator=g) * 2
        temperature[::3] = 0.0
    elif seed % 4 == 0 and heat == 1.0:
        temperature = None
    extra = (k, temperature) if name == "topk" else (k, temperature, torch.tensor(seed - 5000))
    wanted = getattr(ops, f"_{name}")(a, b, bias, *tables, *extra)
    if linear is None:
        got = getattr(ops, f"_{name}_cuda")(a, b, bias, *tables, *extra)
    else:
        got = launch.launch_choice(a, b, bias, launch.Trie.of(*tables[:3]), m, *extra,
                                   settings=linear, select=select)  # fmt: skip
    return same(got, wanted, exact=False)


SMALL = launch.LinearSettings(
    group=4,
    few=2,
    slots=16,
    pairs=4,
    pairs_hidden=16,
    programs=8,
    fillers=5,
    left=0.4,
    listed=16,
    fill=32,
)
FORMS = {
    "gather and shared": launch.LinearSettings(
        product_share=2.0,
        group=4,
        few=2,
        slots=16,
        pairs=4,
        pairs_hidden=16,
        few_bytes=-1,
        programs=8,
        fillers=3,
        left=0.0,
        listed=16,
        fill=32,
    ),
    "product": launch.LinearSettings(product_share=0.0),
    "chosen": SMALL,
}


def forms(results):
    g = torch.Generator().manual_seed(1)
    shapes = ("uniform", "skewed", "chains", "one item", "all children")
    for name in NAMES:
        for form, linear in FORMS.items():
            if name == "transition" and form != "chosen":
                continue
            places = (("any", 6, 1), ("one", 5, 1), ("one", 1, 0))
            for number, shape in enumerate(shapes):
                # The forms are the same for all ops: the choices see one kind of row each.
                some = places if name in ("transition", "linear") else places[number % 3 :][:1]
                for kind, rows, step in some:
                    seed = int(torch.randint(10_000, (), generator=g))
                    dtype = (torch.float32, torch.float16)[(number + rows) % 2]
                    vocab = (5, 19, 33)[number % 3]
                    settings = (linear, launch.DEFAULT_SELECT)
                    k = (1, 3, 8)[seed % 3]
                    key = f"{name}/{form}/{shape}/{kind}/{rows}"
                    results[key] = compare(name, shape, vocab, rows, step, kind, dtype, seed,
                                           settings, k)  # fmt: skip


def long_rows(results):
    """Rows of several parts, merged in one round and in several."""
    for name in ("topk", "sampling"):
        for k, block in ((1, 16), (3, 16), (7, 32), (40, 32), (64, 64)):
            settings = (SMALL, launch.SelectSettings(block=block))
            results[f"{name}/parts/{k}"] = compare(
                name, "uniform", 300, 2, 0, "one", torch.float32, 2 * k + 1, settings, k
            )


def gathered(results):
    """Long rows with many equal logits, of which those past a threshold are gathered."""
    trie = random_trie("all children", 300, None)
    g = torch.Generator().manual_seed(4)
    bias = torch.randint(4, (300,), generator=g).float()
    tables = (trie.row_ptrs, trie.stacked_cols_vals, torch.tensor([0, -1]), 300)
    for name, extra in (("topk", ()), ("sampling", (torch.tensor(3),))):
        for k, heat, block in ((2, 0.0, 256), (20, 1.0, 512), (64, 0.5, 256), (100, 0.0, 512)):
            args = (torch.zeros(2, 3), torch.zeros(3, 300), bias, *tables, k)
            args = (*args, torch.full((1, 1), heat), *extra)
            got = launch.launch_choice(
                *args[:3],
                launch.Trie.of(*tables[:3]),
                *args[6:],
                settings=SMALL,
                select=launch.SelectSettings(block),
            )
            results[f"gathered/{name}/{k}/{block}"] = same(
                got, getattr(ops, f"_{name}")(*args), exact=False
            )


def single_draws(results):
    """One draw a row: float32 decides most of them, float64 the rest, and nobody can tell which.

    At temperature 0, and of logits too large for float32, float64 decides all.
    """
    g = torch.Generator().manual_seed(6)
    cases = ((40, 80, 0.1, 1.0), (40, 80, 1.0, 0.0), (40, 80, 5.0, 1000.0), (600, 3, 0.0, 1.0),
             (600, 3, 1e30, 1e30), (600, 9, 1.0, 1.0))  # fmt: skip
    for children, rows, heat, spread in cases:
        trie = CompactCSRTrie.from_sorted_batch(torch.arange(children)[:, None], children, 1)
        node = torch.zeros(rows, dtype=torch.long)
        tables = (trie.row_ptrs, trie.stacked_cols_vals, node, children)
        bias = torch.randn(children, generator=g) * spread
        args = (torch.zeros(rows, 3), torch.zeros(3, children), bias, *tables, 1)
        args = (*args, torch.full((1, 1), heat), torch.tensor(5))
        trie_of = launch.Trie.of(*tables[:3])
        got = launch.launch_choice(*args[:3], trie_of, *args[6:], settings=SMALL)
        results[f"single draws/{children}/{heat}"] = same(got, ops._sampling(*args), exact=False)


def registered(results):
    """What is registered for CUDA, on tensors of the CPU: kernels, PyTorch past their bounds."""
    settings = (None, launch.DEFAULT_SELECT)
    for name in ("linear", "topk", "sampling"):
        for k in (4, launch.MAX_K + 1):
            for dtype in (torch.float32, torch.float64):
                key = f"registered/{name}/{k}/{dtype}"
                results[key] = compare(name, "skewed", 19, 5, 1, "any", dtype, 8, settings, k)
    g = torch.Generator().manual_seed(0)
    trie = random_trie("uniform", 19, g)
    for dtype in (torch.float32, torch.float64):
        args = (torch.randn(3, 19, generator=g).to(dtype), trie.row_ptrs, trie.stacked_cols_vals,
                torch.tensor([0, 1, -1]), trie.layer_max_branches[0])  # fmt: skip
        results[f"registered/transition/{dtype}"] = same(
            ops._transition_cuda(*args), ops._transition(*args), exact=True
        )


def not_finite(results):
    """Logits of NaN and infinities, and equal ones, by a weight of one column."""
    values = torch.tensor([1.0, INF, -INF, float("nan"), 2.0, 2.0, INF, -1.0, 0.0, -0.0])
    trie = CompactCSRTrie.from_sorted_batch(torch.arange(10).unsqueeze(1), 10, 1)
    node = torch.zeros(2, dtype=torch.long)
    tables = (trie.row_ptrs, trie.stacked_cols_vals, node, 10)
    for label, chosen in {
        "all": values,
        "no infinity": values.masked_fill(values == INF, 0.5),
        "nothing": torch.full((10,), float("nan")),
        "ties": torch.full((10,), 2.0),
    }.items():
        # The bias carries the values: a product with infinity would be NaN.
        a, b = torch.zeros(2, 3), torch.zeros(3, 10)
        for name, extra in (("topk", ()), ("sampling", (torch.tensor(3),))):
            for heat in (0.0, 1.0, 0.25):
                args = (a, b, chosen, *tables, 10, torch.full((1, 1), heat), *extra)
                for block in (16, 64):
                    got = launch.launch_choice(
                        *args[:3],
                        launch.Trie.of(*tables[:3]),
                        *args[6:],
                        select=launch.SelectSettings(block),
                    )
                    wanted = getattr(ops, f"_{name}")(*args)
                    results[f"special/{name}/{label}/{heat}/{block}"] = same(
                        got, wanted, exact=False
                    )


@triton.jit
def _noise_kernel(seed_ptr, row_ptr, token_ptr, hash_ptr, gumbel_ptr, BLOCK: tl.constexpr):
    row = tl.load(row_ptr + tl.program_id(0))
    token = tl.load(token_ptr + tl.arange(0, BLOCK))
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = hash_of(tl.load(seed_ptr), row, token)
    tl.store(hash_ptr + place, bits.to(tl.int64, bitcast=True))
    tl.store(gumbel_ptr + place, gumbel_of(tl.load(seed_ptr), row, token))


def noise(results):
    row, token = torch.tensor([0, 1, 2**40]), torch.arange(1024) * 977
    for seed in (0, -1, 2**62, -(2**63)):
        bits, values = torch.empty(3, 1024, dtype=torch.long), torch.empty(3, 1024).double()
        start = torch.tensor(seed)
        _noise_kernel[(3,)](start, row, token, bits, values, BLOCK=1024)
        hashes = torch.equal(bits, hash64(start, row.unsqueeze(1), token))
        wanted = gumbel(start, row.unsqueeze(1), token)
        near = torch.allclose(values, wanted, rtol=1e-13, atol=1e-13)
        results[f"noise/{seed}"] = "ok" if hashes and near else f"bits {hashes}, values {near}"


def main() -> None:
    results: dict[str, str] = {}
    for part in (noise, not_finite, registered, forms, long_rows, gathered, single_draws):
        part(results)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
