"""The searches of an engine: captured for its buckets, made on demand for anything else.

A catalog that fits the shapes at hand is swapped in by writing a few pointers; nothing is captured
again. One that has outgrown them gets searches of its own: made beside the others by
:meth:`Searches.beside`, while those are in use, or in their place where nobody did so in time.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from rectokens.decoding.device_tables import MAX_WIDTH, StepShapes, TrieTable
from rectokens.kernels.compile_ahead import compile_ahead
from rectokens.schemas.catalog_trie import CatalogTrie
from server.engine.device.buckets import Buckets, Group
from server.engine.device.graphs import CapturedCall, CaptureError, empty_cache
from server.engine.device.model import DeviceModel
from server.engine.device.passes import BeamKV
from server.engine.device.search import Search

logger = logging.getLogger(__name__)

# Excluded items that a captured search has room for, for each of its requests. A batch with more
# is searched uncaptured.
EXCLUSIONS_A_REQUEST = 2_048

Ready = tuple[Search, Callable[[], Tensor]]


class Searches:
    """Searches over one catalog at a time.

    Args:
        model: what runs their steps.
        buckets: shapes that are captured.
        pages: most pages of a prompt.
        capture: whether to capture at all.
    """

    def __init__(self, model: DeviceModel, buckets: Buckets, pages: int, *, capture: bool) -> None:
        self._model = model
        self._buckets = buckets
        self._pages = pages
        self._capture = capture and model.device.type == "cuda"
        self._trie: weakref.ref[Tensor] | None = None
        self._tables: dict[int, TrieTable] = {}
        self._before: dict[int, StepShapes] = {}
        self._loose: dict[int, TrieTable] = {}
        self._ready: dict[tuple[int, int], Ready] = {}
        self._beam_kv: BeamKV | None = None
        self._gave_up = False  # whether a search could not be captured
        if self._capture:
            self._stream = torch.cuda.Stream(model.device)
            self._memory = torch.cuda.graph_pool_handle()

    def searches(self, trie: CatalogTrie) -> bool:
        """Whether ``trie`` is the one in use."""
        return self._trie is not None and self._trie() is trie.row_ptrs

    def use(self, trie: CatalogTrie) -> None:
        """Search ``trie`` from now on. The first time captures the searches, which takes seconds.

        Waits for the device where the trie is another than before.
        """
        if self.searches(trie):
            return
        self._loose.clear()
        for width in self._buckets.beam_widths:
            self._load(trie, width)
        self._trie = weakref.ref(trie.row_ptrs)
        made = {}
        for batch, width in self._buckets.shapes():
            if (batch, width) in self._ready:
                continue
            try:
                made[batch, width] = self._make(batch, width)
            except torch.OutOfMemoryError as error:
                _no_room(batch, width, error)
        if self._capture:
            # Not on the stream of batches that may run meanwhile.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                compile_ahead([search.run for search in made.values()])
        for (batch, width), search in made.items():
            try:
                self._ready[batch, width] = search, self._captured(search)
            except torch.OutOfMemoryError as error:
                _no_room(batch, width, error)
        made.clear()
        if self._capture:
            empty_cache()

    def takes(self, trie: CatalogTrie) -> bool:
        """Whether ``trie`` fits what was captured. Any thread may ask; waits for the device."""
        return all(table.shapes.refusal(trie) is None for table in list(self._tables.values()))

    @property
    def is_whole(self) -> bool:
        """Whether memory was there for all that were to be captured, if any were yet."""
        if not self._tables:
            return True
        # What was not captured may have wanted memory, too.
        return not self._gave_up and len(self._ready) == len(self._buckets.shapes())

    def beside(self, trie: CatalogTrie) -> Searches:
        """Searches for a trie that does not fit these, and for all that do. Any thread.

        They share nothing with these but the model, which goes on being used meanwhile; only
        one of the two may run at a time from then on.

        Raises:
            torch.OutOfMemoryError: no room for both.
            CaptureError: they run, but could not be captured: slower than these for good.
        """
        capture = self._capture or self._gave_up
        made = Searches(self._model, self._buckets, self._pages, capture=capture)
        made._before = {width: table.shapes for width, table in self._tables.items()}
        made.use(trie)
        if made._gave_up:
            raise CaptureError("searches beside others could not be captured")
        wanted = len(self._ready) + self.takes(trie)  # there is no sense in as many for the same
        if self._gave_up:
            wanted = 1  # whatever is captured is better
        if len(made._ready) < wanted:
            raise torch.OutOfMemoryError(
                f"room for {len(made._ready)} searches beside {len(self._ready)}"
            )
        return made

    def forget(self) -> None:
        """Look at the trie again at the next use, whatever went wrong before."""
        self._trie = None

    def of(self, group: Group, trie: CatalogTrie, exclusions: int) -> Ready:
        """A search for a group of requests, and the call that runs it.

        Args:
            group: of the batch.
            trie: the one in use.
            exclusions: excluded items of its requests together.
        """
        ready = self._ready.get((group.batch, group.width))
        if ready is not None and exclusions <= ready[0].requests.max_exclusions:
            return ready
        table = self._tables.get(group.width) or self._loose.get(group.width)
        if table is None:
            table = TrieTable(trie, StepShapes.of(trie, group.width))
            self._loose[group.width] = table
        beam_kv = self._allocate(group.batch * group.width)
        room = max(exclusions, EXCLUSIONS_A_REQUEST)
        search = Search(self._model, table, group.batch, room, self._pages, beam_kv)
        return search, search.run

    def _load(self, trie: CatalogTrie, width: int) -> None:
        table = self._tables.get(width)
        before = self._before.get(width)
        if table is not None:
            before = table.shapes
            refusal = table.shapes.refusal(trie)
            if refusal is None:
                table.load(trie, checked=True)
                return
            logger.info("searches of width %d are captured anew: %s", width, refusal)
            self._ready = {key: made for key, made in self._ready.items() if key[1] != width}
            if self._capture:
                # The memory of graphs that are gone cannot be captured into again.
                self._memory = torch.cuda.graph_pool_handle()
        shapes = StepShapes.of(trie, min(width, MAX_WIDTH))
        # The catalog before may be searched again: requests in flight, or a roll-back.
        self._tables[width] = TrieTable(trie, shapes if before is None else shapes.covering(before))

    def _make(self, batch: int, width: int) -> Search:
        if self._beam_kv is None:
            self._beam_kv = self._allocate(max(b * w for b, w in self._buckets.shapes()))
        return Search(
            self._model,
            self._tables[width],
            batch,
            batch * EXCLUSIONS_A_REQUEST,
            self._pages,
            self._beam_kv,
        )

    def _captured(self, search: Search) -> Callable[[], Tensor]:
        if not self._capture:
            return search.run
        try:
            return CapturedCall(search.run, self._stream, self._memory)
        except CaptureError as error:
            logger.warning("searches run uncaptured from now on: %s", error)
            self._capture, self._gave_up = False, True
            return search.run

    def _allocate(self, rows: int) -> BeamKV:
        model = self._model
        return BeamKV.allocate(
            model.pool.shapes,
            steps=max(model.item_tokens.num_levels - 1, 1),
            rows=rows,
            device=model.device,
            dtype=model.dtype,
        )


def _no_room(batch: int, width: int, error: Exception) -> None:
    # Such batches are searched on demand, in memory that is given back.
    logger.warning("no memory to keep searches of %d x %d: %s", batch, width, error)
