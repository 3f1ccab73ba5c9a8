"""The engine for devices: prompts packed over pages, the search captured, one wait a batch."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rectokens.decoding.device_tables import MAX_WIDTH
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest
from server.engine.base import LEFT, EngineBase
from server.engine.device.answers import collect_answers
from server.engine.device.batch import DeviceBatch, is_filtered, slice_of, tokens_of, width_fault
from server.engine.device.buckets import Buckets, group_requests
from server.engine.device.graphs import CaptureError, empty_cache
from server.engine.device.model import DeviceModel
from server.engine.device.prompt_passes import DEFAULT_ROWS, PromptPasses
from server.engine.device.run import DeviceRun, Part
from server.engine.device.searches import Searches
from server.engine.device.timer import Timer
from server.engine.kv_pool import pages_for
from server.engine.prefix_cache import OutOfPagesError, PrefixCache
from server.engine.prompt_leases import PromptLeases, split_by_pages
from server.engine.types import BatchOutcome, EngineFault, HasLeft, PrefixCacheStats, nobody_left

logger = logging.getLogger(__name__)

_TABLE_STEP = 16  # page tables are as wide as a multiple of this
_MAX_PROMPTS = 32  # of a captured pass


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """What is captured.

    Attributes:
        buckets: searches.
        prompt_rows: passes over prompts, by rows.
        capture: False runs everything uncaptured, through the same code.
        fp8: whether the large products of the layers are computed in FP8.
    """

    buckets: Buckets = field(default_factory=Buckets)
    prompt_rows: tuple[int, ...] = DEFAULT_ROWS
    capture: bool = True
    fp8: bool = False


class DeviceEngine(EngineBase):
    """Searches catalogs with a model whose layers mix positions by attention alone.

    One thread runs batches; another may prepare the next one meanwhile.

    Args:
        model: the causal LM, on its device.
        device_model: what runs it in passes.
        cache: of the pool's pages.
        options: what is captured.
    """

    def __init__(
        self,
        model: Any,
        device_model: DeviceModel,
        cache: PrefixCache,
        options: DeviceOptions | None = None,
    ) -> None:
        super().__init__(model, device_model.item_tokens)
        options = options or DeviceOptions()
        pool = device_model.pool
        self._max_prompt_tokens = min(self._max_prompt_tokens, pool.num_pages * pool.page_size)
        self._model = device_model
        self._cache = cache
        self._buckets = options.buckets
        pages = pages_for(self._max_prompt_tokens, pool.page_size)
        pages = -(-pages // _TABLE_STEP) * _TABLE_STEP
        capture = options.capture and device_model.capturable
        self._searches = Searches(device_model, options.buckets, pages, capture=capture)
        self._passes = PromptPasses(
            device_model, options.prompt_rows, _MAX_PROMPTS, pages, capture=capture
        )
        self._passes.capture()
        self._captures = capture and self.device.type == "cuda"
        self._lock = threading.Lock()
        self._unsettled: list[DeviceRun] = []
        # Made beside the searches in use, for a catalog (its row_ptrs) that outgrew them.
        self._made: tuple[Tensor, Searches] | None = None
        self._tried_again = False  # to make those that there was no memory for
        self._sizes: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    @property
    def prefix_cache(self) -> PrefixCacheStats | None:
        """What is kept of earlier prompts; None where nothing is. Any thread may read it."""
        return self._cache.stats() if self._cache.enabled else None

    def search(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> BatchOutcome:
        """Answer a batch: see :meth:`prepare` and :meth:`run`."""
        return self.run(self.prepare(requests, trie))

    def get_ready(self, trie: CatalogTrie) -> None:
        """Capture searches for a catalog that has outgrown them, beside those that run.

        The first time also those that there was no memory for when the engine was made: a model
        that was served until then may have had it. They are kept until that catalog is searched or
        let go, or another one is made ready.

        Raises:
            ValueError: the catalog does not fit the model.
        """
        self._check_trie(trie)
        self._made = None
        if self._searches.takes(trie):
            if self._searches.is_whole or self._tried_again:
                return
            self._tried_again = True
        try:
            with torch.inference_mode():
                made = self._searches.beside(trie)
        except (torch.OutOfMemoryError, CaptureError) as error:
            # The first batch makes them, when the others are gone.
            logger.warning("no searches are made beside others: %s", error)
            return
        self._made = trie.row_ptrs, made

    def let_go(self, trie: CatalogTrie) -> None:
        """Drop the searches that were made for a catalog; see ``SearchEngine``."""
        made = self._made
        if made is not None and made[0] is trie.row_ptrs:
            self._made = None

    def prepare(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> DeviceBatch:
        """Check a batch and copy its filters to the device. Any thread may, at any time.

        Args:
            requests: may differ in everything; the order of the answers is theirs.
            trie: the catalog, on the engine's device.

        Raises:
            ValueError: a trie that does not fit the model, or a filter of another catalog.
            EngineBrokenError: the device does not work any more.
        """
        with self._watching_device():
            return self._prepare(requests, trie)

    def _prepare(self, requests: Sequence[SearchRequest], trie: CatalogTrie) -> DeviceBatch:
        self._check_trie(trie)
        tokens = [tokens_of(request) for request in requests]
        faults = tuple(
            self._prompt_fault(request, own) or width_fault(request.beam_width)
            for request, own in zip(requests, tokens, strict=True)
        )
        rows = tuple(row for row, fault in enumerate(faults) if fault is None)
        sound = tuple(requests[row] for row in rows)
        known = self._known_size(trie)
        if known is None or any(map(is_filtered, sound)):
            with self._copying():
                num_items = self._num_items(trie)
                sound = tuple(self._with_filters_here(request, num_items) for request in sound)
        else:
            num_items = known
        return DeviceBatch(
            requests=sound,
            rows=rows,
            faults=faults,
            trie=trie,
            num_items=num_items,
            tokens=tuple(
                np.zeros(r.prompt_length, dtype=np.int64) if own is None else own
                for r, own in zip(sound, (tokens[row] for row in rows), strict=True)
            ),
        )

    def run(self, prepared: DeviceBatch, has_left: HasLeft = nobody_left) -> BatchOutcome:
        """Answer a prepared batch.

        Args:
            prepared: by this engine.
            has_left: looked at before anything is computed: a captured search is not stopped.

        Returns:
            One result a request. A request that is at fault by itself gets an ``EngineFault``;
            its neighbours are answered.

        Raises:
            EngineBrokenError: the device does not work any more.
        """
        return self.start(prepared, has_left).finish()

    def begin(self, prepared: DeviceBatch, has_left: HasLeft = nobody_left) -> DeviceRun | None:
        """Enqueue a batch, if that is a few calls; None where it takes as long as running it."""
        return self.start(prepared, has_left) if self._captures else None

    def start(self, prepared: DeviceBatch, has_left: HasLeft = nobody_left) -> DeviceRun:
        """Enqueue a batch; arguments and errors as of :meth:`run`.

        Others that were started may be unfinished. They are settled first where they hold pages
        that this one needs, or where other searches take over.
        """
        run = DeviceRun(prepared.faults, self._ended)
        wanted = []
        for place, row in enumerate(prepared.rows):
            if has_left(row):
                run.results[row] = LEFT
            else:
                wanted.append(place)
        lengths = [prepared.requests[place].prompt_length for place in wanted]
        pool = self._model.pool
        try:
            with self._lock, torch.inference_mode():
                if wanted:
                    self._use(prepared.trie)
                for part in split_by_pages(lengths, pool.page_size, pool.num_pages):
                    self._start_part(prepared, [wanted[index] for index in part], run)
        except Exception as error:
            run.abandon()
            self._fail(error)
            raise
        self._unsettled.append(run)
        return run

    def _start_part(self, batch: DeviceBatch, places: Sequence[int], run: DeviceRun) -> None:
        """Enqueue requests whose prompts fit the pool together."""
        requests = [batch.requests[place] for place in places]
        rows = [batch.rows[place] for place in places]
        prompts: list[Any] = [
            batch.tokens[place] if r.prompt_embeds is None else r.prompt_embeds
            for r, place in zip(requests, places, strict=True)
        ]
        leases = self._lease(prompts, run)
        if isinstance(leases, EngineFault):
            for row in rows:
                run.results[row] = leases
            return
        try:
            timer = Timer(self.device)
            hidden = self._passes(
                [
                    slice_of(request, batch.tokens[place], lease.cached_tokens, lease.pages)
                    for request, place, lease in zip(requests, places, leases.leases, strict=True)
                ]
            )
            timer.mark()
            waiting = self._enqueue(requests, batch, leases, hidden)
            timer.mark()
        except BaseException:
            leases.close()
            raise
        read = partial(collect_answers, requests, waiting, batch.num_items)
        run.parts.append(Part(rows, leases, timer, read))

    def _lease(self, prompts: Sequence[Any], run: DeviceRun) -> PromptLeases | EngineFault:
        """Pages for some prompts; if need be, those of what is still running."""
        try:
            return PromptLeases(self._cache, prompts, whole=True)
        except OutOfPagesError:
            self._settle()
            run.settle()
        try:
            return PromptLeases(self._cache, prompts, whole=True)
        except OutOfPagesError as why:
            return EngineFault(str(why))

    def _settle(self) -> None:
        """Wait for all that was started."""
        for run in self._unsettled:
            run.settle()

    def _ended(self, run: DeviceRun, error: Exception | None) -> None:
        if run in self._unsettled:
            self._unsettled.remove(run)
        if error is not None:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Raise EngineBrokenError if no later call survives the error."""
        self._searches.forget()
        self._require_device(error)

    def _use(self, trie: CatalogTrie) -> None:
        """Search ``trie`` from now on, with what was made for it if there is such."""
        made = self._made
        if made is not None and made[0] is trie.row_ptrs:
            self._settle()  # what was started runs with the others
            self._searches, self._made = made[1], None
            if self.device.type == "cuda":
                empty_cache()  # the others' graphs are gone
        elif not self._searches.searches(trie):
            self._settle()
        self._searches.use(trie)

    def _enqueue(
        self,
        requests: Sequence[SearchRequest],
        batch: DeviceBatch,
        leases: PromptLeases,
        hidden: Tensor,
    ) -> list[tuple[tuple[int, ...], Tensor, Any]]:
        """Start the searches of all groups; their answers are on the host after one wait."""
        waiting = []
        widths = [request.beam_width for request in requests]
        for group in group_requests(widths, self._buckets, MAX_WIDTH):
            members = [requests[place] for place in group.members]
            exclusions = sum(
                0 if r.excluded_items is None else r.excluded_items.numel() for r in members
            )
            search, run = self._searches.of(group, batch.trie, exclusions)
            own = [leases.leases[place] for place in group.members]
            search.load(members, batch.num_items, own, group.members, hidden)
            answers = run()
            host = torch.empty_like(answers, device="cpu", pin_memory=answers.is_cuda)
            host.copy_(answers, non_blocking=True)
            waiting.append((group.members, host, search.table.shapes))
        return waiting

    def _known_size(self, trie: CatalogTrie) -> int | None:
        """N, where it was read before."""
        known = self._sizes.get(id(trie.row_ptrs))
        return known[1] if known is not None and known[0]() is trie.row_ptrs else None

    def _num_items(self, trie: CatalogTrie) -> int:
        """N, read from the device once a trie."""
        known = self._known_size(trie)
        if known is not None:
            return known
        self._sizes = {key: size for key, size in self._sizes.items() if size[0]() is not None}
        num_items = trie.num_items
        self._sizes[id(trie.row_ptrs)] = (weakref.ref(trie.row_ptrs), num_items)
        return num_items

    def _with_filters_here(self, request: SearchRequest, num_items: int) -> SearchRequest:
        """The request with one constraint set, on the device, that is all it allows."""
        prefix = request.allowed_prefix
        if prefix is not None:
            if prefix.shape != (num_items + 1,):
                raise ValueError(
                    f"allowed_prefix has shape {tuple(prefix.shape)}; "
                    f"expected ({num_items + 1},) for a catalog of {num_items} items"
                )
            prefix = self._prefixes(prefix)
        listed = request.allowed_items
        if listed is not None:
            if listed.numel() and not 0 <= int(listed[0]) <= int(listed[-1]) < num_items:
                raise ValueError(
                    f"allowed_items reach from {int(listed[0])} to {int(listed[-1])}; "
                    f"the catalog has items 0 to {num_items - 1}"
                )
            marks = torch.zeros(num_items + 1, dtype=torch.int32, device=self.device)
            marks[listed.to(self.device) + 1] = 1
            if prefix is not None:
                marks[1:] *= prefix.diff()
            prefix = marks.cumsum(0, dtype=torch.int32)
        return replace(request, allowed_prefix=prefix, allowed_items=None)
