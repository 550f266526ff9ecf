"""Branches that a call's arguments decide: absent tensors, one cotangent, aligned pointers.

A kernel's parameters lie in constant memory from 0x210 on.  What is made of them alone is followed through moves,
comparisons and logic; a branch under a predicate that is known goes one way.  Everything else is unknown.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from .flow import Block
from .sass import Instruction, Kernel

PARAMETERS = 0x210
State = dict[str, int]  # registers and predicates whose value is known
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+|RZ)\]")
_REGISTER = re.compile(r"^U?R\d+$")
_PREDICATE = re.compile(r"^U?P\d$")
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "NE": lambda a, b: a != b, "EQ": lambda a, b: a == b, "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
}  # fmt: skip
MASK = 0xFFFFFFFF
EVERYTHING = [f"R{i}" for i in range(255)] + [f"P{i}" for i in range(7)]


def operands_of(one: Instruction) -> list[str]:
    rest = one.text.split(" ", 1)
    return [part.strip() for part in rest[1].split(",")] if len(rest) > 1 else []


def offset_of(text: str) -> int:
    return 0 if text == "RZ" else int(text, 16)


def after(register: str, count: int) -> list[str]:
    """A register and those that follow it."""
    found = re.match(r"(U?R)(\d+)$", register)
    return [f"{found[1]}{int(found[2]) + i}" for i in range(count)] if found else []


class Evaluator:
    """Follows known values through instructions."""

    def __init__(self, kernel: Kernel, parameters: bytes, sizes: tuple[int, ...]) -> None:
        memory = bytearray(PARAMETERS + len(parameters) + 16)
        memory[0:24] = struct.pack("<6I", *sizes)
        memory[PARAMETERS : PARAMETERS + len(parameters)] = parameters
        self.memory = bytes(memory)
        self.end = PARAMETERS + len(parameters)
        self.written = self.written_by_subroutines(kernel)

    def written_by_subroutines(self, kernel: Kernel) -> dict[str, list[str]]:
        """Registers that each subroutine may write; its code follows the kernel's own."""
        starts = sorted((at, label) for label, at in kernel.labels.items() if label.startswith("$"))
        ends = [at for at, _ in starts[1:]] + [len(kernel.instructions)]
        return {
            label: [name for one in kernel.instructions[at:end] for name in self.targets(one)]
            for (at, label), end in zip(starts, ends)
        }

    def word(self, offset: int) -> int | None:
        known = 0 <= offset <= 20 or PARAMETERS <= offset <= self.end - 4
        return struct.unpack_from("<I", self.memory, offset)[0] if known else None

    def value(self, operand: str, state: State) -> int | None:
        operand = operand.strip()
        if operand in ("RZ", "URZ"):
            return 0
        if operand in ("PT", "UPT"):
            return 1
        if operand in ("!PT", "!UPT"):
            return 0
        if operand.startswith("!"):
            inner = state.get(operand[1:])
            return None if inner is None else 1 - inner
        if found := _CONSTANT.fullmatch(operand):
            return self.word(offset_of(found[1]))
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return int(operand, 16) & MASK
        return state.get(operand)

    def step(self, one: Instruction, state: State) -> None:
        """Changes the state by one instruction."""
        guard = self.value(one.predicate, state) if one.predicate else 1
        if guard == 0:
            return
        results = self.results(one, state) if guard == 1 else {}
        for target in self.targets(one):
            state.pop(target, None)
        state.update({name: value for name, value in results.items() if value is not None})

    def targets(self, one: Instruction) -> list[str]:
        """What the instruction may write; more rather than less."""
        if one.base in ("STG", "ST", "STS", "STL", "BRA", "EXIT", "BAR", "BSSY", "BSYNC", "NOP", "WARPSYNC", "RED"):
            return []
        operands, found = operands_of(one), []
        wide = one.base[0] == "D" or any(part in one.opcode for part in ("WIDE", "F64", "U64", "S64", ".64"))
        count = one.width // 4 if one.base.startswith(("LD", "ATOM")) and one.width > 4 else 1
        if wide or one.base == "CS2R":
            count = max(count, 2)
        if "MMA" in one.opcode and one.base != "HFMA2":
            count = 4
        only_predicates = "SETP" in one.base or one.base in ("PLOP3", "UPLOP3", "FCHK")
        for operand in operands[:2] if only_predicates else operands[:3]:
            if _PREDICATE.match(operand):
                found.append(operand)
            elif operand not in ("PT", "UPT"):
                found += after(operand, count) if _REGISTER.match(operand) and not only_predicates else []
                break
        if one.base == "IADD3" or "LEA" in one.base or one.base == "LOP3":
            found += [operand for operand in operands[1:4] if _PREDICATE.match(operand)]
        if one.base == "CALL":
            called = re.search(r"\((\$\S+)\)", one.text)
            found += self.written.get(called[1], EVERYTHING) if called else EVERYTHING
        return found

    def results(self, one: Instruction, state: State) -> dict[str, int | None]:
        operands = operands_of(one)
        if one.base in ("LDC", "ULDC") and "U8" not in one.opcode and (found := _CONSTANT.fullmatch(operands[1])):
            names = after(operands[0], 2 if ".64" in one.opcode else 1)
            return {name: self.word(offset_of(found[1]) + 4 * i) for i, name in enumerate(names)}
        if one.base in ("LDC", "ULDC") and (found := _CONSTANT.fullmatch(operands[1])):
            offset = offset_of(found[1])
            return {operands[0]: self.memory[offset] if PARAMETERS <= offset < self.end else None}
        if one.base in ("MOV", "UMOV"):
            return {operands[0]: self.value(operands[1], state)}
        if one.base == "IMAD" and operands[1:3] == ["RZ", "RZ"] and "WIDE" not in one.opcode:
            return {operands[0]: self.value(operands[3], state)}
        if one.base == "CS2R" and operands[1] == "SRZ":
            return dict.fromkeys(after(operands[0], 1 if ".32" in one.opcode else 2), 0)
        if one.base == "R2UR":
            return {operands[0]: self.value(operands[-1], state)}
        if one.base in ("ISETP", "UISETP"):
            return {operands[0]: self.compare(one, operands, state)}
        if one.base in ("PLOP3", "UPLOP3") and operands[0] not in ("PT", "UPT"):
            return {operands[0]: self.table([self.value(o, state) for o in operands[2:5]], int(operands[5], 16))}
        if one.opcode in ("SHF.R.U32.HI", "USHF.R.U32.HI") and operands[1] in ("RZ", "URZ"):
            size, by = self.value(operands[3], state), self.value(operands[2], state)
            return {operands[0]: None if size is None or by is None else size >> by}
        if one.base in ("VIADD", "IADD3", "UIADD3") and "X" not in one.opcode.split("."):
            terms = [self.term(o, state) for o in operands[1:] if not _PREDICATE.match(o)]
            return {operands[0]: None if None in terms else sum(t for t in terms if t is not None) & MASK}
        if one.opcode == "IMAD.IADD" and operands[2] == "0x1":
            terms = [self.term(operands[1], state), self.term(operands[3], state)]
            return {operands[0]: None if None in terms else sum(t for t in terms if t is not None) & MASK}
        if one.base in ("LOP3", "ULOP3"):
            return self.logic(operands, state)
        return {}

    def term(self, operand: str, state: State) -> int | None:
        """Of a sum, where a register may be subtracted."""
        if re.match(r"-U?R", operand):
            value = self.value(operand[1:], state)
            return None if value is None else -value
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return int(operand, 16)
        return self.value(operand, state)

    def compare(self, one: Instruction, operands: list[str], state: State) -> int | None:
        a, b = self.value(operands[2], state), self.value(operands[3], state)
        parts = one.opcode.split(".")
        joined, decides = self.value(operands[4], state), 0 if "AND" in parts else 1
        if operands[4].lstrip("U") != "PT" and joined in (decides, None):  # with what is known of another comparison
            return joined
        if a is None or b is None or parts[1] not in _COMPARE:
            return None
        if "U32" not in parts:
            a, b = (n - 2**32 if n >> 31 else n for n in (a, b))
        if "EX" not in parts:
            return int(_COMPARE[parts[1]](a, b))
        low = self.value(operands[5], state)
        if a != b:
            return int(_COMPARE[parts[1]](a, b))
        return low

    @staticmethod
    def table(inputs: list[int | None], table: int) -> int | None:
        """Logic of three predicates, where those that are unknown do not matter."""
        results = set()
        for case in range(8):
            bits = (case >> 2 & 1, case >> 1 & 1, case & 1)
            if all(known is None or known == bit for known, bit in zip(inputs, bits)):
                results.add(table >> case & 1)
        return results.pop() if len(results) == 1 else None

    def logic(self, operands: list[str], state: State) -> dict[str, int | None]:
        predicate = operands[0] if _PREDICATE.match(operands[0]) else None
        rest = operands[1:] if predicate or operands[0] in ("PT", "UPT") else operands
        values = [self.value(o, state) for o in rest[1:4]]
        table = int(rest[4], 16)
        word: int | None = 0
        for bit in range(32):
            one = self.table([None if v is None else v >> bit & 1 for v in values], table)
            word = None if one is None or word is None else word | one << bit
        results: dict[str, int | None] = {rest[0]: word}
        if predicate:
            results[predicate] = None if word is None else int(word != 0)
        return {name: value for name, value in results.items() if name not in ("RZ", "URZ")}


def decide(blocks: list[Block], evaluator: Evaluator) -> set[int]:
    """Takes away the branches that cannot be taken; addresses of the instructions that are never executed."""
    entering: dict[int, State] = {0: {}}
    pending = [0]
    taken: dict[int, list[int]] = {}
    while pending:
        at = pending.pop()
        state = dict(entering[at])
        block = blocks[at]
        for one in block.instructions[:-1]:
            evaluator.step(one, state)
        last = block.instructions[-1]
        guard = evaluator.value(last.predicate, state) if last.predicate else None
        evaluator.step(last, state)
        taken[at] = ways = successors(block, at, guard)
        for successor in ways:
            if successor not in entering:
                entering[successor] = dict(state)
                pending.append(successor)
                continue
            known = entering[successor]
            shared = {name: value for name, value in known.items() if state.get(name) == value}
            if shared != known:
                entering[successor] = shared
                if successor not in pending:
                    pending.append(successor)
    for at, block in enumerate(blocks):
        block.next = taken.get(at, [])
    return {one.address for at, block in enumerate(blocks) if at in entering
            for one in never(block, entering[at], evaluator)}  # fmt: skip


def never(block: Block, entering: State, evaluator: Evaluator) -> list[Instruction]:
    state, found = dict(entering), []
    for one in block.instructions:
        if one.predicate and evaluator.value(one.predicate, state) == 0:
            found.append(one)
        evaluator.step(one, state)
    return found


def successors(block: Block, at: int, guard: int | None) -> list[int]:
    last = block.instructions[-1]
    plain = last.base in ("BRA", "EXIT") and "," not in last.text and "DIV" not in last.opcode
    if guard is None or not plain:
        return block.next
    if guard == 0:
        return [at + 1]
    return [] if last.base == "EXIT" else [successor for successor in block.next if successor != at + 1] or block.next
