"""The zip container of `torch.save`, read strictly: only its directory is looked at.

Only what PyTorch writes is accepted (members stored one after the other, then the directory, then
its end record, nothing else), so there is one way to read an archive and no way to hide a second.
"""

import re
import struct
from collections.abc import Mapping

from rectokens._prompt_embeds.errors import PromptEmbedsError, PromptEmbedsTooLargeError

_END = struct.Struct("<4s4H2LH")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_WIDE_END = struct.Struct("<4sQ2H2L4Q4sLQL")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ENTRY_SIGNATURE = b"PK\x01\x02"
_END_SIGNATURE = b"PK\x05\x06"
# Bit 3: sizes follow the data; bit 11: names are UTF-8. Bit 0 would be encryption.
_ALLOWED_FLAGS = 0x0808
_MAX_MEMBERS = 16
_MAX_NAME_BYTES = 160
_MEMBER_NAMES = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/\d{1,4}"
)
_MAX_SMALL_MEMBER = {
    "data.pkl": 4096,
    "version": 16,
    "byteorder": 16,
    ".format_version": 16,
    ".storage_alignment": 16,
    ".data/serialization_id": 128,
}


def read_members(archive: bytes, *, max_bytes: int) -> Mapping[str, memoryview]:
    """Members of a `torch.save` archive by their name below the root folder, as views.

    Args:
        archive: the whole file.
        max_bytes: most bytes the members may hold together.

    Raises:
        PromptEmbedsError: not the zip container that `torch.save` writes.
        PromptEmbedsTooLargeError: members add up to more than `max_bytes`.
    """
    if archive[:4] != _LOCAL_SIGNATURE:
        raise PromptEmbedsError(
            "the bytes are not a zip archive as torch.save writes it (legacy pickles are refused)"
        )
    entries, directory_start = _directory(archive)
    total = sum(size for _, _, size in entries)
    if total > max_bytes:
        raise PromptEmbedsTooLargeError(
            f"the archive's members add up to {total} bytes, allowed are {max_bytes}"
        )
    return _views(archive, entries, directory_start)


def _directory(archive: bytes) -> tuple[list[tuple[bytes, int, int]], int]:
    """Entries (name, offset of the local header, size) and where the directory starts."""
    if len(archive) < _END.size:
        raise PromptEmbedsError("the zip archive is cut short")
    end = len(archive) - _END.size
    signature, disk, first_disk, here, count, size, start, comment = _END.unpack_from(archive, end)
    if signature != _END_SIGNATURE or disk or first_disk or comment or here != count:
        raise PromptEmbedsError("the zip archive does not end with a plain end record")
    if count > _MAX_MEMBERS:
        raise PromptEmbedsError(f"the zip archive has {count} members, allowed are {_MAX_MEMBERS}")
    directory_end = start + size
    if directory_end != end:
        _check_wide_end(archive, directory_end, end, (count, count, size, start))
    entries: list[tuple[bytes, int, int]] = []
    position = start
    for _ in range(count):
        if position + _ENTRY.size > directory_end:
            raise PromptEmbedsError("the zip directory is cut short")
        fields = _ENTRY.unpack_from(archive, position)
        flags, method, packed_size, plain_size = fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, offset = (*fields[10:13], fields[16])
        if fields[0] != _ENTRY_SIGNATURE:
            raise PromptEmbedsError("the zip directory is damaged")
        if method != 0 or packed_size != plain_size:
            raise PromptEmbedsError("the zip archive has a compressed member, which is refused")
        if flags & ~_ALLOWED_FLAGS:
            raise PromptEmbedsError(f"a zip member has flags {flags:#x}, which are refused")
        if extra_length or comment_length or name_length > _MAX_NAME_BYTES:
            raise PromptEmbedsError("a zip directory entry has more than a name of ordinary length")
        position += _ENTRY.size
        entries.append((archive[position : position + name_length], offset, plain_size))
        position += name_length
    if position != directory_end:
        raise PromptEmbedsError("the zip directory has bytes that belong to no member")
    return entries, start


def _check_wide_end(
    archive: bytes, directory_end: int, end: int, plain: tuple[int, int, int, int]
) -> None:
    """PyTorch also writes 64-bit end records before the plain one: they must say the same."""
    if directory_end + _WIDE_END.size != end:
        raise PromptEmbedsError("the zip directory does not lie before the end record")
    fields = _WIDE_END.unpack_from(archive, directory_end)
    record, locator = fields[:10], fields[10:]
    if (
        record[0] != b"PK\x06\x06"
        or record[4:6] != (0, 0)
        or record[6:10] != plain
        or locator != (b"PK\x06\x07", 0, directory_end, 1)
    ):
        raise PromptEmbedsError(
            "the 64-bit end record of the zip archive contradicts the plain one"
        )


def _views(
    archive: bytes, entries: list[tuple[bytes, int, int]], directory_start: int
) -> dict[str, memoryview]:
    view = memoryview(archive)
    members: dict[str, memoryview] = {}
    roots: set[bytes] = set()
    free_from = 0
    for name, offset, size in entries:
        if offset < free_from or offset + _LOCAL.size > directory_start:
            raise PromptEmbedsError("zip members overlap or lie outside the archive")
        local = _LOCAL.unpack_from(archive, offset)
        name_start = offset + _LOCAL.size
        data_start = name_start + local[9] + local[10]
        if (
            local[0] != _LOCAL_SIGNATURE
            or local[3] != 0
            or archive[name_start : name_start + local[9]] != name
        ):
            raise PromptEmbedsError("a zip member contradicts the directory")
        if data_start + size > directory_start:
            raise PromptEmbedsError("zip members overlap or lie outside the archive")
        free_from = data_start + size
        root, _, below = name.partition(b"/")
        roots.add(root)
        key = below.decode("ascii", "replace")
        if not root or len(roots) > 1 or not _MEMBER_NAMES.fullmatch(key):
            raise PromptEmbedsError(f"the archive has a member torch.save would not write: {key!r}")
        if key in members:
            raise PromptEmbedsError(f"the archive has two members named {key!r}")
        if size > _MAX_SMALL_MEMBER.get(key, size):
            raise PromptEmbedsError(
                f"member {key!r} has {size} bytes, allowed are {_MAX_SMALL_MEMBER[key]}"
            )
        members[key] = view[data_start : data_start + size]
    for required in ("data.pkl", "version"):
        if required not in members:
            raise PromptEmbedsError(f"the archive has no member {required!r}")
    if bytes(members.get("byteorder", b"little")) != b"little":
        raise PromptEmbedsError("the archive's byte order is not little endian")
    return members
