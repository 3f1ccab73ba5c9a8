"""How the warp kernels hold a row: slices, blocks, teams of warps, and the levels of a transform.

A row is slices of 256 numbers. A lane of a warp holds eight numbers of a slice, as four pairs. A
block (see `rectokens._turboquant.codec`) is a run of slices, and every warp of a team has an equal
run of every block.
"""

from __future__ import annotations

from dataclasses import dataclass

PAIRS = 4
SLICE = 256
# Pairs whose signs are in one register.
PAIRS_OF_A_SIGN_WORD = 16
MAX_SLICES = 32
MAX_ROW = 16384
MAX_BLOCKS = 16


@dataclass(frozen=True)
class RowShape:
    """How a row of `dim` numbers in blocks of `block` is held by `team` warps.

    All slices counted here are those of one warp: equal runs of every block.
    """

    dim: int
    block: int
    team: int = 1

    @property
    def slices(self) -> int:
        """Slices that a warp holds."""
        return self.dim // SLICE // self.team

    @property
    def sign_words(self) -> int:
        """Registers that hold a lane's signs of a round."""
        return -(-self.slices * PAIRS // PAIRS_OF_A_SIGN_WORD)

    @property
    def slices_per_block(self) -> int:
        """Slices of a block that a warp holds, a power of two."""
        return self.block // SLICE // self.team

    @property
    def num_blocks(self) -> int:
        """Blocks of a row."""
        return self.dim // self.block

    @property
    def levels(self) -> list[int]:
        """Distances of the slices that the levels of a transform combine within a warp."""
        return [1 << bit for bit in range(self.slices_per_block.bit_length() - 1)]

    @property
    def exchanged(self) -> int:
        """Slices of a block that one warp has for another when warps exchange."""
        return self.slices_per_block // self.team

    @property
    def levels_of_the_team(self) -> list[int]:
        """The same distances of what comes from other warps, after an exchange."""
        return [self.exchanged << bit for bit in range(self.team.bit_length() - 1)]

    def place(self, index: int) -> int:
        """Slice of the row that the first warp's slice is; other warps' are further by a run."""
        block, inner = divmod(index, self.slices_per_block)
        return block * self.slices_per_block * self.team + inner

    def exchanged_place(self, index: int) -> int:
        """The same after an exchange; other warps' are further by `exchanged`."""
        block, inner = divmod(index, self.slices_per_block)
        warp, rest = divmod(inner, self.exchanged)
        return (block * self.team + warp) * self.slices_per_block + rest


def fits(dim: int, block: int, team: int = 1) -> bool:
    """Whether a team of so many warps can hold such rows."""
    slices, rest = divmod(block, SLICE * team)
    return (
        rest == 0
        and slices >= team
        and 2 * SLICE <= dim // team <= MAX_SLICES * SLICE
        and dim <= MAX_ROW
        and dim // block <= MAX_BLOCKS
    )


@dataclass(frozen=True)
class Layout:
    """Which elements a lane holds: `run` adjacent ones, 8 or 4, of each `32 * run`."""

    run: int

    def element(self, lane: int, pair: int) -> int:
        """Place in a slice of the first number of a lane's pair."""
        per_run = self.run // 2
        return pair // per_run * 32 * self.run + lane * self.run + pair % per_run * 2


# 16 bytes of bf16 or fp16 a lane, 16 bytes of fp32 a lane.
ENCODE_LAYOUT = Layout(8)
DECODE_LAYOUT = Layout(4)


Fused = tuple[int, int, int, int]


@dataclass(frozen=True)
class Levels:
    """Which levels between slices are whose, by their distances.

    `products`: what the four products take along. The others come after the first round's: `own`
    of a warp's slices, then, after an exchange, those of the `team`. After the permutation the
    second round begins with all levels that are a warp's by then, `again`, and ends, after the
    exchange back, with the team's, `last`.
    """

    products: tuple[list[int], list[int], list[int], list[int]]
    own: list[int]
    team: list[int]
    again: list[int]
    last: list[int]

    @staticmethod
    def of(shape: RowShape, fused: Fused) -> Levels:
        """Let the products take so many levels each, while there are any."""
        own, team = shape.levels, shape.levels_of_the_team
        again, last = shape.levels, shape.levels_of_the_team
        late = again if shape.team == 1 else last

        def take(levels: list[int], count: int) -> list[int]:
            taken, levels[:] = levels[:count], levels[count:]
            return taken

        # The outer products first: they take levels along at no cost in rounding.
        first, fourth = take(own, fused[0]), take(late, fused[3])
        second, third = take(own, fused[1]), take(late, fused[2])
        return Levels((first, second, third, fourth), own, team, again, last)
