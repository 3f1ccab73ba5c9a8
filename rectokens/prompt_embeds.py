"""Prompt embeddings on the wire: base64 of `torch.save`, plain or TurboQuant.

Used by the server, the proxy and the vLLM plugin alike. Loading treats the bytes as hostile: checks
run from cheap to dear, nothing is unpickled, and no memory is spent on data before its description
has passed every check. `docs/turboquant.md` lists what is refused.
"""

import base64
import binascii
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rectokens._prompt_embeds.archive import read_members
from rectokens._prompt_embeds.description import TensorDescription, describe
from rectokens._prompt_embeds.errors import PromptEmbedsError, PromptEmbedsTooLargeError
from rectokens._prompt_embeds.tensors import build, check_dense, check_members_used
from rectokens.turboquant import (
    BLOCK_CODEC,
    DEFAULT_CODEC,
    TurboQuantPayload,
    packed_dim,
    quantizer_for,
)

__all__ = [
    "PromptEmbedsError",
    "PromptEmbedsTooLargeError",
    "dump_payload",
    "dump_tensor",
    "load_payload",
    "load_prompt_embeds",
    "load_prompt_embeds_list",
]


def _text_by_base64(data: memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


_base64_text: Callable[[memoryview], str]
try:
    import pybase64

    # Of the extra `server`: the same characters in a twentieth of the time.
    _base64_text = pybase64.b64encode_as_string
except ImportError:
    _base64_text = _text_by_base64

_PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BITS = (1, 2, 4, 8)
_KEYS = frozenset(("packed", "norms", "bits", "d"))


def dump_payload(
    packed: Tensor, norms: Tensor, bits: int, d: int, codec: str = DEFAULT_CODEC
) -> str:
    """A compressed prompt as the text of a `prompt_embeds` field.

    Args:
        packed: uint8 `(num_tokens, packed_dim(d, bits))`, on any device.
        norms: float32 `(num_tokens,)`.
        bits: bits an element: 1, 2, 4 or 8.
        d: hidden size.
        codec: what encoded it, `DEFAULT_CODEC` or `BLOCK_CODEC`.

    Returns:
        Base64 of `torch.save` of a `TurboQuantPayload`.

    Raises:
        ValueError: arguments that no decoder would accept.
    """
    quantizer_for(d, bits, codec)
    width = packed_dim(d, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != width:
        raise ValueError(
            f"packed must be uint8 of shape (num_tokens, {width}), got {packed.dtype} "
            f"{tuple(packed.shape)}"
        )
    if norms.dtype != torch.float32 or norms.shape != packed.shape[:1]:
        raise ValueError(
            f"norms must be float32 of shape ({packed.shape[0]},), got {norms.dtype} "
            f"{tuple(norms.shape)}"
        )
    payload: TurboQuantPayload = {
        "packed": _own_memory(packed),
        "norms": _own_memory(norms),
        "bits": bits,
        "d": d,
        "codec": codec,
    }
    return _dump(payload)


def dump_tensor(x: Tensor) -> str:
    """Plain embeddings `(num_tokens, hidden_size)` as the text of a `prompt_embeds` field.

    Raises:
        ValueError: not a two-dimensional float32, float16 or bfloat16 tensor.
    """
    if x.dtype not in _PLAIN_DTYPES or x.dim() != 2:
        raise ValueError(
            f"x must be float32, float16 or bfloat16 of shape (num_tokens, hidden_size), got "
            f"{x.dtype} {tuple(x.shape)}"
        )
    return _dump(_own_memory(x))


def _own_memory(x: Tensor) -> Tensor:
    # torch.save writes the whole storage: a view would carry more than itself.
    x = x.detach().cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _dump(value: object) -> str:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return _base64_text(buffer.getbuffer())


def load_prompt_embeds(
    data: str | bytes,
    *,
    hidden_size: int,
    max_tokens: int,
    max_bytes: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The dense embeddings in a `prompt_embeds` field.

    Args:
        data: base64 of `torch.save` of a tensor or of a `TurboQuantPayload`; hostile until checked.
        hidden_size: of the model that will read them.
        max_tokens: most tokens accepted.
        max_bytes: most bytes accepted, after base64.
        device: where the embeddings shall be; compressed ones are decoded there.

    Returns:
        `(num_tokens, hidden_size)` on `device`, finite, with 1 to `max_tokens` rows: float32 for a
        compressed payload, else the dtype that was sent (float32, float16 or bfloat16).

    Raises:
        PromptEmbedsTooLargeError: more bytes or tokens than allowed.
        PromptEmbedsError: anything else that is wrong with `data`.
    """
    members, value = _read(data, max_bytes)
    if isinstance(value, TensorDescription):
        return _load_plain(value, members, hidden_size, max_tokens).to(device)
    return _load_compressed(value, members, hidden_size, max_tokens, torch.device(device))


def load_payload(
    data: str | bytes, *, hidden_size: int, max_tokens: int, max_bytes: int
) -> Tensor | None:
    """The embeddings in a compressed `prompt_embeds` field; None for a plain tensor.

    For programs that have a loader of their own for plain tensors. Of these the container, the
    pickle and the storage have then passed the checks of `load_prompt_embeds`; type, shape and
    values are left to that loader.

    Args:
        data: base64 of `torch.save` of a tensor or of a `TurboQuantPayload`; hostile until checked.
        hidden_size: of the model that will read them.
        max_tokens: most tokens accepted in a payload.
        max_bytes: most bytes accepted, after base64.

    Returns:
        Float32 `(num_tokens, hidden_size)` on the CPU, or None.

    Raises:
        PromptEmbedsTooLargeError: more bytes or tokens than allowed.
        PromptEmbedsError: anything else that is wrong with `data`.
    """
    members, value = _read(data, max_bytes)
    if isinstance(value, TensorDescription):
        check_dense("the embedding tensor", value, members)
        check_members_used({"embeddings": value}, members)
        return None
    return _load_compressed(value, members, hidden_size, max_tokens, torch.device("cpu"))


def _read(
    data: str | bytes, max_bytes: int
) -> tuple[Mapping[str, memoryview], TensorDescription | dict[str, Any]]:
    """The archive's members, and the description of the one value it may hold."""
    members = read_members(_decode_base64(data, max_bytes), max_bytes=max_bytes)
    value = describe(bytes(members["data.pkl"]))
    if isinstance(value, TensorDescription) or type(value) is dict:
        return members, value
    raise PromptEmbedsError("prompt_embeds must hold a tensor or a TurboQuant payload")


def load_prompt_embeds_list(
    data: Sequence[str | bytes],
    *,
    hidden_size: int,
    max_tokens: int,
    max_bytes: int,
    max_payloads: int,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Each of a list of `prompt_embeds` fields, as `load_prompt_embeds` gives it.

    `max_tokens` holds for each payload, `max_bytes` for all of them together.

    Raises:
        PromptEmbedsTooLargeError: more payloads, bytes or tokens than allowed.
        PromptEmbedsError: no payloads, or one that is not acceptable; the message has its position.
    """
    if not data:
        raise PromptEmbedsError("prompt_embeds is an empty list")
    if len(data) > max_payloads:
        raise PromptEmbedsTooLargeError(
            f"prompt_embeds has {len(data)} payloads, allowed are {max_payloads}"
        )
    total = sum(len(item) for item in data if isinstance(item, str | bytes))
    if total > _base64_length(max_bytes) + 4 * len(data):
        raise PromptEmbedsTooLargeError(
            f"prompt_embeds has {total} characters in all, which is over {max_bytes} bytes"
        )
    embeds: list[Tensor] = []
    for position, item in enumerate(data):
        try:
            embeds.append(
                load_prompt_embeds(
                    item,
                    hidden_size=hidden_size,
                    max_tokens=max_tokens,
                    max_bytes=max_bytes,
                    device=device,
                )
            )
        except PromptEmbedsError as error:
            raise type(error)(f"prompt_embeds[{position}]: {error}") from error
    return embeds


def _base64_length(num_bytes: int) -> int:
    return -(-num_bytes // 3) * 4


def _decode_base64(data: str | bytes, max_bytes: int) -> bytes:
    if not isinstance(data, str | bytes):
        raise PromptEmbedsError(f"prompt_embeds must be a base64 string, got {type(data).__name__}")
    if len(data) > _base64_length(max_bytes):
        raise PromptEmbedsTooLargeError(
            f"prompt_embeds has {len(data)} characters, allowed are {_base64_length(max_bytes)} "
            f"for {max_bytes} bytes"
        )
    try:
        decoded = binascii.a2b_base64(data, strict_mode=True)
    except ValueError as error:
        raise PromptEmbedsError(f"prompt_embeds is not strict base64: {error}") from error
    # The decoder ignores spare bits in the last character; the alphabet's rules want them zero.
    tail = data[-4:].encode() if isinstance(data, str) else data[-4:]
    if not decoded or base64.b64encode(decoded[-(len(decoded) % 3 or 3) :]) != tail:
        raise PromptEmbedsError("prompt_embeds is not strict base64: its end is not canonical")
    if len(decoded) > max_bytes:
        raise PromptEmbedsTooLargeError(
            f"prompt_embeds has {len(decoded)} bytes, allowed are {max_bytes}"
        )
    return decoded


def _check_num_tokens(num_tokens: int, max_tokens: int) -> None:
    if num_tokens == 0:
        raise PromptEmbedsError("prompt_embeds holds no tokens")
    if num_tokens > max_tokens:
        raise PromptEmbedsTooLargeError(
            f"prompt_embeds has {num_tokens} tokens, allowed are {max_tokens}"
        )


def _load_plain(
    tensor: TensorDescription,
    members: Mapping[str, memoryview],
    hidden_size: int,
    max_tokens: int,
) -> Tensor:
    if tensor.storage.dtype not in _PLAIN_DTYPES:
        raise PromptEmbedsError(
            f"embeddings are {tensor.storage.dtype}, allowed are float32, float16 and bfloat16"
        )
    if len(tensor.size) != 2 or tensor.size[1] != hidden_size:
        raise PromptEmbedsError(
            f"embeddings have shape {_shape(tensor)}, expected (num_tokens, {hidden_size})"
        )
    check_dense("the embedding tensor", tensor, members)
    _check_num_tokens(tensor.size[0], max_tokens)
    check_members_used({"embeddings": tensor}, members)
    embeds = build(tensor, members)
    if not bool(torch.isfinite(embeds).all()):
        raise PromptEmbedsError("embeddings hold NaN or infinity")
    return embeds


def _load_compressed(
    payload: dict[str, Any],
    members: Mapping[str, memoryview],
    hidden_size: int,
    max_tokens: int,
    device: torch.device,
) -> Tensor:
    bits, codec = _check_fields(payload, hidden_size)
    packed, norms = payload["packed"], payload["norms"]
    if type(packed) is not TensorDescription or type(norms) is not TensorDescription:
        raise PromptEmbedsError("packed and norms must be tensors")
    width = packed_dim(hidden_size, bits)
    if packed.storage.dtype != torch.uint8 or len(packed.size) != 2 or packed.size[1] != width:
        raise PromptEmbedsError(
            f"packed is {packed.storage.dtype} of shape {_shape(packed)}, expected uint8 "
            f"(num_tokens, {width})"
        )
    if norms.storage.dtype != torch.float32 or norms.size != packed.size[:1]:
        raise PromptEmbedsError(
            f"norms is {norms.storage.dtype} of shape {_shape(norms)}, expected float32 "
            f"{tuple(packed.size[:1])}"
        )
    check_dense("packed", packed, members)
    check_dense("norms", norms, members)
    _check_num_tokens(packed.size[0], max_tokens)
    check_members_used({"packed": packed, "norms": norms}, members)
    norms_values = build(norms, members)
    if not bool((torch.isfinite(norms_values) & (norms_values >= 0)).all()):
        raise PromptEmbedsError("norms must be finite and not negative")
    embeds = quantizer_for(hidden_size, bits, codec).decode(
        build(packed, members).to(device), norms_values.to(device)
    )
    if not bool(torch.isfinite(embeds).all()):
        raise PromptEmbedsError("norms are so large that the decoded embeddings overflow float32")
    return embeds


def _check_fields(payload: dict[str, Any], hidden_size: int) -> tuple[int, str]:
    """Bits and codec of a payload whose keys, ints and codec are in order."""
    if payload.keys() - {"codec"} != _KEYS:
        found = ", ".join(sorted(key[:40] for key in payload)[:8])
        raise PromptEmbedsError(
            f"a TurboQuant payload has the keys {', '.join(sorted(_KEYS))} and codec, got {found}"
        )
    bits, d, codec = payload["bits"], payload["d"], payload.get("codec", DEFAULT_CODEC)
    if type(bits) is not int or type(d) is not int:
        raise PromptEmbedsError("bits and d must be plain ints")
    if bits not in _BITS:
        raise PromptEmbedsError(f"bits is {bits}, allowed are {_BITS}")
    if d != hidden_size:
        raise PromptEmbedsError(f"d is {d}, the model's hidden size is {hidden_size}")
    if type(codec) is not str or codec not in (DEFAULT_CODEC, BLOCK_CODEC):
        found = repr(codec[:80]) if type(codec) is str else type(codec).__name__
        raise PromptEmbedsError(
            f"codec is {found}, allowed are {DEFAULT_CODEC!r} and {BLOCK_CODEC!r}"
        )
    try:
        quantizer_for(d, bits, codec)
    except ValueError as error:
        raise PromptEmbedsError(f"codec {codec!r} cannot hold d = {d}: {error}") from error
    return bits, codec


def _shape(tensor: TensorDescription) -> str:
    shown = ", ".join(str(extent) for extent in tensor.size[:4])
    return f"({shown}{', ...' if len(tensor.size) > 4 else ''})"
