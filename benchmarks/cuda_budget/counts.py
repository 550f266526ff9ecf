"""What a warp does on a way through the machine code: instructions, wavefronts in L1, special functions, waits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from . import machine
from .accesses import accesses_of, address_of
from .path import DOUBLE, Way
from .sass import Instruction

_SPECIAL = ("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO")
_SHARED = ("LDS", "STS", "ATOMS", "SHFL")


def strides(instructions: Iterable[Instruction]) -> dict[int, int]:
    """Bytes between neighbouring threads' accesses: as many as a thread's own adjacent ones span together."""
    groups: dict[tuple[str, int, bool], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for one in instructions:
        place = address_of(one)
        if one.is_global and place:
            groups[place[0], one.width, one.is_global_load][place[1]].append(one.address)
    result: dict[int, int] = {}
    for (_, width, _), offsets in groups.items():
        runs: list[list[int]] = []
        for offset in sorted(offsets):
            if runs and offset == runs[-1][-1] + width:
                runs[-1].append(offset)
            else:
                runs.append([offset])
        for run in runs:
            for offset in run:
                for address in offsets[offset]:
                    result[address] = len(run) * width
    return result


@dataclass
class Counts:
    """Of one warp; of one pass unless said otherwise."""

    instructions: float = 0
    wavefronts: float = 0
    special: float = 0
    double: float = 0
    cycles: float = 0  # that the warp takes alone
    barriers: int = 0
    divisions: int = 0  # reciprocals, of integers as well, and calls of subroutines
    local: int = 0  # accesses to local memory
    in_flight: int = 0  # most bytes of tensors that one thread has under way
    loads: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # by width in bits
    stores: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, one: Instruction, share: float, stride: int, executed: bool) -> None:
        self.instructions += share
        self.divisions += one.opcode.startswith("MUFU.RCP") or one.base == "CALL"
        if one.base in _SPECIAL:
            self.special += share
        elif one.base in DOUBLE:
            self.double += share
        elif one.base == "BAR":
            self.barriers += 1
        elif one.base in ("LDL", "STL") and executed:
            self.local += 1
        elif one.base in _SHARED:
            self.wavefronts += share * (one.width if one.base != "SHFL" else 4) * 32 / machine.L1_WAVEFRONT
        if one.is_global and executed:
            (self.loads if one.is_global_load else self.stores)[8 * one.width] += share
            lines = 32 * max(stride, one.width) / machine.L1_WAVEFRONT
            self.wavefronts += share * min(32.0, max(1.0, lines))


def latency(one: Instruction, width: int, first: bool) -> float:
    if one.is_global:
        if one.width != width:
            return machine.L1_LATENCY
        return machine.MEMORY_LATENCY if first else machine.L2_LATENCY
    return machine.L2_LATENCY if one.base in ("LDL", "ATOMG", "RED") else machine.SHORT_LATENCY


def simulate(
    instructions: list[Instruction], width: int, skipped: set[int], first: int, passes: int = 1
) -> tuple[float, int]:
    """Cycles that one warp alone takes for the last of some passes, and the most loads of tensors under way.

    Of each pass, the first so many loads are from device memory, those after them from a cache.
    """
    now, start, most = 0.0, 0.0, 0
    ready = [0.0] * 6
    under_way: list[float] = []
    for _ in range(passes):
        start, loaded = now, 0
        for one in instructions:
            for board in range(6):
                if one.waits >> board & 1:
                    now = max(now, ready[board])
            executed = one.address not in skipped
            done = now + (latency(one, width, loaded < first) if executed else 0)
            loaded += one.is_global_load and one.width == width and executed
            if one.sets is not None:
                ready[one.sets] = max(ready[one.sets], done)
            if one.reads is not None:
                ready[one.reads] = max(ready[one.reads], now + machine.SHORT_LATENCY)
            if one.is_global_load and one.width == width and executed:
                under_way = [end for end in under_way if end > now] + [done]
                most = max(most, len(under_way))
            now += max(1, one.stall)
    return now - start, most


def counts_of(way: Way, trips: float, tensors: int) -> Counts:
    """Of a pass over the way, in which each inner sweep takes `trips` vectors a thread.

    `tensors`: how many it reads from device memory; what it loads after them was loaded before.
    """
    whole = [one for step in way.steps for one in step.instructions]
    counts, skipped = Counts(), set(way.never)
    for step in way.steps:
        skipped |= accesses_of(step.instructions, way.width, way.never).fallback
    stride = strides(one for one in whole if one.address not in skipped)
    parts: list[tuple[int | None, int, list[Instruction]]] = []
    for step in way.steps:
        share = 1.0 if step.loop is None else max(1.0, trips / step.unrolled)
        for one in step.instructions:
            counts.add(one, share, stride.get(one.address, 0), one.address not in skipped)
        if parts and parts[-1][0] == step.loop:
            parts[-1][2].extend(step.instructions)
        else:
            parts.append((step.loop, step.unrolled, list(step.instructions)))
    flat = len(parts) == 1 and way.loop is not None
    seen = 0.0  # tensors that the parts so far have loaded
    for loop, unrolled, instructions in parts:
        taken = unrolled if loop is not None else way.vectors
        first = max(0, round((tensors - seen) * taken))
        seen += (
            sum(one.is_global_load and one.width == way.width and one.address not in skipped for one in instructions)
            / taken
        )
        again = max(1.0, trips / unrolled) if loop is not None else 1.0
        cycles, most = simulate(instructions, way.width, skipped, first, passes=2 if flat or again > 1 else 1)
        counts.cycles += cycles * again
        counts.in_flight = max(counts.in_flight, most * way.width)
    return counts
