"""A decoder run by its own modules, with attention over pages put in by transformers' registry.

For models whose layers are not of the common shape. Rows of all requests lie side by side in the
sequence dimension of a batch of one; the attention function keeps them apart.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from rectokens.ops.context_attention import ScoreRule
from rectokens.ops.decoder_pieces import store_
from server.engine.context_attention import check_arguments, shared_context_attention
from server.engine.device.passes import ForwardPass, PromptPass
from server.engine.packed_attention import scale_of

ATTENTION_NAME = "rectokens_paged_context"

_running: ContextVar[ForwardPass | None] = ContextVar("rectokens_forward_pass", default=None)


def score_rule(query: Tensor, name: str, given: dict[str, Any]) -> ScoreRule:
    """The rule that an attention call asks for.

    Args:
        query: (..., D).
        name: of the module, for the message.
        given: keyword arguments of the call.

    Raises:
        UnsupportedAttentionError: an argument that is not implemented.
    """
    check_arguments(name, given)
    return ScoreRule(
        scale=float(scale_of(query, given.get("scaling"))),
        window=given.get("sliding_window"),
        softcap=given.get("softcap"),
    )


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers attention function. query (1, Hq, R, D), key and value (1, Hkv, R, D).

    Returns:
        (1, R, Hq, D) and None, as transformers expects.

    Raises:
        UnsupportedAttentionError: an attention variant that is not implemented.
    """
    rows = _running.get()
    if rows is None:
        return shared_context_attention(module, query, key, value, attention_mask, **kwargs)
    rule = score_rule(query, type(module).__name__, kwargs)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    queries, keys, values = (_rows(side) for side in (query, key, value))
    store_(keys, values, *rows.target(layer))
    return rows.attend(layer, queries, rule)[None], None


def _rows(side: Tensor) -> Tensor:
    """(1, heads, R, D) to (R, heads, D), the heads of a row contiguous."""
    rows = side[0].transpose(0, 1)
    dim = rows.shape[2]
    return rows if rows.stride()[1:] == (dim, 1) else rows.contiguous()


def _paged_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function: none within a pass; sdpa's own elsewhere."""
    if _running.get() is not None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def register() -> None:
    """Make the attention known to transformers. Repeating it changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _paged_mask)


class ModuleDecoder:
    """Runs passes through the model's own modules.

    Args:
        model: a causal LM of transformers whose layers mix positions by attention alone; its
            attention implementation is set to ours.
    """

    def __init__(self, model: Any) -> None:
        register()
        model.set_attn_implementation(ATTENTION_NAME)
        self._decoder = model.get_decoder()
        # A mask of four dimensions is taken as it is: none is built, no packed sequence guessed.
        self._mask = torch.zeros(1, 1, 1, 1, device=model.device, dtype=torch.bool)

    def __call__(self, x: Tensor, rows: ForwardPass) -> Tensor:
        """As :meth:`server.engine.device.fused_decoder.FusedDecoder.__call__`."""
        token = _running.set(rows)
        try:
            hidden: Tensor = self._decoder(
                inputs_embeds=x[None],
                attention_mask=self._mask,
                position_ids=rows.positions[None].long(),
                use_cache=False,
            ).last_hidden_state[0]
        finally:
            _running.reset(token)
        if isinstance(rows, PromptPass):
            return hidden.index_select(0, rows.last_rows)
        return hidden
