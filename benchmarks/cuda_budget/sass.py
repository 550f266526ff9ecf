"""Reads nvdisasm's text: a kernel is a list of instructions with their labels, opcodes and scheduling fields.

Since Volta an instruction's own 128 bits say how many cycles to wait after it, which of six scoreboards it sets once
its result is there, and on which it waits: from these follows how many loads are under way at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_KERNEL = re.compile(r"^\.text\.(\S+):", re.M)
_LABEL = re.compile(r"^(\.\S+|\$\S+):$")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"\.L_x_\d+|\.L_\d+")
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
    r" loads.*?Used (\d+) registers(.*?)(?:\n|$)",
    re.S,
)


@dataclass
class Instruction:
    address: int
    text: str  # without the predicate
    predicate: str  # "P0", "!P0", "UP1", or ""
    stall: int  # cycles before the next one of this warp
    sets: int | None  # scoreboard that its result sets
    reads: int | None  # scoreboard that is set once its operands have been read
    waits: int  # mask of scoreboards

    @property
    def opcode(self) -> str:
        return self.text.split(" ", 1)[0]

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def targets(self) -> list[str]:
        return _TARGET.findall(self.text)

    @property
    def width(self) -> int:
        """Bytes of a memory access of one thread."""
        parts = self.opcode.split(".")[1:]
        for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if part in parts:
                return size
        return 4

    @property
    def is_global_load(self) -> bool:
        return self.base in ("LDG", "LD", "LDGSTS")

    @property
    def is_global_store(self) -> bool:
        return self.base in ("STG", "ST")

    @property
    def is_global(self) -> bool:
        return self.is_global_load or self.is_global_store

    @property
    def joins_threads(self) -> bool:
        """A shuffle, a vote or a barrier: threads exchange what they have."""
        return self.base in ("SHFL", "BAR", "REDUX", "VOTE", "BARRIER")


@dataclass
class Kernel:
    name: str  # mangled
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to the index of the instruction that follows
    registers: int = 0
    shared: int = 0  # static bytes
    spilled: int = 0


def decode(text: str, address: int, high: int) -> Instruction:
    """One instruction from its words and the upper half of its encoding."""
    control = high >> 41
    predicate = ""
    if text.startswith("@"):
        predicate, text = text[1:].split(None, 1)
    sets, reads = control >> 5 & 7, control >> 8 & 7
    return Instruction(
        address=address,
        text=text.replace(".reuse", ""),
        predicate=predicate,
        stall=control & 15,
        sets=None if sets == 7 else sets,
        reads=None if reads == 7 else reads,
        waits=control >> 11 & 63,
    )


def parse_kernel(name: str, text: str) -> Kernel:
    kernel = Kernel(name)
    pending: tuple[str, int] | None = None
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            kernel.labels[label[1]] = len(kernel.instructions)
        elif found := _INSTRUCTION.search(line):
            pending = found[2], int(found[1], 16)
        elif pending and (word := _SECOND_WORD.match(line)):
            kernel.instructions.append(decode(*pending, int(word[1], 16)))
            pending = None
    return kernel


def parse(words: str, report: str = "") -> dict[str, Kernel]:
    """The kernels of one file by their mangled names; registers and shared memory are from ptxas's report."""
    starts = [(found.start(), found[1]) for found in _KERNEL.finditer(words)]
    ends = [start for start, _ in starts[1:]] + [len(words)]
    kernels = {name: parse_kernel(name, words[start:end]) for (start, name), end in zip(starts, ends)}
    for name, stack, stores, loads, registers, rest in _ENTRY.findall(report):
        if name in kernels:
            shared = re.search(r"(\d+) bytes smem", rest)
            kernels[name].registers = int(registers)
            kernels[name].shared = int(shared[1]) if shared else 0
            kernels[name].spilled = int(stack) + int(stores) + int(loads)
    return kernels
