"""Putting constraints into a model, and taking them out again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from rectokens.modules.sparse_linear import SparseLinear
from rectokens.schemas.state import ConstraintState


class ConstraintEnforcer(nn.Module, ABC):
    """Changes a model so that its output layer can be constrained."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """Change ``model`` in place and return it. Preparing it again changes nothing."""

    @abstractmethod
    def constrained(self, state: ConstraintState, **kwargs: Any) -> AbstractContextManager[Any]:
        """Context manager within which the prepared model obeys ``state``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not to be called: the model does the forward.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"call the prepared model, not its {type(self).__name__}")


class SparseTrieConstraintEnforcer(ConstraintEnforcer):
    """Constrains by swapping the output layer for a ``SparseLinear``.

    Attributes:
        attr_path: dotted path of the output layer in the model, such as ``lm_head``.
        constrained_linear: that layer, once a model is prepared; else None.
    """

    constrained_linear: SparseLinear | None

    def __init__(self, attr_path: str) -> None:
        super().__init__()
        self.attr_path = attr_path
        self._hold(None)

    def _hold(self, layer: SparseLinear | None) -> None:
        # Past nn.Module.__setattr__: the layer is the model's child, not a second owner's.
        self.__dict__["constrained_linear"] = layer

    @classmethod
    def convert_to_sparse_linear(cls, model: nn.Module, attr_path: str) -> SparseLinear:
        """Replace the layer at ``attr_path`` in place; one already replaced is returned as is.

        Raises:
            AttributeError: nothing there.
            TypeError: something there that is not an ``nn.Linear``.
        """
        parent, name = _locate(model, attr_path)
        layer = getattr(parent, name)
        if isinstance(layer, SparseLinear):
            return layer
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{attr_path} is a {type(layer).__name__}; expected an nn.Linear")
        sparse = SparseLinear(layer)
        setattr(parent, name, sparse)
        return sparse

    @classmethod
    def restore_linear(cls, model: nn.Module, attr_path: str) -> nn.Linear:
        """The inverse: put the wrapped layer back, the very object; a plain one stays.

        Raises:
            AttributeError: nothing there.
            TypeError: something there that is not an ``nn.Linear``.
        """
        parent, name = _locate(model, attr_path)
        layer = getattr(parent, name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{attr_path} is a {type(layer).__name__}; expected an nn.Linear")
        if isinstance(layer, SparseLinear):
            layer = layer.base_linear
            setattr(parent, name, layer)
        return layer

    @classmethod
    @contextmanager
    def converted(cls, model: nn.Module, attr_path: str) -> Iterator[SparseLinear]:
        """``convert_to_sparse_linear`` inside, the model as it was afterwards, also on errors.

        Raises:
            AttributeError: nothing there.
            TypeError: something there that is not an ``nn.Linear``.
        """
        parent, name = _locate(model, attr_path)
        before = getattr(parent, name)
        sparse = cls.convert_to_sparse_linear(model, attr_path)
        try:
            yield sparse
        finally:
            setattr(parent, name, before)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap the output layer of ``model`` in place and return the model.

        Raises:
            AttributeError: ``attr_path`` leads nowhere.
            TypeError: it leads to something that is not an ``nn.Linear``.
        """
        self._hold(self.convert_to_sparse_linear(model, self.attr_path))
        return model

    def restore(self, model: nn.Module) -> nn.Module:
        """Undo ``prepare`` in place and return the model; an unprepared model stays as it is."""
        self.restore_linear(model, self.attr_path)
        self._hold(None)
        return model

    def constrained(
        self, state: ConstraintState, **kwargs: Any
    ) -> AbstractContextManager[SparseLinear]:
        """``SparseLinear.constrained`` of the prepared layer, with its keyword arguments.

        Raises:
            RuntimeError: no model was prepared.
        """
        if self.constrained_linear is None:
            raise RuntimeError("no model was prepared; call prepare(model) first")
        return self.constrained_linear.constrained(state, **kwargs)


def _locate(model: nn.Module, attr_path: str) -> tuple[nn.Module, str]:
    """The module that holds the last name of ``attr_path``, and that name."""
    *parents, name = attr_path.split(".")
    owner: Any = model
    for part in (*parents, name):
        holder = owner
        if not part or not hasattr(owner, part):
            raise AttributeError(
                f"{attr_path!r} leads nowhere: {type(owner).__name__} has no {part!r}"
            )
        owner = getattr(owner, part)
    return holder, name
