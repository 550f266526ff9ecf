"""Basic blocks and natural loops of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .sass import Instruction, Kernel


@dataclass
class Block:
    first: int
    instructions: list[Instruction]
    next: list[int] = field(default_factory=list)  # indices of blocks


@dataclass
class Loop:
    header: int
    latches: set[int]
    body: set[int]  # of blocks, header included
    parent: int | None = None  # index of the loop around it


@dataclass
class Flow:
    blocks: list[Block]
    loops: list[Loop]
    never: set[int] = field(default_factory=set)  # addresses of instructions whose predicate is known to be false

    def children(self, loop: int | None) -> list[int]:
        return [i for i, inner in enumerate(self.loops) if inner.parent == loop]


def split(kernel: Kernel) -> list[Block]:
    code = kernel.instructions
    leaders = {0, *(at for at in kernel.labels.values() if at < len(code))}
    ends = ("BRA", "BRX", "EXIT", "RET", "JMP", "BSYNC")
    leaders |= {i + 1 for i, one in enumerate(code) if one.base in ends and i + 1 < len(code)}
    starts = sorted(leaders)
    number = {start: i for i, start in enumerate(starts)}
    blocks = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(code)
        block = Block(start, code[start:end])
        last = block.instructions[-1]
        if last.base in ("BRA", "BRX", "JMP") and "DIV" not in last.opcode:
            block.next += [number[kernel.labels[t]] for t in last.targets if kernel.labels.get(t, end + 1) in number]
        unconditional = last.base in ("BRA", "BRX", "EXIT", "RET", "JMP") and not is_conditional(last)
        if not unconditional and end < len(code):
            block.next.append(i + 1)
        block.next = list(dict.fromkeys(block.next))
        blocks.append(block)
    return blocks


def is_conditional(branch: Instruction) -> bool:
    """Whether the instruction after it may be next: a predicate before it, or among its operands."""
    operands = branch.text.split(" ", 1)[1] if " " in branch.text else ""
    before_target = operands.split("`")[0]
    inner = any(part.strip(" !").startswith(("P", "UP")) for part in before_target.split(",") if "PT" not in part)
    return bool(branch.predicate) or inner or "DIV" in branch.opcode


def dominators(blocks: list[Block]) -> list[set[int]]:
    """For each block, the blocks that every way to it passes; empty for what cannot be reached."""
    order: list[int] = []
    seen: set[int] = set()
    stack = [(0, iter(blocks[0].next))]
    seen.add(0)
    while stack:
        at, rest = stack[-1]
        for successor in rest:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(blocks[successor].next)))
                break
        else:
            order.append(at)
            stack.pop()
    order.reverse()
    before: dict[int, list[int]] = {i: [] for i in seen}
    for i in seen:
        for successor in blocks[i].next:
            before[successor].append(i)
    result: list[set[int]] = [set() for _ in blocks]
    everything = set(seen)
    for i in seen:
        result[i] = {0} if i == 0 else set(everything)
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            new = set.intersection(*(result[p] for p in before[i])) | {i}
            if new != result[i]:
                result[i], changed = new, True
    return result


def flow_of(kernel: Kernel, decide: Callable[[list[Block]], set[int]] | None = None) -> Flow:
    """`decide` may take branches away, and says which instructions never run."""
    blocks = split(kernel)
    never = decide(blocks) if decide else set()
    above = dominators(blocks)
    before: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        for successor in block.next:
            if above[i]:
                before.setdefault(successor, []).append(i)
    loops: dict[int, Loop] = {}
    for i, block in enumerate(blocks):
        for header in block.next:
            if header not in above[i]:
                continue
            loop = loops.setdefault(header, Loop(header, set(), {header}))
            loop.latches.add(i)
            pending = [i]
            while pending:
                at = pending.pop()
                if at not in loop.body:
                    loop.body.add(at)
                    pending += before.get(at, [])
    found = sorted(loops.values(), key=lambda loop: len(loop.body))
    for i, loop in enumerate(found):
        loop.parent = next((j for j in range(i + 1, len(found)) if loop.body < found[j].body), None)
    return Flow(blocks, found, never)
