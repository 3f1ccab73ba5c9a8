"""What Ray Serve adds to a request, beside plain uvicorn: the same release, the same requests.

    unshare --net sh -c 'ip link set lo up; exec "$@"' sh \
        python -m examples.scripts.benchmark.benchmark_ray --output ray.csv

Ray listens on all interfaces, hence the network namespace. Both servers run at once, each with one
process that has the model, and are measured in turns: one request at a time, then several clients.
What is counted is a request's time at the client without the service's own (`timings.total_ms`):
HTTP, and for Ray its proxy, the router and two hops between processes. Beside it stands the CPU
time of a request, of all processes that it goes through, which hardly depends on what else the
machine does. Answers are compared first.
"""

from __future__ import annotations

import asyncio
import itertools
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import orjson
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from examples.scripts.benchmark.benchmark_service import (
    PATH,
    WrongAnswerError,
    cpu_seconds,
    release_or_random,
)
from examples.scripts.benchmark.http_load import Connections, Reply, closed_loop, percentile
from examples.scripts.benchmark.kernel_timing import write_csv
from examples.scripts.benchmark.random_release import ReleaseShape
from server.demo.running import running_server

PORT = 8_765
SETTINGS = {"cpu_threads": 1, "log_level": "error", "engine.kv_memory_mib": 64}
COMPARED = 8


@dataclass
class Figures:
    """Of one server and one number of clients.

    Attributes:
        outside_s: of each request, at the client, beyond the service's own time.
        rates: requests a second, of each turn.
        cpu_s: CPU time of a request, of each turn.
    """

    outside_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def add(self, replies: list[Reply], seconds: float, cpu_s: float) -> None:
        """Count one turn."""
        for reply in replies:
            if reply.status != 200:
                raise WrongAnswerError(f"status {reply.status}: {reply.body.decode()}")
            inside_ms = orjson.loads(reply.body)["timings"]["total_ms"]
            self.outside_s.append(reply.seconds - inside_ms / 1e3)
        self.rates.append(len(replies) / seconds)
        self.cpu_s.append(cpu_s / len(replies))

    def row(self, server: str, clients: int) -> dict[str, Any]:
        """As figures."""
        return {
            "server": server,
            "clients": clients,
            "requests": len(self.outside_s),
            "outside_median_ms": round(1e3 * percentile(self.outside_s, 0.5), 2),
            "outside_p90_ms": round(1e3 * percentile(self.outside_s, 0.9), 2),
            "cpu_median_ms": round(1e3 * statistics.median(self.cpu_s), 2),
            "requests_per_s": round(statistics.median(self.rates), 1),
        }


@contextmanager
def ray_serving(release: Path) -> Iterator[str]:
    """One replica and one router on a Ray cluster of this machine; gives the base URL."""
    import ray
    from ray import serve

    from deploy.ray.app import build
    from deploy.ray.config import ServeConfig

    config = ServeConfig.model_validate(
        {
            "router": {"replicas": 1},
            "variants": [
                {"name": "only", "num_gpus": 0, "settings": {"release": str(release), **SETTINGS}}
            ],
        }
    )
    ray.init(num_cpus=4, include_dashboard=False, address="local", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(build(config), route_prefix="/", name="rectokens")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


async def compare(base_urls: list[str], bodies: Iterator[bytes]) -> None:
    """Ask both the same.

    Raises:
        WrongAnswerError: the answers differ.
    """
    for body in itertools.islice(bodies, COMPARED):
        answers = []
        for base_url in base_urls:
            connections = Connections(base_url, PATH)
            reply = await connections.post(body)
            await connections.close()
            if reply.status != 200:
                raise WrongAnswerError(f"{base_url}: {reply.status} {reply.body.decode()}")
            answers.append([item["item_id"] for item in orjson.loads(reply.body)["items"]])
        if answers[0] != answers[1]:
            raise WrongAnswerError(f"{answers[0]} and {answers[1]}")


async def turn(
    base_url: str,
    bodies: Iterator[bytes],
    processes: list[psutil.Process],
    clients: int,
    seconds: float,
) -> tuple[list[Reply], float, float]:
    """One measurement, on connections that are open already: replies, seconds, CPU seconds."""
    connections = Connections(base_url, PATH)
    await closed_loop(connections, bodies, clients, 0.5)
    started, cpu = time.monotonic(), sum(map(cpu_seconds, processes))
    replies = await closed_loop(connections, bodies, clients, seconds)
    taken, cpu = time.monotonic() - started, sum(map(cpu_seconds, processes)) - cpu
    await connections.close()
    return replies, taken, cpu


def ray_processes() -> list[psutil.Process]:
    """Those that a request goes through: the proxy, the router and the replica."""
    titles = ("ray::ProxyActor", "ray::ServeReplica:")
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[0].startswith(titles)
    ]


def main(
    release: Annotated[Path | None, typer.Option(help="Release folder; none: random.")] = None,
    history: Annotated[int, typer.Option(min=1, help="Items in each history.")] = 5,
    beam_width: Annotated[int, typer.Option(min=10, help="W of each request.")] = 10,
    clients: Annotated[int, typer.Option(min=2, help="Of the second measurement.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each turn.")] = 4.0,
    turns: Annotated[int, typer.Option(min=1, help="Times each is measured.")] = 5,
    output: Annotated[Path | None, typer.Option(help="CSV file for the figures.")] = None,
) -> None:
    """Compare answers, then measure."""
    shape = ReleaseShape(2, 64, 2_000, 3, 256, history, seed=0)
    flags = itertools.chain.from_iterable(
        (f"--{name.replace('_', '-')}", str(value)) for name, value in SETTINGS.items()
    )
    console = Console()
    with (
        release_or_random(release, shape) as path,
        ray_serving(path) as on_ray,
        running_server("--release", str(path), *flags) as plain,
    ):
        items = [f"item-{number}" for number in range(history)]
        # The same prompt again and again: what it costs is not what is measured.
        body = orjson.dumps({"history": items, "top_k": 10, "beam_width": beam_width})
        bodies = itertools.repeat(body)
        servers = {
            "uvicorn": (plain.base_url, [psutil.Process(plain.pid)]),
            "ray": (on_ray, ray_processes()),
        }
        asyncio.run(compare([plain.base_url, on_ray], bodies))
        found = {(name, count): Figures() for count in (1, clients) for name in servers}
        for _ in range(turns):
            for (name, count), figures in found.items():
                base_url, processes = servers[name]
                figures.add(*asyncio.run(turn(base_url, bodies, processes, count, seconds)))
    rows = [figures.row(name, count) for (name, count), figures in found.items()]
    table = Table(
        title="a request outside the service",
        caption=f"{path.name}, histories of {history} items, beam {beam_width}; "
        f"torch {torch.__version__}, Python {platform.python_version()}",
    )
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if output is not None:
        write_csv(output, list(rows[0]), rows)


if __name__ == "__main__":
    typer.run(main)
