from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rectokens.artifacts.model import RetrievalSpec, save_model
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release_store import ReleaseStore
from rectokens.artifacts.tokenizer import save_tokenizer, tokenizer_fingerprint
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog
from rectokens.catalog.edit_sets import put_constraint_sets
from rectokens.catalog.predicates import Predicate
from rectokens.prompts.recipe import PromptRecipe
from rectokens.schemas.item_tokens import ItemTokens
from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer
from server.jobs.backend import Backend, BackendError, open_backend
from server.jobs.context import JobEnvironment, environment_of
from server.jobs.ledger import JobLedger
from server.settings import Settings, load_settings
from tests.waiting import ended, wait_until


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    opened = open_backend(tmp_path / "jobs.sqlite3", "test")
    yield opened
    opened.close()


@pytest.fixture
def ledger(backend: Backend) -> JobLedger:
    return JobLedger(backend, max_queued=5, keep_finished=3)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of our own, on a socket file."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    pytest.importorskip("redis")
    # A socket's path must be short.
    socket = Path(tmp_path_factory.mktemp("r", numbered=True)) / "s"
    command = [binary, "--port", "0", "--unixsocket", str(socket), "--save", ""]
    log = socket.with_name("log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=socket.parent, stdout=output, stderr=output)
    url = f"unix://{socket}"
    try:
        _wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        ended(process, log.read_text)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL of our own, on a socket file."""
    initdb, postgres = shutil.which("initdb"), shutil.which("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    # It refuses to run as root, and a socket's path must be short.
    user = "nobody" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    data = folder / "data"
    if user is not None:
        shutil.chown(folder, user)
    made = subprocess.run(
        [initdb, "-D", str(data), "-A", "trust", "-U", "test", "--no-sync"],
        user=user,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"initdb does not run here: {made.stderr.strip().splitlines()[-1:]}")
    command = [postgres, "-D", str(data), "-k", str(folder), "-c", "listen_addresses=", "-F"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, user=user, cwd=folder, stdout=output, stderr=output)
    url = f"postgresql://test@/postgres?host={folder}"
    try:
        _wait_for(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # ends without waiting for connections
        ended(process, log.read_text)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            open_backend(url, "ping").close()
        except BackendError:
            return False
        return True

    wait_until(answers, lambda: f"{url} does not answer\n{log.read_text()}")


@dataclass(frozen=True)
class Workplace:
    """A store with a tokenizer, a model and an active release, and a folder of sources.

    Attributes:
        root: of the store.
        lake: registered as the source root ``lake``.
        tokenizer: version.
        model: version.
        rows: embeddings of the active catalog's items, ``W0`` and so on.
    """

    root: Path
    lake: Path
    tokenizer: str
    model: str
    rows: np.ndarray

    @property
    def store(self) -> ReleaseStore:
        return open_release_store(self.root)

    def settings(self, **flags: Any) -> Settings:
        given = {f"jobs.{name}": str(value) for name, value in flags.items()}
        sources = f"lake={self.lake}"
        return load_settings(
            {"store.path": str(self.root), "admin.sources": sources, "jobs.threads": "1", **given}
        )

    def environment(self, **changes: Any) -> JobEnvironment:
        return dataclasses.replace(environment_of(self.settings()), **changes)

    def parquet(self, name: str, num_items: int, *, seed: int = 5, prefix: str = "N") -> str:
        """Write a source with ids, embeddings, a prior and metadata."""
        rows = np.random.default_rng(seed).normal(size=(num_items, DIM)).astype(np.float32)
        table = {
            "item_id": [f"{prefix}{i}" for i in range(num_items)],
            "embedding": pa.array(list(rows), pa.list_(pa.float32())),
            "popularity": np.linspace(0, 1, num_items),
            "stock": pa.array(range(num_items), pa.int64()),
        }
        pq.write_table(pa.table(table), self.lake / name)
        return name


DIM = 6
NUM_ITEMS = 200


@pytest.fixture(scope="session")
def workplace_template(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = tmp_path_factory.mktemp("template") / "store"
    lake = root.parent / "lake"
    lake.mkdir(parents=True)
    rows = np.random.default_rng(0).normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    fitted = RQKMeansTokenizer(num_levels=3, codebook_size=8, dim=DIM, seed=1)
    tokenizer = fitted.fit_step(torch.from_numpy(rows))
    tokenizer_folder = save_tokenizer(
        root / "tokenizers", tokenizer, report={"collision_rate": 0.5}, fitted_on={}
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    tokens = ItemTokens(
        offset=4, level_stride=8, num_levels=3, codebook_size=8, start_token_id=28, end_token_id=29
    )
    recipe = PromptRecipe("item_history", 1, {"max_items": 20})
    spec = RetrievalSpec(tokenizer_fingerprint(tokenizer), tokens, recipe)
    model_folder = save_model(root / "models", Qwen3ForCausalLM(config).eval(), spec)
    catalog = build_catalog(
        [f"W{i}" for i in range(NUM_ITEMS)],
        tokenizer.encode(torch.from_numpy(rows)).codes,
        codebook_size=8,
        tokenizer_fingerprint=spec.tokenizer_fingerprint,
        prior=torch.linspace(0, 1, NUM_ITEMS),
        metadata=pl.DataFrame({"stock": list(range(NUM_ITEMS))}),
        constraint_sets={"some": ["W1", "W2"]},
    )
    catalog = put_constraint_sets(catalog, {"stocked": Predicate("stock >= 100")})
    store = open_release_store(root)
    folder = save_catalog(
        store.local.folder("catalog"), catalog, tokenizer_version=tokenizer_folder.name
    )
    store.activate(store.bind(model_folder.name, folder.name))
    return Workplace(root, lake, tokenizer_folder.name, model_folder.name, rows)


@pytest.fixture
def workplace(workplace_template: Workplace, tmp_path: Path) -> Workplace:
    """One of its own for every test."""
    shutil.copytree(workplace_template.root.parent, tmp_path / "w")
    return dataclasses.replace(
        workplace_template, root=tmp_path / "w" / "store", lake=tmp_path / "w" / "lake"
    )
