"""The main loop: the way through a loop on which a thread moves the vectors that the case says it moves.

A loop has many ways through it: vectors that are not aligned, ragged ends, tensors that are absent, slow cases of a
division.  A case says which tensors a kernel reads and writes in each of its sweeps.  Of all ways that move just those,
the longest is taken that neither calls a subroutine nor enters a loop over single elements, since a large, aligned call
breaks off nowhere.  Loops inside are gone through once, the cheaper one where nvcc made several of one, and an unrolled
one counts by the vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .accesses import accesses_of
from .flow import Flow, Loop, dominators
from .sass import Instruction

Moves = tuple[int, int]  # vectors loaded and stored
MOST = 48  # vectors that a way may load or store
SWEEP = 1e7  # what counts for a way that goes over a row in a loop, not in the few vectors at an end of it
AVOIDED = 1000  # what an instruction counts against a way that calls a subroutine, goes over single elements, or
# calculates in double, as no kernel for narrower numbers does but for a row whose squares leave the range
DOUBLE = ("DADD", "DFMA", "DMUL", "DSETP")
Chain = tuple  # (chain before or None, block) or (chain before, (chain of an inner loop, loop, unrolled))


@dataclass
class Step:
    """A block on the way."""

    instructions: list[Instruction]
    loop: int | None = None  # the inner loop that is a sweep, which it belongs to
    unrolled: int = 1  # vectors of each tensor that this loop takes in a pass


@dataclass
class Way:
    steps: list[Step]
    vectors: int  # for each tensor, in one pass
    sweeps: tuple[Moves, ...]
    width: int  # bytes of its accesses to tensors
    loop: Loop | None
    never: set[int]  # addresses of instructions on the way that do not run
    before: list[Instruction]  # on the shortest way from the kernel's start, and to its end
    after: list[Instruction]


def vectors_moved(moved: Moves, sweep: Moves, exactly: bool) -> int | None:
    """How many vectors of each tensor; loads may be more if need be, where weights are loaded in vectors as well."""
    (loads, stores), (read, written) = moved, sweep
    if written:
        count = stores // written
        fits = loads == read * count if exactly else loads >= read * count
        return count if count and stores % written == 0 and fits else None
    if stores or loads < read or (exactly and loads % read):
        return None
    if exactly:
        return loads // read
    count = 1
    while 2 * count * read <= loads:
        count *= 2
    return count


class Search:
    """All ways through a kernel's loops, for accesses of one width."""

    def __init__(
        self,
        flow: Flow,
        sweeps: tuple[Moves, ...],
        width: int,
        inner: Moves | None = None,
        parts: tuple[Moves, ...] = (),
        split: bool = False,
        exactly: bool = True,
    ) -> None:
        self.flow, self.sweeps, self.width, self.inner = flow, sweeps, width, inner
        self.split, self.exactly, self.parts = split, exactly, parts
        self.accesses = [accesses_of(block.instructions, width, flow.never) for block in flow.blocks]
        self.events = [list(self.events_of(i)) for i in range(len(flow.blocks))]
        self.wide = [any(event != "join" for event in events) for events in self.events]
        self.above, self.ends = dominators(flow.blocks), self.ends_of_kernel()
        self.gains = self.gains_of_blocks()
        self.tables: dict[int, dict[Moves, tuple[float, Chain]]] = {}

    def gains_of_blocks(self) -> list[float]:
        """What each block adds to a way's worth: its instructions, unless it is to be avoided."""
        gains: list[float] = []
        for block in self.flow.blocks:
            gains.append(len(block.instructions) * (-AVOIDED if avoided(block.instructions) else 1))
        if self.split:  # whole vectors if there is a choice
            gains = [gain - AVOIDED * len(found.split) for gain, found in zip(gains, self.accesses)]
        for loop in self.flow.loops:
            body = [self.flow.blocks[i].instructions for i in loop.body]
            if not any(self.wide[i] for i in loop.body) and any(one.is_global for part in body for one in part):
                for i in loop.body | self.only_before(loop):
                    gains[i] = -AVOIDED * len(self.flow.blocks[i].instructions)
        return gains

    def only_before(self, loop: Loop) -> set[int]:
        """The block that decides whether a loop is entered at all, if a whole call can do without it."""
        above = [b for b in self.above[loop.header] - loop.body if len(self.flow.blocks[b].next) > 1]
        if not above:
            return set()
        last = max(above, key=lambda block: len(self.above[block]))
        pending = [i for i, wide in enumerate(self.wide) if wide and i != last]
        reached = set(pending)
        while pending:
            for successor in self.flow.blocks[pending.pop()].next:
                if successor != last and successor not in reached:
                    reached.add(successor)
                    pending.append(successor)
        return {last} if reached & self.ends else set()

    def gain(self, block: int, sign: int) -> float:
        return self.gains[block] if self.gains[block] < 0 else sign * self.gains[block]

    def events_of(self, block: int) -> Iterator[str]:
        found = self.accesses[block]
        moving = {**found.moved, **found.split} if self.split else found.moved
        for one in self.flow.blocks[block].instructions:
            if one.address in moving:
                yield moving[one.address]
            elif one.joins_threads:
                yield "join"

    def collapsed(self, loop: int | None) -> dict[int, int]:
        """Inner loops that touch tensors, by their first block."""
        inner = self.flow.children(loop)
        return {
            self.flow.loops[i].header: i for i in inner if any(self.wide[block] for block in self.flow.loops[i].body)
        }

    def options(self, loop: int) -> list[tuple[Moves, float, Chain]]:
        """What an inner loop may move, as it is and by the vector if it is unrolled; its cost and way."""
        found: list[tuple[Moves, float, Chain]] = []
        for moved, (_, chain) in self.table(loop).items():
            steps = self.steps(chain)
            size = sum(length(step.instructions) for step in steps)
            sought = 0 if any(avoided(step.instructions) for step in steps) else SWEEP
            for sweep in (*self.sweeps, *self.parts):
                if count := vectors_moved(moved, sweep, self.exactly):
                    found.append((sweep, sought - AVOIDED * size / count, (chain, loop, count)))
            if self.inner and (count := vectors_moved(moved, self.inner, self.exactly)):
                found.append((self.inner, -AVOIDED * size / count, (chain, None, count)))
            found.append((moved, -AVOIDED * size, (chain, None, 1)))
        return found

    def table(self, loop: int) -> dict[Moves, tuple[float, Chain]]:
        """The way through a loop for each number of loads and stores; none where threads join in between."""
        if loop not in self.tables:
            self.tables[loop] = {}
            ends = self.walk(self.flow.loops[loop], loop, joins=False)
            for (_, loads, stores, _), (worth, chain) in ends.items():
                if loads or stores:
                    self.tables[loop][loads, stores] = (worth, chain)
        return self.tables[loop]

    def step(self, state: tuple[int, int, int, int], events: list[str], joins: bool) -> tuple | None:
        """The state after a block: sweep, loads and stores in it, vectors of a finished sweep."""
        at, loads, stores, count = state
        for event in events:
            if event == "load":
                loads += 1
            elif event == "store":
                stores += 1
            elif loads or stores:
                if joins and len(self.sweeps) == 1:
                    continue
                finished = self.finish((at, loads, stores, count)) if joins else None
                if finished is None:
                    return None
                at, loads, stores, count = finished
        return (at, loads, stores, count) if loads <= MOST and stores <= MOST else None

    def finish(self, state: tuple[int, int, int, int]) -> tuple[int, int, int, int] | None:
        at, loads, stores, count = state
        if at >= len(self.sweeps):
            return None
        now = vectors_moved((loads, stores), self.sweeps[at], self.exactly)
        if now is None or (at > 0 and now != count):
            return None
        return at + 1, 0, 0, now

    def order(self, region: set[int], edges: dict[int, list[int]], start: int) -> list[int]:
        result: list[int] = []
        seen = {start}
        stack = [(start, iter(edges[start]))]
        while stack:
            at, rest = stack[-1]
            for successor in rest:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(edges[successor])))
                    break
            else:
                result.append(at)
                stack.pop()
        return result[::-1]

    def walk(self, region: Loop | None, index: int | None, joins: bool, sign: int = 1) -> dict:
        """States at the end of a loop's pass, or of the kernel, each by the longest way; with sign -1 the shortest."""
        blocks, loops = self.flow.blocks, self.flow.loops
        body = region.body if region else set(range(len(blocks)))
        start = region.header if region else 0
        inner = self.collapsed(index)
        edges = {block: self.forward(block, body) for block in body}
        for header, i in inner.items():
            edges[header] = [target for target in self.exits(loops[i]) if target in body and target != start]
        states: dict[int, dict] = {start: {(0, 0, 0, 0): (0.0, None)}}
        ends: dict = {}
        for at in self.order(body, edges, start):
            arriving = states.get(at, {})
            leaving: dict = {}
            for state, (cost, chain) in arriving.items():
                if at in inner:
                    for (loads, stores), more, way in self.options(inner[at]):
                        after = (state[0], state[1] + loads, state[2] + stores, state[3])
                        if after[1] <= MOST and after[2] <= MOST:
                            self.offer(leaving, after, cost + more, (chain, way))
                    self.offer(leaving, state, cost, chain)  # or not at all
                else:
                    moved = self.step(state, self.events[at], joins)
                    if moved is not None:
                        self.offer(leaving, moved, cost + self.gain(at, sign), (chain, at))
            latches = at in region.latches if region else not blocks[at].next
            if region and at in inner:
                latches = bool(region.latches & loops[inner[at]].body) or start in self.exits(loops[inner[at]])
            if latches:
                for state, (cost, chain) in leaving.items():
                    self.offer(ends, state, cost, chain)
            for successor in edges[at]:
                target = states.setdefault(successor, {})
                for state, (cost, chain) in leaving.items():
                    self.offer(target, state, cost, chain)
        return ends

    @staticmethod
    def offer(table: dict, state: tuple, worth: float, chain: Chain | None) -> None:
        if state not in table or worth > table[state][0]:
            table[state] = (worth, chain)

    def forward(self, block: int, body: set[int]) -> list[int]:
        """Successors without ways back; the end of a loop leads on to where the loop ends."""
        found: list[int] = []
        for successor in self.flow.blocks[block].next:
            closing = [loop for loop in self.flow.loops if loop.header == successor and block in loop.latches]
            if not closing:
                found.append(successor)
            elif closing[0].body < body:
                found += [t for t in self.flow.blocks[successor].next if t not in closing[0].body]
        return [successor for successor in found if successor in body]

    def exits(self, loop: Loop) -> list[int]:
        return list(dict.fromkeys(t for b in sorted(loop.body) for t in self.flow.blocks[b].next if t not in loop.body))

    def ends_of_kernel(self) -> set[int]:
        """Blocks at whose end a thread may be done."""
        last = [(i, block.instructions[-1]) for i, block in enumerate(self.flow.blocks)]
        return {i for i, one in last if one.base == "EXIT" and one.address not in self.flow.never}

    def best(self, index: int | None) -> tuple[int, Chain] | None:
        """The way that does what the sweeps say; its vectors."""
        around = self.best_of(index, -1)  # sweeps in loops, and about them what a row costs at least
        if around and any(step.loop is not None for step in self.steps(around[1])):
            return around
        return self.best_of(index, 1)

    def best_of(self, index: int | None, sign: int) -> tuple[int, Chain] | None:
        found: list[tuple[tuple[int, float], int, Chain]] = []
        region = None if index is None else self.flow.loops[index]
        for state, (worth, chain) in self.walk(region, index, True, sign).items():
            if state[0] < len(self.sweeps):
                finished = self.finish(state)
                if finished is None:
                    continue
                state = finished
            elif state[1] or state[2]:
                continue
            if state[0] == len(self.sweeps):
                whole = state[3] if region is None or sign > 0 else 1  # vectors that a large call does not leave out
                found.append(((whole, worth / state[3]), state[3], chain))
        best = max(found, key=lambda entry: entry[0], default=None)
        return best and best[1:]

    def steps(self, chain: Chain | None, loop: int | None = None, unrolled: int = 1) -> list[Step]:
        """The blocks on a way, those of inner loops among them."""
        result: list[list[Step]] = []
        while chain is not None:
            chain, at = chain
            if isinstance(at, int):
                result.append([Step(self.flow.blocks[at].instructions, loop, unrolled)])
            else:
                inner, number, count = at
                result.append(self.steps(inner, number if loop is None else loop, count * unrolled))
        return [step for part in reversed(result) for step in part]

    def way(self, index: int | None) -> tuple[float, Way] | None:
        """The way through one loop, or the kernel; its instructions by the vector."""
        found = self.best(index)
        if found is None:
            return None
        vectors, chain = found
        steps = self.steps(chain)
        cost = sum(length(step.instructions) / step.unrolled for step in steps) / vectors
        loop = None if index is None else self.flow.loops[index]
        before, after = [], []
        if loop:
            before = shortest(self.flow, 0, {loop.header}) or []
            ways = [shortest(self.flow, block, self.ends, whole=True) for block in self.exits(loop)]
            after = min((way for way in ways if way is not None), key=length, default=[])
        return cost, Way(steps, vectors, self.sweeps, self.width, loop, self.flow.never, before, after)


def avoided(instructions: list[Instruction]) -> bool:
    return any(one.base == "CALL" or one.base in DOUBLE for one in instructions)


def length(instructions: list[Instruction]) -> int:
    return len(instructions) * (AVOIDED if avoided(instructions) else 1)


def shortest(flow: Flow, start: int, ends: set[int], whole: bool = False) -> list[Instruction] | None:
    """The instructions of the blocks on the shortest way, without, or `whole` with, the one that it leads to."""
    best: dict[int, tuple[int, int | None]] = {start: (0, None)}
    pending = {start}
    while pending:
        at = min(pending, key=lambda block: best[block][0])
        pending.remove(at)
        if at in ends:
            way: list[int] = [at] if whole else []
            back: int | None = best[at][1]
            while back is not None:
                way.append(back)
                back = best[back][1]
            return [one for block in reversed(way) for one in flow.blocks[block].instructions]
        cost = best[at][0] + length(flow.blocks[at].instructions)
        for successor in flow.blocks[at].next:
            if successor not in best or cost < best[successor][0]:
                best[successor] = (cost, at)
                pending.add(successor)
    return None


def main_loop(
    flow: Flow,
    alternatives: Sequence[tuple[Moves, ...]],
    inner: Moves | None = None,
    parts: tuple[Moves, ...] = (),
    widths: Sequence[int] = (16, 8, 4, 2),
) -> Way | None:
    """The way that moves the first of these lists of sweeps that there is, in the widest accesses that do.

    `inner`: what a loop within the work on a vector moves, if nvcc unrolls it.  `parts`: what loops over a row move
    that are one sweep together, since threads do not join in between.
    """
    for width in widths:
        for sweeps in alternatives:
            for split, exactly in ((False, True), (True, True), (False, False)):
                search = Search(flow, sweeps, width, inner, parts, split, exactly)
                if not any(search.wide):
                    continue
                found = [way for index in range(len(flow.loops)) if (way := search.way(index))]
                if not found and (whole := search.way(None)):
                    found = [whole]
                if found:
                    return min(found, key=lambda entry: entry[0])[1]
    return None
