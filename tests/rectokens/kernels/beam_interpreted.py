"""Run the beam-step kernels in Triton's interpreter against the definition; print JSON.

A program of its own, because the interpreter is chosen when triton is first imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rectokens.kernels import beam_launch as launch
from rectokens.ops import beam_step as ops
from rectokens.schemas.search import SearchRequest
from tests.rectokens.ops.beam_cases import (
    TRIES,
    Search,
    check_answers,
    check_steps,
    random_logits,
    random_requests,
    random_trie,
)

torch.set_num_threads(1)


def poisoned_empty(*shape, dtype=torch.float32, **options):
    shape = shape if isinstance(shape[0], int) else shape[0]
    dead = float("nan") if dtype.is_floating_point else -77
    return torch.full(tuple(shape), dead, dtype=dtype, **options)


torch.empty = poisoned_empty
# Every path, at sizes that the interpreter can do.
SMALL = {"tile": 16, "programs": 4, "own": 4, "share": 8, "readers": 2}
FORMS = {
    "direct": launch.StepSettings(direct=1 << 20),
    "direct, small": launch.StepSettings(direct=1 << 20, **SMALL),
    "short list": launch.StepSettings(direct=0),
    "short list, small": launch.StepSettings(direct=0, **SMALL),
    "cut rows": launch.StepSettings(direct=0, whole=0, **SMALL),
    "cut rows, parts": launch.StepSettings(direct=0, whole=0, **{**SMALL, "programs": 64}),
    "cut rows, direct": launch.StepSettings(direct=1 << 20, whole=0, tile=16),
    "copies": launch.StepSettings(direct=0, pairs_a_copy=2, copies=4, **SMALL),
}


class Kernels:
    """The launches, with settings of our choice."""

    form = launch.DEFAULT
    room = 512

    @classmethod
    def begin(cls, buffers, requests):
        launch.begin(buffers, requests, cls.form)

    @classmethod
    def step(cls, *arguments):
        launch.step(*arguments, cls.form)

    child_logits = staticmethod(launch.child_logits)
    finish = staticmethod(launch.finish)


ops._implementation = lambda device: Kernels


def search_of(trie, requests, batch, width, room):
    search = Search.of(trie, width, batch)
    search.requests.load(requests, trie.num_items)
    scratch = launch._scratch_of(search.buffers, Kernels.form)
    if room:  # A short list that is full as soon as it may be.
        shape = (batch, width)
        object.__setattr__(scratch, "candidates", torch.full(shape, -77, dtype=torch.long))
    return search


def property_of(form, examples):
    @given(
        kind=st.sampled_from(TRIES),
        levels=st.integers(1, 3),
        codes=st.integers(1, 12),
        width=st.integers(1, 16),
        batch=st.integers(1, 3),
        spare=st.integers(0, 1),
        ties=st.booleans(),
        compact=st.booleans(),
        crowded=st.booleans(),
        seed=st.integers(0, 2**20),
    )
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
    )
    def check(kind, levels, codes, width, batch, spare, ties, compact, crowded, seed):
        Kernels.form = form
        g = torch.Generator().manual_seed(seed)
        trie = random_trie(kind, levels, codes, g)
        requests = random_requests(batch, width, trie.num_items, g)
        logits, norms = random_logits(trie, batch + spare, width, g, ties=ties)
        search = search_of(trie, requests, batch + spare, width, crowded)
        search.run(logits, norms, compact=compact)
        check_steps(search, trie, requests, logits, norms)
        check_answers(search, trie, requests)
        # Again in the same buffers: nothing of the search before is left.
        search.run(logits, norms, compact=compact)
        check_steps(search, trie, requests, logits, norms)

    return check


def poisoned():
    Kernels.form = FORMS["short list, small"]
    g = torch.Generator().manual_seed(5)
    trie = random_trie("random", 2, 9, g)
    requests = [SearchRequest((0,), 6, 1), SearchRequest((0,), 6, 1, normalization="level")] * 2
    for cut in (0, 1024):
        Kernels.form = launch.StepSettings(direct=0, whole=cut, **SMALL)
        logits, norms = random_logits(trie, 4, 6, g)
        logits[0][0, 0, int(trie.edge_codes(torch.tensor(1)))] = torch.nan
        logits[1][1, 2] = torch.inf
        logits[1][2, 1] = -torch.inf
        search = search_of(trie, requests, 4, 6, False)
        search.run(logits, norms)
        check_steps(search, trie, requests, logits, norms)
        assert search.buffers.poisoned.tolist() == [1, 1, 0, 0]


CASES = {f"step/{name}": property_of(form, 5) for name, form in FORMS.items()}
CASES["poisoned"] = poisoned

if __name__ == "__main__":
    results = {}
    for name, case in CASES.items():
        try:
            case()
            results[name] = "ok"
        except Exception:
            import traceback

            results[name] = traceback.format_exc()[-3000:]
    print(json.dumps(results))
