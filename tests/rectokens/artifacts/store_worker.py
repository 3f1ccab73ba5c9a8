"""A process that changes a store until it is killed; started by test_store_faults.py.

python store_worker.py ROOT MODEL_VERSION SEED
"""

from __future__ import annotations

import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import torch

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.retention import RetentionPolicy
from rectokens.catalog.artifact import load_catalog, save_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.catalog.edit_sets import put_constraint_sets
from rectokens.catalog.predicates import Predicate
from rectokens.catalog.update import ItemUpserts, update_catalog


def changed(catalog: Catalog, chance: random.Random) -> Catalog:
    """Some items come, change and go; or a rule becomes another."""
    if chance.random() < 0.3:
        rule = Predicate(f"stock > {chance.randrange(9)}")
        return put_constraint_sets(catalog, {"rule": rule})
    names = [f"W{n}" for n in chance.sample(range(500), 6)]
    codes = torch.tensor([[chance.randrange(8)] * 3 for _ in names[1:]])
    stock = pl.DataFrame({"stock": [chance.randrange(9) for _ in names[1:]]})
    upserts = ItemUpserts(names[1:], codes, metadata=stock)
    return update_catalog(catalog, upserts, names[:1], unknown_deletes="ignore")


def main(root: Path, model_version: str, seed: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    store = open_release_store(root)
    steps = 0
    while True:
        release = store.open_active()
        assert release is not None
        try:
            catalog = load_catalog(release.catalog_path)
            catalog = changed(catalog, chance)
            folder = save_catalog(store.local.folder("catalog"), catalog)
            store.activate(store.bind(model_version, folder.name))
            if chance.random() < 0.2:
                store.rollback()
            if chance.random() < 0.2:
                later = datetime.now(UTC) + timedelta(days=2)
                store.apply_retention(RetentionPolicy(keep_last=3), now=later)
        except ArtifactError as error:
            # Two of us share the store: what one removes, the other may miss. Never more.
            allowed = (
                "does not exist",
                "roll back to",
                "is not at",
                "cannot be read",
                "is missing",
            )
            if not any(text in str(error) for text in allowed):
                raise
        steps += 1
        print(steps, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
