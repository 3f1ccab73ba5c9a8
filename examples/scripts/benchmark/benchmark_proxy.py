"""What the prompt-embeds proxy costs: latency, throughput, bytes on the wire, memory.

``python -m examples.scripts.benchmark.benchmark_proxy --csv out.csv``

Runs ``python -m server proxy`` as its own process in front of an upstream that answers at once,
both on loopback. The model is a folder made by the script: a tokenizer of words and an embedding
table of random bfloat16 numbers. *Added* latency is the median of a request through the proxy less
the median of the same text sent to the upstream itself; the two are asked in turns, so that a noisy
machine disturbs both. Everything shares the machine's cores: more of them, or a quiet machine, give
better figures. *cold* keeps no encoded rows (``--encoded-table-mib 0``): every prompt is encoded
anew; otherwise the proxy is given the time to encode its table ahead. No prompt was asked before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from examples.scripts.benchmark.kernel_timing import write_csv
from examples.scripts.interop.vllm_prompt_embeds import free_port, running

_WARM_REQUESTS = 5
_IDLE_S = 0.5
_SETTLE_S = 300.0


@dataclass(frozen=True)
class Record:
    """One line of the table.

    Attributes:
        compression: what the proxy was started with.
        tokens: of a prompt.
        direct_ms, proxied_ms, added_ms: medians of single requests, and their difference.
        first_ms: the first request of that length through the proxy.
        proxied_p95_ms: 95th percentile through the proxy.
        cpu_ms: processor time of the proxy a request, which neighbours disturb least.
        requests_per_s, tokens_per_s: with several clients at once.
        body_bytes: what the upstream receives for a prompt.
        ratio: of the plain body to this one.
        anonymous_mib, mapped_mib: the proxy's resident memory after the run: its own, and mapped
            files, the embedding table's pages among them.
    """

    compression: str
    tokens: int
    direct_ms: float
    proxied_ms: float
    added_ms: float
    first_ms: float
    proxied_p95_ms: float
    cpu_ms: float
    requests_per_s: float
    tokens_per_s: float
    body_bytes: int
    ratio: float
    anonymous_mib: float
    mapped_mib: float


def make_model(folder: Path, hidden_size: int, vocab_size: int) -> None:
    """A folder that the proxy can open: configuration, tokenizer, embedding table."""
    Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=256,
        num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8,
        tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    words = ["<unk>", *(f"w{i}" for i in range(1, vocab_size))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(vocab_size, hidden_size, generator=generator).mul_(0.02).bfloat16()
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors", {"format": "pt"})


def prompt(tokens: int, vocab_size: int, seed: int) -> str:
    """Random words, a token each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab_size, (tokens,), generator=generator).tolist()
    return " ".join(f"w{i}" for i in ids)


def ask(client: httpx.Client, text: str) -> tuple[float, int]:
    """Seconds of a completion, and the bytes that the upstream received for it."""
    started = time.perf_counter()
    response = client.post("/v1/completions", json={"model": "m", "prompt": text, "max_tokens": 1})
    seconds = time.perf_counter() - started
    response.raise_for_status()
    return seconds, int(response.json()["usage"]["prompt_tokens"])


def latencies(
    direct: httpx.Client, proxied: httpx.Client, texts: Sequence[str]
) -> tuple[list[float], list[float], int]:
    """Seconds without and with the proxy, in turns; bytes with it."""
    plain, through, size = [], [], 0
    for text in texts:
        without, _ = ask(direct, text)
        with_proxy, size = ask(proxied, text)
        plain.append(without)
        through.append(with_proxy)
    return plain, through, size


def throughput(url: str, texts: Sequence[str], clients: int, seconds: float) -> float:
    """Requests a second that so many clients get answered, each with one request at a time."""
    done = [0] * clients
    stop = time.perf_counter() + seconds

    def work(place: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.perf_counter() < stop:
                ask(client, texts[(place + done[place]) % len(texts)])
                done[place] += 1

    threads = [threading.Thread(target=work, args=(place,)) for place in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


def resident_mib(pid: int) -> tuple[float, float]:
    """Resident memory of a process that is its own, and that maps files."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = {line.split(":")[0]: line.split() for line in status.splitlines() if "Rss" in line}
    return int(kib["RssAnon"][1]) / 1024, int(kib["RssFile"][1]) / 1024


def processor_s(pid: int) -> float:
    """Processor time that a process has had."""
    fields_after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields_after_name[11]) + int(fields_after_name[12])) / os.sysconf("SC_CLK_TCK")


def let_settle(pid: int) -> None:
    """Wait until a process has nothing to do."""
    busy, end = processor_s(pid), time.monotonic() + _SETTLE_S
    while time.monotonic() < end:
        time.sleep(_IDLE_S)
        before, busy = busy, processor_s(pid)
        if busy - before < 0.1 * _IDLE_S:
            return
    raise RuntimeError(f"the proxy is still at work after {_SETTLE_S:g} s without a request")


@contextmanager
def mock_upstream(log: Path) -> Iterator[str]:
    """The mock in a process of its own; yields its URL."""
    port = free_port()
    command = [sys.executable, "-m", "examples.scripts.benchmark.mock_upstream", str(port)]
    with running(command, f"http://127.0.0.1:{port}", log, {}, 60):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def started_proxy(upstream: str, model: Path, flags: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The proxy in a process of its own; yields its URL and process id."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "server", "proxy", "--upstream", upstream, "--model", str(model),
        "--port", str(port), *flags,
    ]  # fmt: skip
    with running(command, url, model.parent / "proxy.log", {}, 120) as process:
        yield url, process.pid


def measure(
    flags: Sequence[str], name: str, upstream: str, model: Path, options: argparse.Namespace,
    plain_bytes: dict[int, int],
) -> Iterator[Record]:  # fmt: skip
    """One proxy, every length of prompt; the first one, which is plain, leaves its sizes."""
    with (
        started_proxy(upstream, model, flags) as (url, pid),
        httpx.Client(base_url=upstream, timeout=60) as direct,
        httpx.Client(base_url=url, timeout=60) as proxied,
    ):
        let_settle(pid)
        for tokens in options.tokens:
            count = options.requests + _WARM_REQUESTS
            texts = [prompt(tokens, options.vocab_size, seed) for seed in range(count)]
            busy = processor_s(pid)
            without, through, size = latencies(direct, proxied, texts)
            busy = (processor_s(pid) - busy) / count
            first = through[0]
            without, through = without[_WARM_REQUESTS:], through[_WARM_REQUESTS:]
            rate = throughput(url, texts, options.clients, options.seconds)
            own, mapped = resident_mib(pid)
            plain_bytes.setdefault(tokens, size)
            before, after = statistics.median(without), statistics.median(through)
            yield Record(
                name,
                tokens,
                round(before * 1e3, 2),
                round(after * 1e3, 2),
                round((after - before) * 1e3, 2),
                round(first * 1e3, 2),
                round(statistics.quantiles(through, n=20)[-1] * 1e3, 2),
                round(busy * 1e3, 2),
                round(rate, 1),
                round(rate * tokens),
                size,
                round(plain_bytes[tokens] / size, 2),
                round(own, 1),
                round(mapped, 1),
            )


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--requests", type=int, default=100, help="timed requests a median is of")
    parser.add_argument("--clients", type=int, default=4, help="at once, for throughput")
    parser.add_argument("--seconds", type=float, default=5.0, help="of throughput")
    parser.add_argument("--csv", type=Path, help="write every record here")
    options = parser.parse_args(arguments)
    forms = {
        "none": ["--embedding-compression", "none"],
        "turboquant 8 bits": ["--embedding-bits", "8"],
        "turboquant 4 bits, cold": ["--embedding-bits", "4", "--encoded-table-mib", "0"],
        "turboquant 4 bits": ["--embedding-bits", "4"],
    }
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        make_model(model, options.hidden_size, options.vocab_size)
        with mock_upstream(Path(place) / "upstream.log") as upstream:
            sizes: dict[int, int] = {}
            for name, flags in forms.items():
                for record in measure(flags, name, upstream, model, options, sizes):
                    records.append(record)
                    print(asdict(record), flush=True)
    if options.csv:
        write_csv(
            options.csv,
            [field.name for field in fields(Record)],
            [asdict(record) for record in records],
        )
    return records


if __name__ == "__main__":
    main()
