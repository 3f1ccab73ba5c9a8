"""How fast a catalog is encoded again, and how soon a server serves what an operator changed.

    python -m examples.scripts.benchmark.benchmark_live_catalog
    python -m examples.scripts.benchmark.benchmark_live_catalog --num-items 100000 --updates 10

Makes embeddings, a tokenizer and a small model, then does what an operator does: ``reindex`` as a
command, ``serve`` on the store, and ``PATCH /admin/items`` over HTTP, timed until ``/ready`` names
the new catalog. Nothing is mocked; the worker, the job's process and the server share the machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.scripts.benchmark.kernel_timing import write_csv
from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from rectokens.catalog.sources import open_embeddings
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer
from server.demo.running import running_server

KEY = "benchmark-key-on-loopback"
CHUNK = 65_536
FITTED_ON = 50_000
NUM_CENTRES = 2_000


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        num_items: N.
        dim: width of the embeddings.
        num_levels: L.
        codebook_size: K.
        changed: items of an update, half of them new.
        updates: how many in a row.
        pause_s: before each of them.
        threads: of a job, and of the server.
    """

    num_items: int
    dim: int
    num_levels: int
    codebook_size: int
    changed: int
    updates: int
    pause_s: float
    threads: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What was found. Times in seconds, of updates the medians.

    Attributes:
        num_items: N.
        reindex_s: the command as a whole.
        encode_items_per_s: of the job: read, checked and encoded.
        read_items_per_s: the same without encoding: what the disk and the file format allow.
        kernel_items_per_s: encoding alone, of rows in memory.
        build_s: codes to a catalog.
        save_s: written and flushed.
        live_s: from sending the request until the server names the new catalog.
        live_worst_s: of the slowest.
        waited_s: until a worker took the job.
        load_s: the active catalog read, hashed and checked.
        change_s: encoded and merged.
        server_gib: memory of the server with one version.
        server_peak_gib: the most during all swaps.
    """

    num_items: int
    reindex_s: float
    encode_items_per_s: float
    read_items_per_s: float
    kernel_items_per_s: float
    build_s: float
    save_s: float
    live_s: float
    live_worst_s: float
    waited_s: float
    load_s: float
    change_s: float
    server_gib: float
    server_peak_gib: float


def main(
    num_items: Annotated[
        list[int] | None, typer.Option(help="Items; repeat for several sizes.")
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Width of the embeddings.")] = 64,
    num_levels: Annotated[int, typer.Option(min=1, help="Levels of a semantic ID.")] = 4,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codes a level.")] = 256,
    changed: Annotated[int, typer.Option(min=2, help="Items of an update, half new.")] = 1_000,
    updates: Annotated[int, typer.Option(min=1, help="Updates, one after the other.")] = 5,
    pause_s: Annotated[
        float, typer.Option(min=0, help="Before each update; 0 leaves no time to get ready again.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a job and of the server.")] = 2,
    folder: Annotated[
        Path | None, typer.Option(help="Where everything is written; default a temporary one.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
) -> None:
    """Measure every size in turn and print a column each."""
    found = []
    for size in num_items or [100_000, 1_000_000]:
        case = Case(size, dim, num_levels, codebook_size, changed, updates, pause_s, threads)
        place = Path(tempfile.mkdtemp(prefix="benchmark-live-catalog-", dir=folder))
        try:
            found.append(measure(case, place))
        finally:
            shutil.rmtree(place, ignore_errors=True)
    table = Table(show_header=False)
    for field in fields(Figures):
        table.add_row(field.name, *(_shown(getattr(one, field.name)) for one in found))
    console = Console()
    console.print(
        f"{dim} values an embedding, {num_levels} levels of {codebook_size} codes, {changed} items "
        f"an update, {pause_s:g} s apart, {threads} threads, {os.cpu_count()} CPU cores"
    )
    console.print(table)
    if output is not None:
        write_csv(output, [field.name for field in fields(Figures)], [asdict(one) for one in found])


def measure(case: Case, place: Path) -> Figures:
    """Run one case below a folder."""
    torch.set_num_threads(case.threads)
    chance = np.random.default_rng(0)
    draw = partial(_embeddings, chance, chance.normal(size=(NUM_CENTRES, case.dim)))
    source = place / "items.parquet"
    _write_source(source, case.num_items, draw)
    tokenizer, model = _prepare(place / "store", case, draw)
    read, kernel = _limits(source, place / "store" / "tokenizers" / tokenizer, case)
    started = time.perf_counter()
    job = _reindex(place / "store", source, tokenizer, model, case)
    reindex_s = time.perf_counter() - started
    result = job["result"]
    with _serving(place / "store", case) as (client, process):
        before = process.memory_info().rss
        rounds = [_update(client, case, number, draw) for number in range(case.updates)]
        peak = _peak_bytes(process)
    lives, jobs = [live for live, _ in rounds], [job for _, job in rounds]

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(one) for one in jobs)

    return Figures(
        num_items=case.num_items,
        reindex_s=reindex_s,
        encode_items_per_s=result["items_per_s"],
        read_items_per_s=read,
        kernel_items_per_s=kernel,
        build_s=result["seconds"]["build"],
        save_s=result["seconds"]["save"],
        live_s=statistics.median(lives),
        live_worst_s=max(lives),
        waited_s=median(lambda one: one["seconds"]["waited"]),
        load_s=median(lambda one: one["seconds"]["load"]),
        change_s=median(lambda one: one["seconds"]["change"]),
        server_gib=before / 2**30,
        server_peak_gib=peak / 2**30,
    )


def _embeddings(
    chance: np.random.Generator, centres: np.ndarray, number: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows around centres, as embeddings of items lie."""
    rows = centres[chance.integers(len(centres), size=number)]
    return (rows + 0.4 * chance.normal(size=rows.shape)).astype(np.float32)


def _write_source(path: Path, num_items: int, draw: Callable[[int], np.ndarray]) -> None:
    writer = None
    for start in range(0, num_items, CHUNK):
        number = min(CHUNK, num_items - start)
        rows = draw(number)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        table = pa.table(
            {
                "item_id": [f"B{start + i}" for i in range(number)],
                "embedding": vectors,
                "popularity": pa.array(np.random.default_rng(start).random(number)),
                "price": pa.array((np.arange(number) % 9_000 + start % 97) / 100),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _prepare(store: Path, case: Case, draw: Callable[[int], np.ndarray]) -> tuple[str, str]:
    """Write a tokenizer and a model that speaks its codes; their versions."""
    levels, size = case.num_levels, case.codebook_size
    unfitted = RQKMeansTokenizer(num_levels=levels, codebook_size=size, dim=case.dim, seed=0)
    tokenizer = unfitted.fit_step(torch.from_numpy(draw(min(FITTED_ON, case.num_items))))
    saved = save_tokenizer(store / "tokenizers", tokenizer, report={}, fitted_on={})
    last = 4 + levels * size
    config = Qwen3Config(
        vocab_size=last + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )
    tokens = ItemTokens(
        offset=4,
        level_stride=size,
        num_levels=levels,
        codebook_size=size,
        start_token_id=last,
        end_token_id=last + 1,
    )
    recipe = PromptRecipe("item_history", 1, {"max_items": 20})
    spec = RetrievalSpec(tokenizer_fingerprint(tokenizer), tokens, recipe)
    model = save_model(store / "models", Qwen3ForCausalLM(config).eval(), spec)
    return saved.name, model.name


def _limits(source: Path, tokenizer_path: Path, case: Case) -> tuple[float, float]:
    """Rows a second that can be read, and that can be encoded once they are."""
    rows = torch.empty(0)
    started = time.perf_counter()
    for batch in open_embeddings(source).batches(8_192):
        rows = batch if len(batch) > len(rows) else rows
    read = case.num_items / (time.perf_counter() - started)
    tokenizer = load_tokenizer(tokenizer_path).tokenizer
    times = []
    for _ in range(20):
        started = time.perf_counter()
        tokenizer.encode(rows)
        times.append(time.perf_counter() - started)
    return read, len(rows) / statistics.median(times)


def _flags(store: Path, case: Case) -> list[str]:
    return ["--store.path", str(store), "--jobs.threads", str(case.threads)]


def _reindex(store: Path, source: Path, tokenizer: str, model: str, case: Case) -> dict[str, Any]:
    command = [sys.executable, "-m", "server", "reindex", "--source", str(source)]
    command += ["--prior-column", "popularity", "--metadata-columns", "price"]
    command += ["--tokenizer", tokenizer, "--model", model, "--activate", "--json"]
    done = subprocess.run(
        [*command, *_flags(store, case)], stdout=subprocess.PIPE, text=True, check=True
    )
    job: dict[str, Any] = json.loads(done.stdout)
    return job


@contextmanager
def _serving(store: Path, case: Case) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A server on the store, ready."""
    flags = [*_flags(store, case), "--cpu-threads", str(case.threads)]
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        running_server(*flags, variables={"RECTOKENS_ADMIN__KEYS": KEY}) as server,
        httpx.Client(base_url=server.base_url, headers=headers, timeout=60.0) as client,
    ):
        time.sleep(5.0)  # the worker is up as well
        yield client, psutil.Process(server.pid)


def _update(
    client: httpx.Client, case: Case, number: int, draw: Callable[[int], np.ndarray]
) -> tuple[float, dict[str, Any]]:
    """Change items; seconds until they are served, and the job's result."""
    time.sleep(case.pause_s)
    half = case.changed // 2
    ids = [f"new {number} {i}" for i in range(half)]
    ids += [f"B{number * half + i}" for i in range(case.changed - half)]
    body = {
        "upserts": [
            {"item_id": item_id, "embedding": row.tolist(), "prior": 0.5, "metadata": {"price": 1}}
            for item_id, row in zip(ids, draw(case.changed), strict=True)
        ]
    }
    old = client.get("/ready").json()["catalog_version"]
    started = time.perf_counter()
    sent = time.time()
    response = client.patch("/admin/items", json=body)
    response.raise_for_status()
    job = f"/admin/jobs/{response.json()['id']}"
    while client.get("/ready").json()["catalog_version"] == old:
        time.sleep(0.02)
        if time.perf_counter() - started > 300:
            raise RuntimeError(f"the update is not served: {client.get(job).json()}")
    live = time.perf_counter() - started
    while (told := client.get(job).json())["state"] == "running":
        time.sleep(0.05)
    if told["state"] != "succeeded":
        raise RuntimeError(f"the update failed: {told}")
    result: dict[str, Any] = told["result"]
    result["seconds"]["waited"] = datetime.fromisoformat(told["started_at"]).timestamp() - sent
    return live, result


def _peak_bytes(process: psutil.Process) -> int:
    """The most memory a process ever held."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else process.memory_info().rss


def _shown(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or value > 1_000 else f"{value:.2f}"


if __name__ == "__main__":
    typer.run(main)
