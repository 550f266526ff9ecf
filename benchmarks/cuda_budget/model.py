"""How long a kernel takes, from its machine code and its launch: the largest of six bounds.

    memory        bytes from and to device memory / 4.3 TB/s
    L2            those, and what later sweeps over a row load again that L1 does not hold / 5.5 TB/s
    instructions  those of all warps / (132 SMs x 4 schedulers x 1.755 GHz x 0.6)
    L1            wavefronts of 128 bytes, one a cycle of an SM; accesses that lie apart cost more of them
    special       exponentials, reciprocals, conversions: 16 lanes a cycle of an SM; operations on doubles: 64
    latency       rounds of resident warps, each as long as one warp takes alone: its instructions and their waits

A kernel's own bound is what share of a copy's rate its main loop keeps up with where the grid fills the GPU: the time
for its bytes alone / the largest of the six.  A prediction adds what the shape adds: blocks that do not fill the last
round, tensors that L2 still holds, small kernels, 2.5 us a launch.  Constants and their sources: machine.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from . import machine
from .cases import Case, Kernel
from .constants import Evaluator, decide
from .counts import Counts, counts_of, simulate
from .flow import Flow, flow_of
from .path import Way, main_loop
from .recorder import Launch
from .sass import Instruction
from .sass import Kernel as Code

TARGET = 0.85  # of a copy
SIXTEEN = 16


class Unread(Exception):
    """The case's words about a kernel do not fit its machine code."""


@dataclass
class Reading:
    """One launch of one kernel."""

    case: Case
    stated: Kernel
    launch: Launch
    code: Code
    ways: list[Way] = field(default_factory=list)  # one, or one for each sweep
    counts: list[Counts] = field(default_factory=list)
    resident: int = 0  # blocks on an SM
    thread: Counts = field(default_factory=Counts)  # a warp's, from its start to its end
    passes: float = 0.0  # over the ways, by a warp
    portion: float = 1.0  # of the call's work, where launches of one kernel share it

    @property
    def warps_of_row(self) -> int:
        """Of a block, that work on one row."""
        return min(self.warps, self.all_warps_of_row)

    @property
    def all_warps_of_row(self) -> int:
        """One pass a warp, if the grid is as large as that; if not, blocks go on to other rows, all warps together."""
        rows = self.tensor_bytes / max(1, self.case.row * self.case.element_bytes)
        share = round(self.launch.grid * self.warps / rows)
        together = any(one.base == "BAR" for one in self.code.instructions)
        return share or (self.warps if together else 1)

    @property
    def held(self) -> float:
        """Of a row, what a later sweep finds in registers and shared memory."""
        threads = 32 * self.warps_of_row
        there = threads * self.stated.held + self.launch.shared * threads / self.launch.block
        row = self.case.row * self.case.element_bytes * self.stated.moves[0]
        return min(1.0, there / row) if self.stated.held and row else 0.0

    @property
    def tensor_bytes(self) -> float:
        return self.case.tensor_bytes * self.portion

    @property
    def warps(self) -> int:
        return -(-self.launch.block // 32)

    @property
    def bytes(self) -> float:
        return sum(self.stated.moves) * self.tensor_bytes

    @property
    def issued(self) -> dict[str, float]:
        """Cycles of an SM for one warp, by what bounds it; memory is that of its share of the bytes."""
        warps = self.launch.grid * self.warps
        one = self.thread
        again, from_memory = reloaded(self)
        return {
            "memory": (self.bytes + from_memory) / warps / machine.BYTES_A_CYCLE,
            "L2": (self.bytes + again) / warps / machine.BYTES_A_CYCLE * machine.BANDWIDTH / machine.L2_BANDWIDTH,
            "instructions": one.instructions / machine.SCHEDULERS / machine.ISSUE,
            "L1": one.wavefronts,
            "special": one.special * 32 / machine.SPECIAL_LANES + one.double * 32 / machine.DOUBLE_LANES,
            "latency": one.cycles / max(1, self.resident * self.warps),
        }

    @property
    def bound(self) -> str:
        return max(self.issued, key=lambda name: self.issued[name])

    @property
    def share(self) -> float:
        copy = self.bytes / self.launch.grid / self.warps / machine.BYTES_A_CYCLE
        return copy / max(self.issued.values())

    @property
    def instructions_a_vector(self) -> float:
        """For each 16 bytes from or to device memory."""
        total = self.thread.instructions * 32 * self.launch.grid * self.warps
        return total / (self.bytes / SIXTEEN)

    @property
    def in_flight(self) -> int:
        """Bytes that an SM's threads have under way."""
        return max(c.in_flight for c in self.counts) * self.launch.block * self.resident

    @property
    def most(self) -> float:
        """The share of a copy that the formula's own instructions allow."""
        if not self.stated.floor or not self.stated.needs:
            return 1.0
        warps = self.tensor_bytes / self.case.element_bytes / 32  # of one element each
        floor = self.stated.needs * warps / machine.SCHEDULERS / machine.ISSUE
        return min(1.0, self.bytes / machine.BYTES_A_CYCLE / floor)

    @property
    def passed(self) -> bool:
        return self.share >= TARGET * self.most

    def seconds(self, held: float) -> float:
        """Of this launch, its bytes less those that L2 holds."""
        cycles = {name: value * self.warps for name, value in self.issued.items()}
        blocks = math.ceil(self.launch.grid / machine.SMS)  # of the busiest SM
        rounds = math.ceil(self.launch.grid / (machine.SMS * max(1, self.resident)))
        busiest = max(cycles[name] for name in ("instructions", "L1", "special")) * blocks
        again, from_memory = reloaded(self)
        memory = (self.bytes + from_memory - held) / machine.BANDWIDTH
        return max(
            memory,
            (self.bytes + again) / machine.L2_BANDWIDTH,
            max(busiest, self.thread.cycles * rounds) / machine.CLOCK,
        )


def length_of(instructions: list[Instruction]) -> tuple[int, float]:
    return len(instructions), simulate(instructions, 0, set(), 0)[0]


def find_ways(stated: Kernel, flow: Flow, element_bytes: int, held: bool) -> list[Way]:
    """The whole, or the sweeps one by one where they are loops of their own in other loops.

    Of a row that is held, a later sweep loads nothing, if the case knows such a way.
    """
    widths = (16, 8, 2, 4) if element_bytes == 2 else (16, 8, 4)
    ways = [sweeps for sweeps in stated.sweeps if len(sweeps) > 1 and not any(read for read, _ in sweeps[1:])]
    alternatives = ways if held and ways else stated.sweeps
    if not stated.times and (whole := main_loop(flow, alternatives, stated.inner, stated.parts, widths)):
        return [whole]
    for sweeps in alternatives:
        found = [main_loop(flow, [(sweep,)], stated.inner, widths=widths) for sweep in sweeps]
        if all(found):
            return [way for way in found if way]
    return []


def reloaded(reading: Reading) -> tuple[float, float]:
    """Bytes of later sweeps over rows that come from L2, and from device memory, since caches hold not all of them."""
    case, stated = reading.case, reading.stated
    loads = sum(way.sweeps[i][0] * time for way, i, time in sweeps_of(reading)) - stated.moves[0]
    of_block = case.row * case.element_bytes * stated.moves[0] or reading.tensor_bytes
    of_sm = (1 - reading.held) * of_block * reading.resident * reading.warps // reading.all_warps_of_row
    of_all = min(of_sm * machine.SMS, reading.tensor_bytes * stated.moves[0])
    l1 = min(machine.L1, machine.L1_AND_SHARED - reading.launch.shared * reading.resident)
    if loads <= 0 or of_sm <= l1:
        return 0.0, 0.0
    again = (1 - reading.held) * loads * reading.tensor_bytes
    return again, again * max(0.0, 1 - machine.L2 / of_all)


def sweeps_of(reading: Reading) -> list[tuple[Way, int, int]]:
    """Way, number of the sweep in it, and how often it is made."""
    times = reading.stated.times
    if len(reading.ways) == 1:
        return [(reading.ways[0], i, 1) for i in range(len(reading.ways[0].sweeps))]
    return [(way, 0, times[i] if times else 1) for i, way in enumerate(reading.ways)]


def read(case: Case, stated: Kernel, launch: Launch, code: Code, portion: float = 1.0) -> Reading:
    reading = Reading(case, stated, launch, code, portion=portion)
    reading.resident = machine.resident_blocks(launch.block, code.registers, code.shared + launch.shared)
    evaluator = Evaluator(code, launch.parameters, launch.sizes)
    flow = flow_of(code, lambda blocks: decide(blocks, evaluator))
    reading.ways = find_ways(stated, flow, case.element_bytes, reading.held == 1)
    if not reading.ways:
        raise Unread(f"no way through {code.name} moves what the case says: {stated.sweeps}")
    total = reading.thread
    before, after = length_of(reading.ways[0].before), length_of(reading.ways[0].after)
    total.instructions, total.cycles = float(before[0] + after[0]), before[1] + after[1]
    warps = launch.grid * reading.warps
    for number, way in enumerate(reading.ways):
        swept = any(step.loop is not None for step in way.steps)
        units = reading.tensor_bytes / way.width  # of one tensor
        rows = reading.tensor_bytes / (case.row * case.element_bytes) if case.row else 0.0
        passes, trips = units / (32 * way.vectors * warps), 1.0
        if rows <= warps:  # a pass for each row, though part of its lanes be idle
            passes = max(passes, rows * reading.warps_of_row / warps)
        if swept:
            row = max(1.0, case.row * case.element_bytes / way.width)
            of_row = reading.warps_of_row
            trips = row / (32 * of_row)
            passes = units / row * of_row / warps
        if stated.times:
            passes *= stated.times[number]
        counts = counts_of(way, trips, stated.moves[0])
        reading.counts.append(counts)
        reading.passes = passes
        for name in ("instructions", "wavefronts", "special", "double", "cycles"):
            setattr(total, name, getattr(total, name) + passes * getattr(counts, name))
    return reading


@dataclass
class Prediction:
    case: Case
    readings: list[Reading]
    small: int  # launches of kernels that move no tensors
    seconds: float
    held: float  # bytes that L2 saves

    @property
    def copy_seconds(self) -> float:
        return self.case.tensors * self.case.tensor_bytes / machine.BANDWIDTH

    @property
    def share(self) -> float:
        return self.copy_seconds / self.seconds


def held_in_l2(reading: Reading) -> float:
    """Of tensors that the kernel before has touched, what L2 still holds: all that fits, if it begins at that end."""
    again = reading.stated.again * reading.tensor_bytes
    if again <= machine.L2:
        return float(again)
    return float(machine.L2) if reading.stated.backwards else 0.0


def predict(case: Case, readings: list[Reading], rounds: list[int]) -> Prediction:
    """A call: its kernels one after the other, and what lies between them."""
    held = sum(held_in_l2(reading) for reading in readings)
    seconds = sum(reading.seconds(held_in_l2(reading)) for reading in readings)
    seconds += sum(rounds) * machine.L2_LATENCY / machine.CLOCK
    seconds += machine.LAUNCH * (len(readings) + len(rounds))
    return Prediction(case, readings, len(rounds), seconds, held)
