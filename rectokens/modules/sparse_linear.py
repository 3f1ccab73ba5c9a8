"""An output layer that can be told to compute only what a trie allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rectokens.ops.constrained_node_transition import (
    ChildChoices,
    draw_children,
    fused_linear_constrained_node_transition,
    rank_children,
)
from rectokens.schemas.config import CSR_KERNELS, CSRKernel
from rectokens.schemas.state import ConstraintState

# The tables in which nn.Module keeps what state_dict, parameters() and .to() see.
_MODULE_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class _Constraint(NamedTuple):
    state: ConstraintState
    strategy: CSRKernel
    temperature: float | Tensor | None
    k: int
    rng_seed: int | Tensor | None


class SparseLinear(nn.Linear):
    """Wraps an ``nn.Linear``; inside ``constrained`` it computes the children's logits only.

    It shares the parameter tables of the layer it wraps, so it may take its place in a model:
    checkpoint keys (``lm_head.weight``), weight tying, dtype and device moves and loading all
    act on both at once.

    Attributes:
        base_linear: the wrapped layer, H to V.
        next_nodes, valid_idxs: int64 (B, M), children of each row and their tokens, after a
            constrained forward; M = ``trie.layer_max_branches[step]``.
        sample: int64 (B,), the token drawn (strategy "sample"), -1 in a row without children.
        topk_logits, topk_idxs: float32 and int64 (B, k) (strategy "topk"), -inf and -1 past a
            row's last child.
        choices: what "topk" and "sample" chose, k a row, with log-probabilities.
        model_transforms_logits: whether the model was seen to change what this layer returns
            (soft-capping, scaling). ``decode_one_step`` finds out, and then masks logits in
            place of "topk" and "sample", which cannot know the model's final logits.

    Every forward resets the results to None before it sets those of its strategy.

    Raises:
        TypeError: the wrapped object is not an ``nn.Linear``, or is a ``SparseLinear`` already.
    """

    base_linear: nn.Linear
    next_nodes: Tensor | None
    valid_idxs: Tensor | None
    sample: Tensor | None
    topk_logits: Tensor | None
    topk_idxs: Tensor | None
    choices: ChildChoices | None

    def __init__(self, base_linear: nn.Linear) -> None:
        if not isinstance(base_linear, nn.Linear) or isinstance(base_linear, SparseLinear):
            raise TypeError(
                f"base_linear is a {type(base_linear).__name__}; expected a plain nn.Linear"
            )
        # Written past nn.Module.__setattr__, which would register the base layer as a child and
        # give the weight a second name.
        self.__dict__["base_linear"] = base_linear
        training = base_linear.training
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a second weight
        for table in _MODULE_TABLES:
            self.__dict__[table] = base_linear.__dict__[table]
        self.in_features = base_linear.in_features
        self.out_features = base_linear.out_features
        self.training = training
        self.model_transforms_logits = False
        self._constraint: _Constraint | None = None
        self._reset_results()

    @property
    def training(self) -> bool:
        """Training mode, of both layers at once."""
        return self.base_linear.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.base_linear.training = mode

    def constrained(
        self,
        constraint_state: ConstraintState,
        strategy: CSRKernel = "default",
        temperature: float | Tensor | None = None,
        k: int = 1,
        rng_seed: int | Tensor | None = None,
    ) -> AbstractContextManager[SparseLinear]:
        """Context manager within which ``forward`` obeys ``constraint_state``.

        Args:
            constraint_state: step, trie and ``cur_node`` (B,), one node a row of the input.
            strategy: "default" masks logits, "topk" ranks children, "sample" draws them.
            temperature: of "sample" draws and of the log-probabilities in ``choices``; None is 1.
            k: children to choose a row ("topk", "sample").
            rng_seed: of "sample"; None takes one from torch's generator at each forward.

        Raises:
            ValueError: unknown strategy, or k below 1.
        """
        if strategy not in CSR_KERNELS:
            raise ValueError(f"strategy is {strategy!r}; allowed are {', '.join(CSR_KERNELS)}")
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        return self._constrained(_Constraint(constraint_state, strategy, temperature, k, rng_seed))

    @contextmanager
    def _constrained(self, constraint: _Constraint) -> Iterator[SparseLinear]:
        outer = self._constraint
        self._constraint = constraint
        try:
            yield self
        finally:
            self._constraint = outer

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Linear's own name)
        """Logits of ``input`` (B, H), or (B, T, H), of which the last position is constrained.

        Returns:
            Outside ``constrained``: what the base layer returns. Inside, for (B, H): float32
            masked logits (B, V) by "default", ``topk_logits`` (B, k) by "topk", zeros (B, V) by
            "sample". For (B, T, H): (B, T, V) by "default", earlier positions plain; (B, 1, k)
            and (B, 1, V) by the others.

        Raises:
            ValueError: an input of another rank, or whose rows do not match ``cur_node``.
        """
        self._reset_results()
        constraint = self._constraint
        if constraint is None:
            return self.base_linear(input)  # type: ignore[no-any-return]
        if input.ndim not in (2, 3) or (input.ndim == 3 and input.shape[1] == 0):
            raise ValueError(f"input has shape {tuple(input.shape)}; expected (B, H) or (B, T, H)")
        last = input if input.ndim == 2 else input[:, -1]
        result = self._forward_rows(last, constraint)
        if input.ndim == 2:
            return result
        result = result.unsqueeze(1)
        if constraint.strategy != "default" or input.shape[1] == 1:
            return result
        return torch.cat([self.base_linear(input[:, :-1]).to(result.dtype), result], dim=1)

    def _forward_rows(self, a: Tensor, constraint: _Constraint) -> Tensor:
        b, bias, state = self.weight.t(), self.bias, constraint.state
        if constraint.strategy == "default":
            self.next_nodes, self.valid_idxs, logits = fused_linear_constrained_node_transition(
                a, b, state, bias
            )
            return logits
        k, temperature = constraint.k, constraint.temperature
        if constraint.strategy == "topk":
            choices = rank_children(a, b, state, k, bias=bias, temperature=temperature)
            self.topk_logits, self.topk_idxs = choices.logits, choices.idxs
            result = choices.logits
        else:
            choices = draw_children(
                a, b, state, k, bias=bias, rng_seed=constraint.rng_seed, temperature=temperature
            )
            self.sample = choices.idxs[:, 0]
            result = choices.logits.new_zeros(a.shape[0], b.shape[1])
        self.choices = choices
        self.next_nodes, self.valid_idxs = choices.next_node, choices.valid_idxs
        return result

    def _reset_results(self) -> None:
        self.next_nodes = self.valid_idxs = None
        self.sample = self.topk_logits = self.topk_idxs = None
        self.choices = None
