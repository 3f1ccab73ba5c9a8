"""Generic constrained decoding: any causal LM, any trie over its token ids.

One step is: run the model, score each row's allowed successors, keep the k best continuations
of each batch item, and take their cache rows along. This is the plain, portable form; the
service has an engine of its own. ``rectokens.decoding.model_protocol`` says what a model is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from rectokens.decoding.interleaved_generation import generate_with_item_constraints
from rectokens.decoding.model_cache import returned_cache
from rectokens.decoding.model_protocol import (
    Model,
    call_model,
    evaluating,
    gather_cache_rows,
    last_logits,
    sparse_output_layer,
    watching_logits,
)
from rectokens.decoding.proposals import (
    Proposals,
    dense_children,
    dense_nodes,
    propose,
    survive,
)
from rectokens.decoding.vntk import branches_at
from rectokens.modules.constraint_enforcer import SparseTrieConstraintEnforcer
from rectokens.ops.constrained_node_transition import constrained_node_transition
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig, check_generation_config
from rectokens.schemas.state import (
    ConstrainedGenerationState,
    ConstraintState,
    GenerationState,
)

__all__ = ["autoregressive_generate", "decode_one_step", "generate_with_item_constraints"]

_T = TypeVar("_T")


def decode_one_step(
    constrained_generation_state: ConstrainedGenerationState,
    model_fwd: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> ConstrainedGenerationState:
    """Extend every beam by one token.

    A token's score is its log-softmax (at the temperature, if positive) over the children of
    the beam's node, not over the vocabulary. Each row proposes ``beam_size`` successors; the
    best ``k`` of an item's sums survive. Where fewer than k continuations exist, the rest are
    dead beams: ids -1, log-probability -inf, last. A NaN logit counts as -inf.

    Args:
        constrained_generation_state: ``generation_state`` None at step 0, else as returned.
        model_fwd: the model. If it holds a ``SparseLinear``, that layer is constrained from the
            first step below the dense layers on, as ``csr_kernel`` says.
        input_ids: int64 (B, T), the prompts, at step 0; then (B * k, 1), the newest tokens,
            ``generated_ids.reshape(B * k, -1)[:, -1:]``. Negative ids are fed as 0.
        attention_mask: (B, T) or None, at step 0; ignored later.

    Returns:
        The state after the step. Row b * k + i is beam i of item b.

    Raises:
        ValueError: a bad configuration, a step past the trie, or wrong shapes.
        TypeError: a cache of an unknown kind.
    """
    config, constraint, beams = constrained_generation_state
    trie, step = constraint.trie, constraint.step
    _check_step(constrained_generation_state, input_ids, attention_mask)
    if beams is None:
        num_items = input_ids.shape[0]
        prefixes = input_ids.new_empty((num_items, 0), dtype=torch.long)
        past, mask = None, attention_mask
        # The root is the node of every row where no dense layer stands before it.
        constraint = constraint._replace(cur_node=prefixes.new_zeros(num_items))
    else:
        num_items = beams.generated_ids.shape[0]
        prefixes = beams.generated_ids.reshape(input_ids.shape[0], step)
        past, mask = beams.past_key_values, beams.attention_mask

    proposals, past = _run(model_fwd, input_ids, past, mask, config, constraint, prefixes)
    so_far = proposals.log_probas.new_zeros(num_items) if beams is None else beams.log_probas
    best = survive(proposals, so_far, num_items, config.k)

    ids = torch.cat([prefixes[best.parents], best.tokens.unsqueeze(1)], dim=1)
    ids = ids.masked_fill(best.tokens.unsqueeze(1) < 0, -1)
    if mask is not None:
        mask = mask[best.parents]
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    return ConstrainedGenerationState(
        generation_config=config,
        constraint_state=ConstraintState(step + 1, trie, best.nodes),
        generation_state=GenerationState(
            generated_ids=ids.view(num_items, config.k, step + 1),
            past_key_values=gather_cache_rows(past, best.parents),
            log_probas=best.log_probas,
            attention_mask=mask,
        ),
    )


def _run(
    model: Model,
    input_ids: Tensor,
    past: Any,
    mask: Tensor | None,
    config: GenerationConfig,
    constraint: ConstraintState,
    prefixes: Tensor,
) -> tuple[Proposals, Any]:
    """Call the model; each row's proposals, and the cache."""
    trie, rows = constraint.trie, input_ids.shape[0]
    fan_out = min(config.beam_size, trie.vocab_size)
    temperature = config.temperature
    layer = sparse_output_layer(model)
    if constraint.step < trie.num_dense_layers:
        fused = layer if config.csr_kernel != "default" else None
        with watching_logits(fused) as seen:
            output = call_model(model, input_ids, past, mask)
        logits = last_logits(output, rows, trie.vocab_size)
        if fused is not None:
            unchanged = bool(seen) and torch.equal(seen[-1].float(), logits.float())
            fused.model_transforms_logits = not unchanged
        children = dense_children(trie, prefixes)
        proposals = propose(logits, children, None, fan_out, temperature)
        proposals = proposals._replace(nodes=dense_nodes(trie, prefixes, proposals.tokens))
        return proposals, returned_cache(output)

    if layer is None:
        output = call_model(model, input_ids, past, mask)
        logits = last_logits(output, rows, trie.vocab_size)
        nodes, children, logits = constrained_node_transition(logits, constraint)
        return propose(logits, children, nodes, fan_out, temperature), returned_cache(output)

    strategy = "default" if layer.model_transforms_logits else config.csr_kernel
    with layer.constrained(constraint, strategy, temperature=temperature, k=fan_out):
        output = call_model(model, input_ids, past, mask)
    if strategy == "default":
        nodes, children = _found(layer.next_nodes), _found(layer.valid_idxs)
        logits = last_logits(output, rows, trie.vocab_size)
        return propose(logits, children, nodes, fan_out, temperature), returned_cache(output)
    choices = _found(layer.choices)
    return Proposals(choices.idxs, choices.nodes, choices.log_probas), returned_cache(output)


def _found(result: _T | None) -> _T:
    if result is None:
        raise ValueError("the model has a SparseLinear layer but its forward never called it")
    return result


def _check_step(
    state: ConstrainedGenerationState, input_ids: Tensor, attention_mask: Tensor | None
) -> None:
    config, constraint, beams = state
    check_generation_config(config)
    branches_at(constraint.trie, constraint.step)
    shape = tuple(input_ids.shape)
    if input_ids.ndim != 2 or shape[1] < 1:
        raise ValueError(f"input_ids have shape {shape}; expected (rows, T) with T at least 1")
    if (constraint.step == 0) != (beams is None):
        raise ValueError(
            f"step is {constraint.step} and generation_state is "
            f"{'None' if beams is None else 'given'}; it is None at step 0 and only there"
        )
    if beams is None:
        if config.beam_size < config.k:
            raise ValueError(
                f"beam_size is {config.beam_size}; it must be at least k = {config.k}, "
                "or the first step could not fill the beams"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected {shape}"
            )
        return
    expected = (beams.generated_ids.shape[0] * config.k, constraint.step)
    if beams.generated_ids.shape[1:] != (config.k, constraint.step) or shape[0] != expected[0]:
        raise ValueError(
            f"input_ids have {shape[0]} rows and generated_ids shape "
            f"{tuple(beams.generated_ids.shape)}; expected (B, {config.k}, {constraint.step}) and "
            f"B * {config.k} rows"
        )


@overload
def autoregressive_generate(
    model: nn.Module,
    trie: CompactCSRTrie,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    attr_path: str | None = None,
    attention_mask: Tensor | None = None,
    *,
    return_scores: Literal[False] = False,
    search_width: int | None = None,
) -> Tensor: ...


@overload
def autoregressive_generate(
    model: nn.Module,
    trie: CompactCSRTrie,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    attr_path: str | None = None,
    attention_mask: Tensor | None = None,
    *,
    return_scores: Literal[True],
    search_width: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def autoregressive_generate(
    model: nn.Module,
    trie: CompactCSRTrie,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    attr_path: str | None = None,
    attention_mask: Tensor | None = None,
    *,
    return_scores: bool = False,
    search_width: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k best (or drawn) sequences of the trie after each prompt.

    Runs in inference and evaluation mode and leaves the model as it found it.

    Args:
        model: a causal LM.
        trie: over the model's token ids, on the model's device.
        input_ids: int64 (B, T), padded on the left.
        generation_config: ``steps`` at most the trie's depth; fewer give prefixes.
        attr_path: dotted path of the output layer, to be swapped for a ``SparseLinear`` while
            this runs; None leaves it.
        attention_mask: (B, T), 0 at padding, or None.
        return_scores: also return the log-probabilities.
        search_width: beams kept inside, at least k, of which the best k are returned; None is k.

    Returns:
        int64 (B, k, steps), best first, -1 throughout where an item has fewer than k sequences;
        with ``return_scores`` also their log-probabilities (B, k), -inf there.

    Raises:
        ValueError: a bad configuration, more steps than levels, right padding, wrong shapes.
        AttributeError: nothing at ``attr_path``.
        TypeError: no ``nn.Linear`` there.
    """
    config = generation_config
    check_generation_config(config)
    if config.steps > trie.num_levels:
        raise ValueError(f"steps is {config.steps}; the trie has {trie.num_levels} levels")
    width = config.k if search_width is None else search_width
    if width < config.k:
        raise ValueError(f"search_width is {width}; it must be at least k = {config.k}")
    if attention_mask is not None and not bool((attention_mask[..., -1] != 0).all()):
        raise ValueError("attention_mask ends in 0 in some row; prompts are padded on the left")
    inner = config
    if width > config.k:
        inner = config._replace(k=width, beam_size=max(config.beam_size, width))

    converted: AbstractContextManager[Any] = nullcontext()
    if attr_path is not None:
        converted = SparseTrieConstraintEnforcer.converted(model, attr_path)
    with converted, torch.inference_mode(), evaluating(model):
        state = ConstrainedGenerationState(inner, ConstraintState(0, trie, None))
        newest = input_ids
        for _ in range(config.steps):
            state = decode_one_step(
                constrained_generation_state=state,
                model_fwd=model,
                input_ids=newest,
                attention_mask=attention_mask,
            )
            assert state.generation_state is not None
            newest = state.generation_state.generated_ids[:, :, -1].reshape(-1, 1)

    beams = state.generation_state
    assert beams is not None
    # Copies made out here are ordinary tensors, which autograd accepts.
    ids = beams.generated_ids[:, : config.k].clone()
    if not return_scores:
        return ids
    return ids, beams.log_probas.view(-1, width)[:, : config.k].clone()
