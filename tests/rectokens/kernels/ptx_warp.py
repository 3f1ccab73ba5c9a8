"""A warp in NumPy: just the PTX instructions that the warp kernels' text uses."""

from __future__ import annotations

import re

import numpy as np

LANES = np.arange(32)
U32, U64, F16, F32 = np.uint32, np.uint64, np.float16, np.float32


def halves(x):
    """(32, 2) fp16: the low half first."""
    return np.ascontiguousarray(x, U32).view(F16).reshape(32, 2)


def pair(low, high):
    return np.stack([low, high], 1).astype(F16).view(U32)[:, 0]


def lop3(a, b, c, table):
    out = np.zeros(32, U32)
    for bit in range(8):
        if table >> bit & 1:
            out |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return out


def prmt(a, b, selector):
    source = np.stack([a, b], 1).astype("<u4").view(np.uint8).reshape(32, 8)
    out = np.zeros((32, 4), np.uint8)
    for byte in range(4):
        chosen = selector >> U32(4 * byte) & U32(15)
        assert (chosen < 8).all(), "replicated signs are not used"
        out[:, byte] = source[LANES, chosen]
    return out.view("<u4")[:, 0]


def mma(a, b):
    """m16n8k16 in fp16: fragments as the PTX manual lays them out over lanes."""
    group, thread = LANES >> 2, LANES & 3
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for i, fragment in enumerate(a):
        for p in (0, 1):
            left[group + 8 * (i & 1), 2 * thread + p + 8 * (i >> 1)] = halves(fragment)[:, p]
    for i, fragment in enumerate(b):
        for p in (0, 1):
            right[2 * thread + p + 8 * i, group] = halves(fragment)[:, p]
    product = (left @ right).astype(F16)
    return [pair(product[group + 8 * i, 2 * thread], product[group + 8 * i, 2 * thread + 1])
            for i in (0, 1)]  # fmt: skip


def run(text: str, operands: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Execute the text on 32 lanes.

    Args:
        operands: of the numbered inputs, each (32,) uint32, uint64 or float32.

    Returns:
        All numbered operands, outputs among them.
    """
    memory = {f"${number}": value for number, value in operands.items()}
    memory["%laneid"] = LANES.astype(U32)

    def get(name, kind=U32):
        if name in memory:
            value = memory[name]
            return value if kind is None or value.dtype == kind else value.view(kind)
        return np.full(32, int(name, 0), U32).view(kind or U32)

    for line in text.strip().strip("{}").strip().splitlines():
        if line.startswith(".reg"):
            continue
        opcode, _, rest = line.rstrip(";").partition(" ")
        groups = [
            part.strip("{} ").split(", ") for part in re.findall(r"\{[^}]*\}|[^,{}]+", rest)
            if part.strip()
        ]  # fmt: skip
        names = [group[0] for group in groups]
        out, sources = names[0], names[1:]
        if opcode == "mov.b32" and len(groups[0]) == 2:
            for name, column in zip(groups[0], halves(get(sources[0])).T, strict=True):
                memory[name] = column.copy()
            continue
        if opcode == "mov.b64":
            if len(groups[0]) == 2:
                both = np.ascontiguousarray(get(sources[0], U64)).view(U32).reshape(32, 2)
                memory[groups[0][0]], memory[groups[0][1]] = both[:, 0].copy(), both[:, 1].copy()
            else:
                both = np.stack([get(n) for n in groups[1]], 1)
                memory[out] = both.view(U64)[:, 0]
            continue
        if opcode.startswith("mma."):
            a, b, c = ([get(name) for name in group] for group in groups[1:])
            assert not any(value.any() for value in c)
            memory.update(zip(groups[0], mma(a, b), strict=True))
            continue
        if opcode == "cvt.f32.f16":
            memory[out] = memory[sources[0]].astype(F32).view(U32)
        elif opcode == "cvt.rn.f16x2.f32":
            high, low = (get(name, F32) for name in sources)
            memory[out] = pair(low, high)
        elif opcode == "mul.f32":
            memory[out] = (get(sources[0], F32) * get(sources[1], F32)).view(U32)
        elif opcode.endswith("f16x2"):
            values = [halves(get(name)) for name in sources]
            name = opcode.partition(".")[0] if not opcode.startswith("set") else opcode[:6]
            result = {
                "add": lambda v: v[0] + v[1], "sub": lambda v: v[0] - v[1],
                "abs": lambda v: np.abs(v[0]), "set.le": lambda v: v[0] <= v[1],
                "set.gt": lambda v: v[0] > v[1],
            }[name](values)  # fmt: skip
            if result.dtype == np.bool_:
                result = np.where(result, np.uint16(0xFFFF), np.uint16(0)).view(F16)
            memory[out] = np.ascontiguousarray(result).view(U32)[:, 0]
        else:
            values = [get(name) for name in sources]
            memory[out] = {
                "mov": lambda a: a, "not": lambda a: ~a, "and": lambda a, b: a & b,
                "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "shl": lambda a, b: a << b,
                "shr": lambda a, b: a >> b, "sub": lambda a, b: a - b, "prmt": prmt,
                "popc": lambda a: np.array([int(x).bit_count() for x in a], U32),
                "lop3": lambda a, b, c, t: lop3(a, b, c, int(t[0])),
            }[opcode.partition(".")[0]](*values).astype(U32)  # fmt: skip
    return {int(name[1:]): value for name, value in memory.items() if name.startswith("$")}
