"""Read a fused decoder off a loaded model, where its layers are of the common shape.

Nothing goes by a model's name. Submodules are looked up by the attribute names that the common
shape has in transformers; what norms compute, how attention scores are made, how embeddings are
scaled and what angles positions turn by is observed by running the model. Whatever is not
understood is refused, and what comes out must still be compared with the model as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rectokens.ops.context_attention import ScoreRule
from rectokens.ops.decoder_pieces import Norm, RotaryTable
from server.engine.context_attention import UnsupportedAttentionError
from server.engine.device.fused_decoder import FeedForward, FusedDecoder, LayerPlan, Projection
from server.engine.device.module_decoder import score_rule
from server.engine.device.observation import PROBE_TOKENS, Observed

# Rotary variants whose angles depend on how long the sequence is.
_VARYING_ROTARY = ("dynamic", "longrope")
_LAYER_PARTS = frozenset(
    {
        "self_attn",
        "mlp",
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    }
)
_ATTENTION_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
_FEED_PARTS = frozenset({"gate_proj", "up_proj", "down_proj"})


class NotRecognisedError(Exception):
    """The model's layers are not of the common shape; the message says in what."""


def recognise(model: Any, seen: Observed, max_positions: int) -> FusedDecoder:
    """The fused form of a model's decoder.

    Projections that are computed together are laid side by side or in turns in memory, and the
    model's own parameters become views of that: it goes on working and nothing is held twice.

    Args:
        model: a causal LM of transformers, in eval mode, on its device.
        seen: what a run of it shows.
        max_positions: positions that rotary angles are tabulated for.

    Raises:
        NotRecognisedError: a part that is not understood.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise NotRecognisedError("the decoder has no list of layers")
    final = getattr(decoder, "norm", None)
    if final is None:
        raise NotRecognisedError("the decoder has no final norm")
    for layer in layers:
        _check_parts(layer, _LAYER_PARTS)
        _check_parts(layer.self_attn, _ATTENTION_PARTS)
        _check_parts(layer.mlp, _FEED_PARTS)
    with torch.no_grad():  # not inference mode: its tensors cannot become a parameter's data
        tables = _rotary_tables(decoder, seen, max_positions)
        plans = [_layer_plan(layer, seen, tables[number]) for number, layer in enumerate(layers)]
        return FusedDecoder(tuple(plans), _norm(final), _embed_factor(model, seen))


def _check_parts(module: Any, known: frozenset[str]) -> None:
    for name, child in module.named_children():
        if name not in known and any(True for _ in child.parameters()):
            raise NotRecognisedError(f"{type(module).__name__} has a part {name!r}")
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise NotRecognisedError(f"{type(module).__name__} has parameters of its own: {own}")


def _layer_plan(layer: Any, seen: Observed, rotary: RotaryTable) -> LayerPlan:
    attention, feed = layer.self_attn, layer.mlp
    index = int(attention.layer_idx)
    dim = 2 * rotary.cos.shape[1]
    sides = [_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    heads = [side.weight.shape[0] // dim for side in sides]
    if (
        heads[1] != heads[2]
        or heads[0] % heads[1]
        or any(side.weight.shape[0] % dim for side in sides)
    ):
        raise NotRecognisedError(f"heads of {dim} do not divide the projections {heads}")
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        norms = (_norm(attention.q_norm, dim), _norm(attention.k_norm, dim))
        if (norms[0].eps, norms[0].offset) != (norms[1].eps, norms[1].offset):
            raise NotRecognisedError("queries and keys have norms of different kinds")
    if index not in seen.attention:
        raise NotRecognisedError(f"layer {index} did not call its attention through the registry")
    try:
        rule: ScoreRule = score_rule(
            torch.empty(dim, dtype=torch.float32),
            type(attention).__name__,
            seen.attention[index].arguments,
        )
    except UnsupportedAttentionError as why:
        raise NotRecognisedError(str(why)) from why
    # Gemma's layers have four norms, the others two; the second one's name then means another.
    sandwich = getattr(layer, "pre_feedforward_layernorm", None) is not None
    return LayerPlan(
        index=index,
        query_heads=heads[0],
        attention_in=_norm(_part(layer, "input_layernorm")),
        qkv=_side_by_side(sides),
        head_norms=norms,
        rotary=rotary,
        rule=rule,
        attention_out=_projection(_linear(attention, "o_proj")),
        attention_out_norm=_norm(layer.post_attention_layernorm) if sandwich else None,
        feed_in=_norm(
            layer.pre_feedforward_layernorm
            if sandwich
            else _part(layer, "post_attention_layernorm")
        ),
        feed=FeedForward(
            gate_up=_in_turns(_linear(feed, "gate_proj"), _linear(feed, "up_proj")),
            down=_projection(_linear(feed, "down_proj")),
            activation=_activation(feed),
        ),
        feed_out_norm=_norm(_part(layer, "post_feedforward_layernorm")) if sandwich else None,
    )


def _part(module: Any, name: str) -> Any:
    part = getattr(module, name, None)
    if part is None:
        raise NotRecognisedError(f"{type(module).__name__} has no {name!r}")
    return part


def _linear(module: Any, name: str) -> nn.Linear:
    part = _part(module, name)
    if type(part) is not nn.Linear:
        raise NotRecognisedError(f"{name!r} is {type(part).__name__}; expected a Linear layer")
    return part


def _projection(layer: nn.Linear) -> Projection:
    return Projection(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def _side_by_side(layers: list[nn.Linear]) -> Projection:
    """One projection; the layers' own parameters become views of its rows."""
    biased = [layer.bias is not None for layer in layers]
    if any(biased) != all(biased):
        raise NotRecognisedError("some projections have a bias and some have none")
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = torch.cat([layer.bias.detach() for layer in layers]) if all(biased) else None
    first = 0
    for layer in layers:
        rows = slice(first, first + layer.weight.shape[0])
        first = rows.stop
        layer.weight.data = weight[rows]
        if bias is not None:
            layer.bias.data = bias[rows]
    return Projection(weight, bias)


def _in_turns(first: nn.Linear, second: nn.Linear) -> Projection:
    """One projection, a row of each in turns; the layers' own parameters become views of it."""
    if (first.bias is None) != (second.bias is None):
        raise NotRecognisedError("some projections have a bias and some have none")
    if first.weight.shape != second.weight.shape:
        shapes = tuple(first.weight.shape), tuple(second.weight.shape)
        raise NotRecognisedError(f"gate and up projections are {shapes[0]} and {shapes[1]}")
    weight = torch.stack([first.weight.detach(), second.weight.detach()], 1).flatten(0, 1)
    bias = None
    if first.bias is not None:
        bias = torch.stack([first.bias.detach(), second.bias.detach()], 1).flatten()
    for number, layer in enumerate((first, second)):
        layer.weight.data = weight[number::2]
        if bias is not None:
            layer.bias.data = bias[number::2]
    return Projection(weight, bias)


def _norm(module: Any, size: int | None = None) -> Norm:
    """The norm that a module computes, found by trying."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1 or (size is not None and weight.shape[0] != size):
        raise NotRecognisedError(f"{type(module).__name__} is no norm with one weight a channel")
    eps = next(
        (
            float(getattr(module, name))
            for name in ("variance_epsilon", "eps", "epsilon")
            if isinstance(getattr(module, name, None), float)
        ),
        None,
    )
    if eps is None:
        raise NotRecognisedError(f"{type(module).__name__} has no epsilon that is known")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[0], generator=generator, dtype=torch.float32)
    x = x.to(weight.device, weight.dtype)
    # Small values too, so that another epsilon shows.
    x[2:] *= eps**0.5
    wanted = module(x).float()
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for offset in (False, True):
        norm = Norm(weight.detach(), eps, offset)
        if torch.allclose(norm(x).float(), wanted, rtol=tolerance, atol=tolerance):
            return norm
    raise NotRecognisedError(f"{type(module).__name__} is no root mean square norm")


def _activation(feed: Any) -> str:
    function = getattr(feed, "act_fn", None)
    if function is None:
        raise NotRecognisedError(f"{type(feed).__name__} has no activation 'act_fn'")
    x = torch.linspace(-6, 6, 97, dtype=torch.float32)
    found = function(x)
    known = {
        "silu": F.silu(x),
        "gelu_tanh": F.gelu(x, approximate="tanh"),
        "gelu": F.gelu(x),
    }
    for name, wanted in known.items():
        if torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
            return name
    raise NotRecognisedError(f"the activation {type(function).__name__} is not known")


def _rotary_tables(decoder: Any, seen: Observed, max_positions: int) -> list[RotaryTable]:
    """Angles of every layer, for all positions."""
    rotary = _part(decoder, "rotary_emb")
    kinds = getattr(rotary, "rope_type", "default")
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    if any(kind in _VARYING_ROTARY for kind in kinds):
        raise NotRecognisedError("rotary angles depend on the length of the sequence")
    made: dict[int, RotaryTable] = {}
    tables = []
    for given in seen.position_embeddings:
        if given is None:
            raise NotRecognisedError("layers are not given rotary cosines and sines")
        call = next((c for c in seen.rotary_calls if c[2][0] is given[0]), None)
        if call is None:
            raise NotRecognisedError("a layer's rotary angles are not those of the decoder")
        if id(call) not in made:
            made[id(call)] = _table_of(rotary, call[0], call[1], max_positions)
        tables.append(made[id(call)])
    return tables


def _table_of(
    rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any], max_positions: int
) -> RotaryTable:
    """Repeat a call of the rotary embedding for all positions."""
    device = args[0].device if args else next(iter(kwargs.values())).device
    positions = torch.arange(max_positions, device=device)[None]
    if "position_ids" in kwargs:
        kwargs = {**kwargs, "position_ids": positions}
    elif len(args) >= 2:
        args = (args[0], positions, *args[2:])
    else:
        raise NotRecognisedError("the rotary embedding is not given position_ids")
    cos, sin = (side[0] for side in rotary(*args, **kwargs))
    half = cos.shape[-1] // 2
    for side in (cos, sin):
        if cos.ndim != 2 or not torch.equal(side[:, :half], side[:, half:]):
            raise NotRecognisedError("rotary angles are not the same in both halves of a head")
    return RotaryTable(cos[:, :half].contiguous(), sin[:, :half].contiguous())


def _embed_factor(model: Any, seen: Observed) -> float:
    """What the model multiplies its embeddings by before the first layer."""
    embed = model.get_input_embeddings()
    plain = embed(torch.arange(PROBE_TOKENS, device=model.device)).float()
    if seen.first_input is None:
        raise NotRecognisedError("the first layer was not given hidden states")
    given = seen.first_input[0].float()
    large = plain.abs() > 1e-3
    if not bool(large.any()):
        raise NotRecognisedError("the embeddings are all zero")
    ratios = given[large] / plain[large]
    factor = float(ratios.median())
    if not torch.allclose(given, plain * factor, rtol=2e-2, atol=1e-4):
        raise NotRecognisedError("the model changes its embeddings before the first layer")
    return 1.0 if abs(factor - 1.0) < 1e-6 else factor
