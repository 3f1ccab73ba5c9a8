"""What the process has loaded that processes of jobs are copied from; importing this loads it.

Only what starts no threads: a copy has the calling thread alone, and a lock that another one held
would never be let go of there. polars and pyarrow start some when they are imported, so they and
what needs them are left to the copies.
"""

from __future__ import annotations

import gc
from contextlib import suppress


def load() -> None:
    """Load what jobs need and takes long."""
    # What cannot be imported fails again when a job needs it, and is reported there.
    with suppress(Exception):
        import filelock  # noqa: F401
        import psutil  # noqa: F401
        import safetensors.torch  # noqa: F401
        import torch

        import rectokens.artifacts.open_store
        import rectokens.artifacts.tokenizer  # noqa: F401
        import server.jobs.backend
        import server.jobs.child
        import server.jobs.ledger
        import server.jobs.params
        import server.jobs.places
        import server.rehearsal.activation
        import server.rehearsal.board
        import server.settings  # noqa: F401
        from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer

        # The first use of a tokenizer makes torch load as much again. With one thread, so that
        # there are no others yet.
        torch.set_num_threads(1)
        rows = torch.eye(2, dtype=torch.float32)
        RQKMeansTokenizer(num_levels=1, codebook_size=2, dim=2, seed=0).fit_step(rows).encode(rows)
    # What is there by now stays for good: a collector that passes over it keeps its pages shared.
    gc.collect()
    gc.freeze()


load()
