"""Compressed prompt embeddings against a real vLLM, directly and through the proxy.

``python -m examples.scripts.interop.vllm_prompt_embeds --vllm-python VENV/bin/python``

Starts vLLM with ``--enable-prompt-embeds`` on loopback, from an environment that has vLLM and this
package (which brings the plugin), with a small model that it trains first, and checks that

- text, plain embeddings and embeddings compressed to 8 bits give the same greedy tokens; how many
  agree at 4 bits, and how many of the ten likeliest first tokens, is reported,
- chat parts that hold compressed embeddings are accepted,
- hostile and broken payloads get a 400, and the server goes on,
- the same prompts through ``python -m server proxy`` give the same tokens as without it.

The first line of the output names the versions. The exit status is 1 if a check fails.
`docs/vllm.md` says how to make the environment.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from examples.scripts.interop.bad_payloads import bad_payloads
from examples.scripts.interop.tiny_model import (
    HIDDEN_SIZE,
    TinyModel,
    make_tiny_model,
    save_tiny_model,
    text_of,
)
from rectokens.prompt_embeds import dump_payload, dump_tensor
from rectokens.turboquant import encode_embeddings

MODEL = "tiny"
MAX_MODEL_LEN = 256
NEW_TOKENS = 16
_LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as one:
        one.bind((_LOOPBACK, 0))
        return int(one.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], url: str, log: Path, environment: Mapping[str, str], timeout_s: float
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, from when it answers ``/health`` until it is stopped.

    Raises:
        RuntimeError: it ends, or does not answer in time; the end of its log is shown.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{command[0]} is not serving; its log ends with\n{tail}")
            time.sleep(0.5)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def vllm_command(python: str, model: Path, port: int) -> list[str]:
    """vLLM's OpenAI server, small."""
    return [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", MODEL, "--enable-prompt-embeds", "--dtype", "float32",
        "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8",
        "--max-num-batched-tokens", "512", "--enforce-eager", "--no-enable-prefix-caching",
        "--host", _LOOPBACK, "--port", str(port),
    ]  # fmt: skip


VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Checks:
    """Prints each outcome and remembers failures."""

    def __init__(self) -> None:
        self.failed = 0

    def expect(self, what: str, holds: bool, detail: str = "") -> None:
        """Report one check."""
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}{': ' + detail if detail else ''}", flush=True)


def completion(client: httpx.Client, **body: Any) -> tuple[str, float, set[str]]:
    """Greedy text, the log-probability of its first token, and the ten likeliest first tokens."""
    response = client.post(
        "/v1/completions",
        json={
            "model": MODEL, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 10,
            "ignore_eos": True, **body,
        },
    )  # fmt: skip
    response.raise_for_status()
    choice = response.json()["choices"][0]
    scores = choice["logprobs"]
    likeliest = sorted(scores["top_logprobs"][0].items(), key=lambda entry: -entry[1])[:10]
    return choice["text"].strip(), scores["token_logprobs"][0], {token for token, _ in likeliest}


def compressed(x: Tensor, bits: int) -> str:
    """The field's text."""
    return dump_payload(*encode_embeddings(x, bits), bits, x.shape[1])


def check_tokens(client: httpx.Client, table: Tensor, prompts: list[list[int]], c: Checks) -> None:
    """Text, plain, 8 and 4 bits on every prompt."""
    forms = ("plain", "8 bits", "4 bits")
    same, shared, furthest = dict.fromkeys(forms, 0), dict.fromkeys(forms, 0), 0.0
    for ids in prompts:
        expected, score, ten = completion(client, prompt=ids)
        x = table[ids]
        fields = (dump_tensor(x), compressed(x, 8), compressed(x, 4))
        for form, data in zip(forms, fields, strict=True):
            text, found, likeliest = completion(client, prompt_embeds=data)
            same[form] += text == expected
            shared[form] += len(ten & likeliest)
            furthest = max(furthest, abs(found - score)) if form == "8 bits" else furthest
    total = len(prompts)
    for form in forms:
        detail = f"{shared[form] / total:.1f} of the 10 likeliest first tokens are the same"
        what = f"{form}: {same[form]} of {total} greedy texts of {NEW_TOKENS} tokens equal"
        if form == "4 bits":
            print(f"     {what}: {detail}")
        else:
            c.expect(what, same[form] == total, detail)
    print(f"     8 bits: the first token's log-probability moves by at most {furthest:.4f}")


def check_chat(client: httpx.Client, table: Tensor, c: Checks) -> None:
    """Embeddings as a part of a chat message."""
    texts = []
    for data in (dump_tensor(table[:8]), compressed(table[:8], 8)):
        parts = [{"type": "prompt_embeds", "data": data}, {"type": "text", "text": "w7 w8"}]
        body = {
            "model": MODEL, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
            "messages": [{"role": "user", "content": parts}],
        }  # fmt: skip
        response = client.post("/v1/chat/completions", json=body)
        texts.append(
            response.json()["choices"][0]["message"]["content"]
            if response.status_code == 200
            else response.text[:200]
        )
    c.expect("chat: plain and 8-bit parts give the same answer", texts[0] == texts[1], texts[1])


def check_refusals(client: httpx.Client, c: Checks) -> None:
    """Every bad payload is a 400 with a reason, and the server lives."""
    for name, data in bad_payloads(HIDDEN_SIZE, MAX_MODEL_LEN).items():
        response = client.post(
            "/v1/completions", json={"model": MODEL, "max_tokens": 1, "prompt_embeds": data}
        )
        reason = response.text[:200]
        if response.status_code == 400:
            reason = response.json()["error"]["message"][:110]
        c.expect(f"{response.status_code} {name}", response.status_code == 400, reason)
    c.expect("healthy after that", client.get("/health").status_code == 200)


def check_proxy(
    upstream: str, model: Path, prompts: list[list[int]], client: httpx.Client, c: Checks
) -> None:
    """Text through the proxy, compressed to 8 bits and plain, against text to vLLM itself."""
    texts = [text_of(ids) for ids in prompts[:8]]
    direct = [completion(client, prompt=text)[0] for text in texts]
    for flags in (["--embedding-bits", "8"], ["--embedding-compression", "none"]):
        port = free_port()
        url = f"http://{_LOOPBACK}:{port}"
        command = [
            sys.executable, "-m", "server", "proxy", "--upstream", upstream, "--model", str(model),
            "--host", _LOOPBACK, "--port", str(port), *flags,
        ]  # fmt: skip
        with (
            running(command, url, model.parent / "proxy.log", {}, 120),
            httpx.Client(base_url=url, timeout=120) as proxy,
        ):
            through = [completion(proxy, prompt=text)[0] for text in texts]
            equal = sum(a == b for a, b in zip(through, direct, strict=True))
            c.expect(
                f"proxy {' '.join(flags)}: {equal} of {len(texts)} texts as without it",
                equal == len(texts),
            )
            body = {"model": MODEL, "prompt": texts[0], "max_tokens": 4, "stream": True}
            events = proxy.post("/v1/completions", json=body).text
            c.expect("proxy: a stream ends as it should", events.rstrip().endswith("[DONE]"))
            messages = [{"role": "user", "content": "w3 w4"}]
            chat = {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0}
            answers = [one.post("/v1/chat/completions", json=chat) for one in (proxy, client)]
            content = [a.json()["choices"][0]["message"]["content"].strip() for a in answers]
            c.expect("proxy: a chat as without it", content[0] == content[1], repr(content[0]))


def prompts_of(tiny: TinyModel, count: int) -> list[list[int]]:
    """Beginnings of the sequences that the model knows, of 8 to 72 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 73, (count,), generator=generator).tolist()
    return [tiny.songs[i % len(tiny.songs), :n].tolist() for i, n in enumerate(lengths)]


def versions(python: str) -> str:
    """What runs in vLLM's environment."""
    code = (
        "import importlib.metadata as m, vllm, torch, sys;"
        "print('vLLM', vllm.__version__, '| torch', torch.__version__, '| Python',"
        " sys.version.split()[0])"
    )
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip().splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", default=sys.executable, help="python that has vLLM")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--start-timeout-s", type=float, default=300)
    options = parser.parse_args(arguments)
    c = Checks()
    print(versions(options.vllm_python), flush=True)
    tiny = make_tiny_model()
    print(f"a model of {sum(p.numel() for p in tiny.model.parameters()) / 1e6:.1f} M parameters, "
          f"loss {tiny.loss:.4f}")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        save_tiny_model(model, tiny)
        table = tiny.model.get_input_embeddings().weight.detach()
        prompts = prompts_of(tiny, options.prompts)
        port = free_port()
        url = f"http://{_LOOPBACK}:{port}"
        log = Path(place) / "vllm.log"
        command = vllm_command(options.vllm_python, model, port)
        with (
            running(command, url, log, VLLM_ENVIRONMENT, options.start_timeout_s),
            httpx.Client(base_url=url, timeout=120) as client,
        ):
            c.expect("the plugin says that it is there", "TurboQuant prompt" in log.read_text())
            check_tokens(client, table, prompts, c)
            check_chat(client, table, c)
            check_refusals(client, c)
            check_proxy(url, model, prompts, client, c)
    print(f"{c.failed} checks failed" if c.failed else "all checks passed")
    return int(c.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
