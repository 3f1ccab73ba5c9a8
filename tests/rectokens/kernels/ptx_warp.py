"""A warp in NumPy: just the PTX instructions that the warp kernels' text uses."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

LANES = np.arange(32)
U32, U64, F16, F32, F64 = np.uint32, np.uint64, np.float16, np.float32, np.float64
SHARED = {"centroids": 0, "sums": 512, "exchanged": 1024}
SHARED_BYTES = 1024 + (1 << 15)


def halves(x):
    """(32, 2) fp16: the low half first."""
    return np.ascontiguousarray(x, U32).view(F16).reshape(32, 2)


def brains(x):
    """(32, 2) fp32 of a bf16 pair: the low half first."""
    return np.stack([x << U32(16), x & U32(0xFFFF0000)], 1).view(F32)


def pair(low, high):
    with np.errstate(over="ignore"):
        return np.stack([low, high], 1).astype(F16).view(U32)[:, 0]


def brain_pair(values):
    bits = np.ascontiguousarray(values, F32).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return rounded[:, 0] | rounded[:, 1] << U32(16)


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


def mma(a, b, plus, kind, wide):
    """m16n8k16, m16n8k8: fragments as the PTX manual lays them out over lanes."""
    parts = halves if kind == "f16" else brains
    group, thread = LANES >> 2, LANES & 3
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for i, fragment in enumerate(a):
        for p in (0, 1):
            left[group + 8 * (i & 1), 2 * thread + p + 8 * (i >> 1)] = parts(fragment)[:, p]
    for i, fragment in enumerate(b):
        for p in (0, 1):
            right[2 * thread + p + 8 * i, group] = parts(fragment)[:, p]
    with np.errstate(invalid="ignore", over="ignore"):
        product = left @ right
    places = [(group + 8 * (i >> 1), 2 * thread + (i & 1)) for i in range(4)]
    if wide:
        with np.errstate(over="ignore", invalid="ignore"):
            sums = [product[place] + c.view(F32) for place, c in zip(places, plus, strict=True)]
            return [s.astype(F32).view(U32) for s in sums]
    added = np.stack([halves(c) for c in plus], 1).reshape(32, 4).astype(F64)
    sums = [product[place] + added[:, i] for i, place in enumerate(places)]
    return [pair(sums[0], sums[1]), pair(sums[2], sums[3])]


def rounded_up(exact):
    near = exact.astype(F32)
    return np.where(near < exact, np.nextafter(near, F32(np.inf)), near)


def least_magnitude(a, b):
    sign = np.signbit(a) ^ np.signbit(b)
    least = np.minimum(np.abs(a), np.abs(b))
    return np.where(sign, -least, least)


def pairwise(function, result="f16"):
    def run(*values):
        with np.errstate(over="ignore", invalid="ignore"):
            out = function(*(halves(value).astype(F64) for value in values))
        if result == "mask":
            both = np.where(out, np.uint16(0xFFFF), np.uint16(0))
            return np.ascontiguousarray(both).view(U32)[:, 0]
        return pair(out[:, 0], out[:, 1])

    return run


def floats(function):
    def run(*values):
        with np.errstate(all="ignore"):
            return function(*(value.view(F32) for value in values)).astype(F32).view(U32)

    return run


OPERATIONS = {
    "mov.b32": lambda a: a, "mov.u32": lambda a: a,
    "not.b32": lambda a: ~a, "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b, "shl.b32": lambda a, b: a << b, "shr.b32": lambda a, b: a >> b,
    "sub.s32": lambda a, b: a - b, "sub.u32": lambda a, b: a - b, "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b, "rem.u32": lambda a, b: a % b,
    "max.u32": np.maximum, "min.u32": np.minimum,
    "max.u16x2": lambda a, b: np.maximum(a.view(np.uint16), b.view(np.uint16)).view(U32),
    "prmt.b32": prmt, "lop3.b32": lambda a, b, c, t: lop3(a, b, c, int(t[0])),
    "popc.b32": lambda a: np.array([int(x).bit_count() for x in a], U32),
    "mul.f32": floats(lambda a, b: a * b), "add.f32": floats(lambda a, b: a + b),
    "fma.rn.f32": floats(lambda a, b, c: a.astype(F64) * b.astype(F64) + c.astype(F64)),
    "fma.rp.f32": floats(
        lambda a, b, c: rounded_up(a.astype(np.longdouble) * b.astype(np.longdouble) + c)
    ),
    "min.xorsign.abs.f32": floats(least_magnitude),
    "sqrt.rn.f32": floats(np.sqrt), "rsqrt.approx.f32": floats(lambda a: 1 / np.sqrt(a)),
    "cvt.f32.f16": lambda a: a.view(F16).astype(F32).view(U32),
    "cvt.rn.f16x2.f32": lambda high, low: pair(low.view(F32), high.view(F32)),
    "add.rn.f16x2": pairwise(lambda a, b: a + b), "sub.rn.f16x2": pairwise(lambda a, b: a - b),
    "mul.rn.f16x2": pairwise(lambda a, b: a * b), "neg.f16x2": pairwise(lambda a: -a),
    "min.xorsign.abs.f16x2": pairwise(least_magnitude),
    "fma.rn.f16x2": pairwise(lambda a, b, c: a * b + c), "abs.f16x2": pairwise(np.abs),
    "set.le.u32.f16x2": pairwise(lambda a, b: a <= b, "mask"),
    "set.gt.u32.f16x2": pairwise(lambda a, b: a > b, "mask"),
    "set.gt.f16x2.f16x2": pairwise(lambda a, b: (a > b).astype(F64)),
    "mul.rn.bf16x2": lambda a, b: brain_pair(brains(a) * brains(b)),
    "redux.sync.max.u32": lambda a, _: np.full(32, a.max(), U32),
}  # fmt: skip
COMPARISONS = {
    "setp.ne.u32": np.not_equal, "setp.eq.u32": np.equal,
    "setp.gt.f32": np.greater, "setp.lt.and.f32": np.less,
}  # fmt: skip


class Warp:
    """Registers of 32 lanes, and the memory that they see.

    `memory`: bytes, global addresses being places in it; `shared`: those of shared memory.
    `operands`: of the numbered inputs, each (32,) uint32, uint64 or float32.
    """

    def __init__(
        self, memory: np.ndarray, shared: np.ndarray, operands: dict[int, np.ndarray], number: int
    ) -> None:
        self.memory = {"global": memory, "shared": shared}
        self.registers = {f"${place}": value for place, value in operands.items()}
        self.registers["%tid.x"] = (LANES + 32 * number).astype(U32)
        self.registers |= {name: np.full(32, place, U32) for name, place in SHARED.items()}

    def get(self, name, kind=U32):
        if name in self.registers:
            value = self.registers[name]
            return value if kind is None or value.dtype == kind else value.view(kind)
        if name.startswith("0f"):
            return np.full(32, int(name[2:], 16), U32)
        return np.full(32, int(name, 0) & 0xFFFFFFFF, U32).view(kind or U32)

    def move_pairs(self, groups):
        """`mov` between registers and halves of registers."""
        if len(groups[0]) == 2:
            parts = np.ascontiguousarray(self.get(groups[1][0])).view(np.uint16).reshape(32, 2)
            for name, column in zip(groups[0], parts.T, strict=True):
                self.registers[name] = column.copy()
        else:
            both = [self.registers[name] for name in groups[1]]
            self.registers[groups[0][0]] = np.stack(both, 1).view(U32)[:, 0]

    def access(self, opcode, groups, active):
        """Loads and stores; a vector's elements follow each other."""
        width = {"u8": 1, "u16": 2, "b16": 2, "b32": 4}[opcode.rpartition(".")[2]]
        memory = self.memory[opcode.split(".")[1]]
        load = opcode.startswith("ld")
        values, (address,) = groups if load else groups[::-1]
        base, _, offset = address.strip("[]").partition("+")
        base = self.registers[base].astype(np.int64) + int(offset or 0)
        assert (base[active] % (width * len(values)) == 0).all(), "not aligned"
        for number, name in enumerate(values):
            places = base[active, None] + number * width + np.arange(width)
            if load:
                loaded = np.zeros((32, 4), np.uint8)
                loaded[active, :width] = memory[places]
                loaded = loaded.view(U32)[:, 0]
                is_half = name.startswith("h")
                self.registers[name] = loaded.astype(np.uint16) if is_half else loaded
            else:
                stored = np.ascontiguousarray(self.get(name)).view(np.uint8).reshape(32, 4)
                memory[places] = stored[active, :width]

    def step(self, opcode, groups, active):
        """One instruction; `active` lanes for stores, all for the rest."""
        names = [group[0] for group in groups]
        out, sources = names[0], names[1:]
        if opcode in ("mov.b32",) and max(map(len, groups)) == 2:
            self.move_pairs(groups)
        elif opcode.startswith(("ld.", "st.")):
            self.access(opcode, groups, active)
        elif opcode.startswith("mma."):
            a, b, c = ([self.get(name) for name in group] for group in groups[1:])
            wide = len(groups[0]) == 4
            kind = opcode.split(".")[7]
            for name, value in zip(groups[0], mma(a, b, c, kind, wide), strict=True):
                self.registers[name] = value
        elif opcode == "shfl.sync.bfly.b32":
            self.registers[out] = self.get(sources[0])[LANES ^ int(sources[1])]
        elif opcode in COMPARISONS:
            kind = F32 if opcode.endswith("f32") else U32
            a, b = (self.get(name).view(kind) for name in sources[:2])
            result = COMPARISONS[opcode](a, b)
            self.registers[out] = (
                result & self.registers[sources[2]] if ".and." in opcode else result
            )
        elif opcode == "selp.b32":
            yes, no = self.get(sources[0]), self.get(sources[1])
            self.registers[out] = np.where(self.registers[sources[2]], yes, no)
        elif opcode == "mul.wide.u32":
            a, b = (self.get(name).astype(U64) for name in sources)
            self.registers[out] = a * b
        elif opcode == "add.s64":
            self.registers[out] = self.get(sources[0], U64) + self.get(sources[1], U64)
        else:
            values = [self.get(name, None) for name in sources]
            values = [value if value.dtype != F32 else value.view(U32) for value in values]
            self.registers[out] = OPERATIONS[opcode](*values).astype(U32)

    def run(self, text: str) -> Iterator[None]:
        """Execute the text, pausing at barriers; branches are the whole warp's."""
        lines = text.strip().removeprefix("{").removesuffix("}").strip().splitlines()
        place = 0
        while place < len(lines):
            line = lines[place].strip()
            place += 1
            if line.startswith((".reg", ".shared", "bar.warp")) or line.endswith(":"):
                continue
            active = np.ones(32, bool)
            if line.startswith("@"):
                predicate, line = line[1:].split(" ", 1)
                active = self.registers[predicate]
            opcode, _, rest = line.rstrip(";").partition(" ")
            if opcode == "bar.sync":
                yield
                continue
            if opcode == "bra":
                assert active.all() or not active.any(), "a branch that divides the warp"
                if active.all():
                    place = lines.index(f"{rest}:")
                continue
            groups = [
                [name.strip() for name in part.strip("{} ").split(",")]
                for part in re.findall(r"\{[^}]*\}|[^,{}]+", rest)
                if part.strip()
            ]
            self.step(opcode, groups, active)


def run(text: str, memory: np.ndarray, operands: dict[int, np.ndarray], warps: int = 1) -> None:
    """Execute the text in so many warps, each up to the next barrier in turn."""
    shared = np.full(SHARED_BYTES, 0x5A, np.uint8)
    running = [Warp(memory, shared, operands, number).run(text) for number in range(warps)]
    while running:
        # Another order each time: a result must not hang on it.
        running = [warp for warp in running[::-1] if next(warp, running) is not running]
