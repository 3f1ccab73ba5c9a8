"""A search from the last hidden states of prompts to packed answers, on static buffers.

Everything that differs between batches is read from device memory at fixed addresses, nothing
waits for the device, and no shape depends on data: on CUDA the whole is captured once and
replayed. The same code runs uncaptured, and on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rectokens.decoding.device_beams import BeamBuffers
from rectokens.decoding.device_requests import RequestTables
from rectokens.decoding.device_tables import TrieTable
from rectokens.ops.beam_step import beam_step_, begin_search_, child_logits, finish_search_
from rectokens.schemas.search import SearchRequest
from server.engine.device.model import DeviceModel
from server.engine.device.passes import BeamKV, BeamPass
from server.engine.device.prompt_rows import aligned
from server.engine.prefix_cache import Lease


class Search:
    """Buffers of a search of up to B requests, W beams each.

    Args:
        model: what runs the steps.
        table: the trie; W and the number of levels are its shapes'.
        batch: B.
        max_exclusions: excluded items of all requests of a batch together, at most.
        pages: width of the page table.
        beam_kv: for at least B * W rows; shared with other searches that do not run meanwhile.
    """

    def __init__(
        self,
        model: DeviceModel,
        table: TrieTable,
        batch: int,
        max_exclusions: int,
        pages: int,
        beam_kv: BeamKV,
    ) -> None:
        device = model.device
        self._model = model
        self.table = table
        self.batch, self.width = batch, table.shapes.width
        self.pages = pages
        self.buffers = BeamBuffers(batch, table.shapes, device)
        self.requests = RequestTables(batch, max_exclusions, device)
        self.hidden = torch.zeros(batch, model.hidden_size, dtype=model.dtype, device=device)
        # Lengths, places among the prompts and page table in one block: one copy.
        self._field = aligned(batch)
        size = 2 * self._field + batch * pages
        self._prompts = torch.zeros(size, dtype=torch.int32, device=device)
        self._lengths = self._prompts[:batch]
        self._places = self._prompts[self._field : self._field + batch]
        self._page_table = self._prompts[2 * self._field :].view(batch, pages)
        self._beam_kv = beam_kv.narrow(batch * self.width)

    def load(
        self,
        requests: Sequence[SearchRequest],
        num_items: int,
        leases: Sequence[Lease],
        places: Sequence[int],
        hidden: Tensor,
    ) -> None:
        """Make a batch the one that is searched; enqueued, the host does not wait.

        Args:
            requests: at most B.
            num_items: N of the trie that is loaded.
            leases: pages of their prompts.
            places: of their prompts in ``hidden``.
            hidden: last hidden states of prompts, (at least as many, H).
        """
        self.requests.load(requests, num_items)
        is_cuda = self._prompts.device.type == "cuda"
        host = torch.zeros_like(self._prompts, device="cpu", pin_memory=is_cuda)
        view = host.numpy()
        view[: len(leases)] = [lease.num_tokens for lease in leases]
        view[self._field : self._field + len(places)] = places
        table = view[2 * self._field :].reshape(self.batch, self.pages)
        for row, lease in enumerate(leases):
            table[row, : len(lease.pages)] = lease.pages
        self._prompts.copy_(host, non_blocking=True)
        self.hidden.copy_(hidden.index_select(0, self._places))

    def run(self) -> Tensor:
        """Search the loaded batch.

        Returns:
            ``buffers.answers``, int32, for ``unpack_answers``.
        """
        table, buffers, requests, model = self.table, self.buffers, self.requests, self._model
        levels = table.shapes.num_levels
        # Places without a request must not ask for a normalization that costs something.
        kinds = torch.where(requests.beam_width > 0, requests.normalization, -1)
        begin_search_(buffers, requests)
        self._step(0, self.hidden, 1, kinds)
        for depth in range(1, levels):
            rows = BeamPass(
                positions=(self._lengths + (depth - 1)).repeat_interleave(
                    self.width, output_size=self.batch * self.width
                ),
                step=depth - 1,
                lengths=self._lengths,
                page_table=self._page_table,
                ancestors=buffers.ancestors[depth],
                beam_kv=self._beam_kv,
                pool=model.pool,
            )
            hidden = model.beam_pass(buffers.codes[depth].view(-1), rows)
            self._step(depth, hidden, self.width, kinds)
        finish_search_(table, buffers, requests)
        return buffers.answers

    def _step(self, depth: int, hidden: Tensor, width: int, kinds: Tensor) -> None:
        """Logits of the beams' next codes, and the beams that they lead to."""
        table, buffers, requests = self.table, self.buffers, self.requests
        head = self._model.head
        shape = (self.batch, width)
        vocab_norm = head.vocab_norm(hidden, kinds).view(shape)
        if depth > 0 and table.shapes.levels[depth].gathers:
            weight, bias = head.rows(depth)
            logits = child_logits(
                table,
                buffers,
                depth,
                hidden.view(*shape, -1),
                weight,
                bias,
                factor=head.factor,
                softcap=head.softcap,
            )
            level_norm = head.level_norm(hidden, depth, kinds).view(shape)
            beam_step_(
                table,
                buffers,
                requests,
                depth,
                logits,
                compact=True,
                vocab_log_norm=vocab_norm,
                level_log_norm=level_norm,
            )
        else:
            logits = head.logits(hidden, depth).view(*shape, -1)
            beam_step_(table, buffers, requests, depth, logits, vocab_log_norm=vocab_norm)
