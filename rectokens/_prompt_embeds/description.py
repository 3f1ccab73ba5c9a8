"""What a `torch.save` pickle says, found without running it.

The pickle of a tensor, or of a dict of tensors, ints and strings, uses a score of opcodes and a
handful of globals. They are interpreted here into descriptions; nothing is imported, called or
allocated, whatever the bytes ask for, and any other opcode or global is refused.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rectokens._prompt_embeds.errors import PromptEmbedsError

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
}
_REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_ORDERED_DICT = ("collections", "OrderedDict")
_MAX_INT = 1 << 62


@dataclass(frozen=True)
class StorageDescription:
    """A storage: `numel` elements of `dtype` in the archive's member `data/<key>`."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class TensorDescription:
    """A tensor: a strided window on a storage."""

    storage: StorageDescription
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


class _Hooks:
    """The empty dict of backward hooks that every pickled tensor carries."""


_MARK = object()
_PUSH_ARGUMENT = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False}
_TUPLE_LENGTHS = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def describe(pickled: bytes) -> Any:
    """The pickled value, with a `TensorDescription` in the place of each tensor.

    Returns:
        A `TensorDescription`, or a dict from str to descriptions, ints, bools or strings; possibly
        another value the allowed opcodes can express, which the caller has to refuse by type.
        It may be a deeply shared structure: do not hash, compare or print what is not a scalar.

    Raises:
        PromptEmbedsError: an opcode or a global that a plain tensor dict does not need, or bytes
            that are no pickle.
    """
    machine = _Machine()
    for name, argument in _opcodes(pickled):
        if name == "STOP":
            return machine.result()
        machine.step(name, argument)
    raise PromptEmbedsError("the pickle has no end")


def _opcodes(pickled: bytes) -> Iterator[tuple[str, Any]]:
    operations = pickletools.genops(pickled)
    while True:
        try:
            opcode, argument, _ = next(operations)
        except StopIteration:
            return
        except (ValueError, OverflowError) as error:
            raise PromptEmbedsError("the pickle in the archive is damaged") from error
        yield opcode.name, argument


class _Machine:
    """A pickle machine that can only describe."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Interpret one opcode."""
        if name == "PROTO":
            if argument != 2:
                raise PromptEmbedsError(f"the pickle has protocol {argument}, allowed is 2")
        elif name in _PUSH_ARGUMENT:
            if isinstance(argument, int) and abs(argument) > _MAX_INT:
                raise PromptEmbedsError("the pickle holds an integer of more than 62 bits")
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            self._stack.append({})
        elif name == "MARK":
            self._stack.append(_MARK)
        elif name in _TUPLE_LENGTHS:
            self._stack.append(tuple(self._pop() for _ in range(_TUPLE_LENGTHS[name]))[::-1])
        elif name == "TUPLE":
            self._stack.append(tuple(self._pop_to_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise PromptEmbedsError("the pickle in the archive is damaged")
            self._stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self._stack.append(_allowed_global(argument))
        elif name == "BINPERSID":
            self._stack.append(_storage(self._pop()))
        elif name == "REDUCE":
            arguments = self._pop()
            self._stack.append(_reduce(self._pop(), arguments))
        elif name == "SETITEM":
            value = self._pop()
            self._set_items([self._pop(), value])
        elif name == "SETITEMS":
            self._set_items(self._pop_to_mark())
        else:
            raise PromptEmbedsError(f"the pickle uses opcode {name}, which no tensor dict needs")

    def result(self) -> Any:
        """The value left on the stack at the end."""
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise PromptEmbedsError("the pickle in the archive is damaged")
        return self._stack[0]

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise PromptEmbedsError("the pickle in the archive is damaged")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                return items[::-1]
            items.append(value)
        raise PromptEmbedsError("the pickle in the archive is damaged")

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise PromptEmbedsError("the pickle in the archive is damaged")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise PromptEmbedsError("dict keys must be strings, each once")
            target[key] = value


def _allowed_global(argument: str) -> _Global:
    module, _, name = argument.partition(" ")
    pair = (module, name)
    is_storage = module == "torch" and name in STORAGE_DTYPES
    if not (pair in (_REBUILD_TENSOR, _ORDERED_DICT) or is_storage):
        raise PromptEmbedsError(
            f"the pickle names the global {module[:80]}.{name[:80]}; only plain dense tensors of "
            "float or uint8 elements are accepted"
        )
    return _Global(module, name)


def _storage(identifier: Any) -> StorageDescription:
    """The storage of a persistent id: ('storage', class, key, device, number of elements)."""
    if type(identifier) is not tuple or len(identifier) != 5:
        raise PromptEmbedsError("the pickle refers to a storage in an unknown way")
    tag, kind, key, device, numel = identifier
    if (
        type(tag) is not str
        or tag != "storage"
        or type(kind) is not _Global
        or kind.name not in STORAGE_DTYPES
        or type(key) is not str
        or type(device) is not str
        or type(numel) is not int
    ):
        raise PromptEmbedsError("the pickle refers to a storage in an unknown way")
    if device != "cpu" and not device.startswith("cuda"):
        raise PromptEmbedsError(f"a tensor is on device {device[:40]!r}, allowed are cpu and cuda")
    return StorageDescription(STORAGE_DTYPES[kind.name], key, numel)


def _reduce(function: Any, arguments: Any) -> Any:
    if type(function) is not _Global or type(arguments) is not tuple:
        raise PromptEmbedsError("the pickle calls what is not a function")
    if (function.module, function.name) == _ORDERED_DICT and not arguments:
        return _Hooks()
    if (function.module, function.name) == _REBUILD_TENSOR and len(arguments) == 6:
        storage, offset, size, stride, requires_grad, hooks = arguments
        if (
            type(storage) is StorageDescription
            and type(offset) is int
            and _is_int_tuple(size)
            and _is_int_tuple(stride)
            and len(size) == len(stride)
            and type(requires_grad) is bool
            and type(hooks) is _Hooks
        ):
            return TensorDescription(storage, offset, size, stride)
    raise PromptEmbedsError("the pickle rebuilds a tensor in an unknown way")


def _is_int_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(item) is int for item in value)
