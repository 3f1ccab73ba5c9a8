"""What happens on a real Ray cluster of this machine; prints one JSON object of findings.

Run in a network namespace with loopback only: Ray listens on all interfaces.
    python ray_scenario.py FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from deploy.ray.encode import encode_on_ray  # noqa: E402
from deploy.ray.encode_pieces import EncodeError, claim_folder, join_pieces, make_plan  # noqa: E402
from rectokens.artifacts.tokenizer import load_tokenizer  # noqa: E402

PORT = 8_123
# No item of a history is in every release.
BODY = {"history": [], "top_k": 3, "beam_width": 20}
# A replica imports torch and transformers first, on a machine that may be busy.
WAIT_S = 180.0


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def until(what: Any, seconds: float = WAIT_S) -> Any:
    """The first true value of ``what``; fails after so long."""
    ends = time.monotonic() + seconds
    while True:
        if value := what():
            return value
        if time.monotonic() > ends:
            raise TimeoutError("it did not come to pass")
        time.sleep(0.2)


class Load:
    """Closed-loop callers in threads; counts what they were answered."""

    def __init__(self, variant: str, callers: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.replicas: Counter[str] = Counter()
        self._variant = variant
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
            while not self._ends.is_set():
                try:
                    answer = client.post(
                        "/v1/recommend", json=BODY, headers={"X-Variant": self._variant}
                    )
                except httpx.HTTPError as error:
                    self.outcomes[type(error).__name__] += 1
                    continue
                if answer.status_code == 200 and len(answer.json()["items"]) == BODY["top_k"]:
                    self.outcomes["answered"] += 1
                    self.replicas[answer.headers["X-Replica"]] += 1
                elif answer.status_code == 503 and "Retry-After" in answer.headers:
                    self.outcomes[f"retryable {answer.json()['error']['code']}"] += 1
                else:
                    self.outcomes[f"{answer.status_code} {answer.text[:80]}"] += 1


class Scenario:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stores = load(ROOT / "tests" / "server" / "stores.py")
        tiny = load(ROOT / "tests" / "conftest.py")._build("qwen3", 64, 1)
        self.stores = {name: stores.make_store(folder / name, tiny) for name in ("a", "b")}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60)

    def start(self) -> None:
        ray.init(num_cpus=16, include_dashboard=False, address="local", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        self.deploy({"a": 3, "b": 1})
        until(
            lambda: {name: len(found) for name, found in self.ready().items()} == {"a": 2, "b": 1}
        )

    def deploy(self, weights: dict[str, float]) -> None:
        """As ``serve deploy FILE`` does, which needs Ray's dashboard to hand the file over."""
        common = {"num_gpus": 0, "num_cpus": 1}
        variants = [
            {
                "name": "a",
                "replicas": 2,
                "settings": {"store.path": str(self.folder / "a"), "cpu_threads": 1},
                **common,
            },
            {
                "name": "b",
                "settings": {"store.path": str(self.folder / "b"), "cpu_threads": 1},
                "autoscaling": {
                    "max_replicas": 2,
                    "target_beam_rows": 20,
                    "upscale_delay_s": 1,
                    "look_back_s": 11,
                },
                **common,
            },
        ]
        application = {
            "name": "rectokens",
            "route_prefix": "/",
            "import_path": "deploy.ray.app:build",
            "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
            "args": {"router": {"replicas": 2}, "variants": variants},
            "deployments": [
                {"name": "router", "user_config": {"weights": weights, "experiment": "test"}}
            ],
        }
        client = serve.context._get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def ready(self) -> dict[str, list[dict[str, Any]]]:
        try:
            answer = self.client.get("/ready")
        except httpx.HTTPError:
            return {"a": [], "b": []}
        return answer.json()["variants"] if answer.status_code == 200 else {"a": [], "b": []}

    def routing(self) -> dict[str, Any]:
        found = {}
        for number in range(60):
            headers = {"X-User-ID": f"user-{number}"}
            answers = [
                self.client.post("/v1/recommend", json=BODY, headers=headers) for _ in range(2)
            ]
            assert all(one.status_code == 200 for one in answers), answers[0].text
            (variant,) = {one.headers["X-Variant"] for one in answers}
            found[f"user-{number}"] = variant
        no_user = self.client.post("/v1/recommend", json=BODY).headers["X-Variant"]
        unknown = self.client.post("/v1/recommend", json=BODY, headers={"X-Variant": "z"})
        return {"users": found, "no_user": no_user, "unknown": unknown.status_code}

    def reweighing(self) -> dict[str, Any]:
        """Other weights: users move, processes stay."""

        def replicas() -> list[str]:
            return sorted(one["replica"] for found in self.ready().values() for one in found)

        before = replicas()
        self.deploy({"a": 0, "b": 1})

        def variants() -> set[str]:
            return {
                self.client.post(
                    "/v1/recommend", json=BODY, headers={"X-User-ID": f"user-{number}"}
                ).headers["X-Variant"]
                for number in range(30)
            }

        until(lambda: variants() == {"b"})
        self.deploy({"a": 3, "b": 1})
        until(lambda: variants() == {"a", "b"})
        return {"before": before, "after": replicas()}

    def surface(self) -> dict[str, Any]:
        lines = self.client.post(
            "/v1/recommend/batch", json={"requests": [BODY] * 5}
        ).text.splitlines()
        bad = self.client.post("/v1/recommend", json={"historie": []})
        named = self.client.post("/v1/recommend", json=BODY, headers={"X-Request-ID": "mine-1"})
        page = self.client.get("/metrics").text
        return {
            "request_id": named.headers.get_list("X-Request-ID"),
            "batch": sorted(
                (json.loads(line)["index"], json.loads(line)["status"]) for line in lines
            ),
            "bad": [bad.status_code, bad.json()["error"]["code"], "x-request-id" in bad.headers],
            "admin": self.client.get("/admin/jobs").status_code,
            "metrics_replicas": sorted(
                {
                    line.split('variant="')[1].split('"')[0]
                    + "/"
                    + line.split('replica="')[1].split('"')[0]
                    for line in page.splitlines()
                    if line.startswith("rectokens_queue_beam_rows{")
                }
            ),
            "ready": {
                name: sorted(one["replica"] for one in found)
                for name, found in self.ready().items()
            },
        }

    def activation(self) -> dict[str, Any]:
        small = self.stores["a"]
        small.add(2)
        wanted = small.activate(2)

        def serving() -> dict[str, list[str]]:
            return {
                name: [one["release_version"] for one in found]
                for name, found in self.ready().items()
            }

        until(lambda: serving()["a"] == [wanted, wanted])
        answer = self.client.post(
            "/v1/recommend", json={"history": ["2-1"], "top_k": 3}, headers={"X-Variant": "a"}
        )
        return {
            "wanted": wanted,
            "serving": serving(),
            "b": self.stores["b"].releases[1],
            "items": [item["item_id"] for item in answer.json()["items"]],
        }

    def killed_replica(self) -> dict[str, Any]:
        before = {one["replica"] for one in self.ready()["a"]}
        with Load("a", callers=8) as callers:
            until(lambda: len(callers.replicas) == 2)
            time.sleep(1.0)
            killed = replica_processes("a")[0]
            answered = callers.outcomes["answered"]
            killed.kill()
            killed_at = time.monotonic()
            until(lambda: len({one["replica"] for one in self.ready()["a"]} - before) == 1)
            back_s = time.monotonic() - killed_at
            fresh = next(iter({one["replica"] for one in self.ready()["a"]} - before))
            until(lambda: callers.replicas[fresh] > 0)
        page = self.client.get("/metrics").text
        lost = {
            outcome: sum(
                float(line.rpartition(" ")[2])
                for line in page.splitlines()
                if line.startswith("rectokens_router_lost_replicas_total{")
                and f'outcome="{outcome}"' in line
            )
            for outcome in ("retried", "failed", "cut")
        }
        return {
            "answered_before": answered,
            "outcomes": callers.outcomes,
            "back_s": round(back_s, 1),
            "lost": lost,
            "replicas": len(self.ready()["a"]),
        }

    def scaling(self) -> dict[str, Any]:
        before = len(self.ready()["b"])
        with Load("b", callers=8) as callers:
            until(lambda: len(self.ready()["b"]) == 2)
        return {"before": before, "after": len(self.ready()["b"]), "outcomes": callers.outcomes}

    def encoding(self) -> dict[str, Any]:
        source, out = self.folder / "embeddings", self.folder / "run"
        source.mkdir()
        generator = torch.Generator().manual_seed(3)
        vectors = torch.randn(600, 6, generator=generator)
        for number in range(3):
            part = vectors[200 * number : 200 * (number + 1)]
            table = pa.table(
                {
                    "item_id": [f"i{200 * number + row}" for row in range(200)],
                    "embedding": part.tolist(),
                },
            )
            pq.write_table(table, source / f"{number}.parquet", row_group_size=50)
        small = self.stores["a"]
        tokenizer = small.root / "tokenizers" / small.tokenizer
        artifact = load_tokenizer(tokenizer)
        plan = make_plan(source, artifact, copied=["item_id"], rows_per_piece=100)
        missing = claim_folder(plan, out)
        encode_on_ray(tokenizer, plan, missing, out, workers=2, batch_size=64)
        table = pq.read_table(join_pieces(plan, out))
        expected = artifact.tokenizer.encode(vectors).codes.tolist()
        bad = self.folder / "bad.parquet"
        pq.write_table(pa.table({"embedding": [[0.0] * 6, [float("nan")] * 6]}), bad)
        broken = make_plan(bad, artifact)
        try:
            encode_on_ray(tokenizer, broken, list(broken.pieces), self.folder / "x", workers=1)
            told = "nothing"
        except EncodeError as error:
            told = str(error).removeprefix(str(self.folder))
        return {
            "told": told,
            "pieces": len(plan.pieces),
            "ids": table["item_id"].to_pylist() == [f"i{row}" for row in range(600)],
            "codes": table["codes"].to_pylist() == expected,
            "left": len(claim_folder(plan, out)),
        }

    def cut_stream(self) -> dict[str, Any]:
        """The replicas die while one of them streams; the last finding, as none is left."""
        lines, ended = 0, "whole"
        many = {"requests": [BODY] * 1_000}
        try:
            with self.client.stream("POST", "/v1/recommend/batch", json=many) as answer:
                for _ in answer.iter_lines():
                    lines += 1
                    if lines == 5:
                        for process in replica_processes("a"):
                            process.kill()
        except httpx.HTTPError as error:
            ended = type(error).__name__
        return {"status": answer.status_code, "lines": lines, "ended": ended}


def replica_processes(variant: str) -> list[psutil.Process]:
    title = f"ray::ServeReplica:rectokens:{variant}"
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[0].startswith(title)
    ]


def main(folder: Path) -> None:
    scenario = Scenario(folder)
    findings: dict[str, Any] = {}
    started = time.monotonic()
    try:
        scenario.start()
        findings["start_s"] = round(time.monotonic() - started, 1)
        for name in (
            "routing",
            "reweighing",
            "surface",
            "activation",
            "killed_replica",
            "scaling",
            "encoding",
            "cut_stream",
        ):
            began = time.monotonic()
            try:
                findings[name] = getattr(scenario, name)()
            except Exception as error:
                findings[name] = {"error": f"{type(error).__name__}: {error}"}
            findings[f"{name}_s"] = round(time.monotonic() - began, 1)
    finally:
        serve.shutdown()
        ray.shutdown()
    print(json.dumps(findings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
