"""Which of a block's instructions move vectors of tensors, and which serve only vectors that are not aligned."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from .sass import Instruction

VECTOR = 16  # bytes
_ADDRESS = re.compile(r"\[(U?R\d+(?:\.64)?(?:\+UR\d+)?)(?:\+(-?0x[0-9a-f]+))?\]")


def address_of(one: Instruction) -> tuple[str, int] | None:
    """The base and the offset of a memory access."""
    found = _ADDRESS.findall(one.text)
    return (found[-1][0], int(found[-1][1] or "0", 16)) if found else None


def opposite(predicate: str) -> str:
    return predicate[1:] if predicate.startswith("!") else f"!{predicate}"


@dataclass
class Accesses:
    """Of one block, by the instructions' addresses."""

    moved: dict[int, str] = field(default_factory=dict)  # "load" or "store": of a whole unit
    split: dict[int, str] = field(default_factory=dict)  # the first of the narrow ones that together move a vector
    fallback: set[int] = field(default_factory=set)  # narrow ones under the opposite predicate of what moves the same


def runs(group: dict[int, Instruction], width: int) -> list[list[Instruction]]:
    """Accesses at adjacent offsets, by the vector."""
    found = []
    for offset in sorted(group):
        wanted = [offset + i * width for i in range(VECTOR // width)]
        if all(place in group for place in wanted) and offset - width not in group:
            found.append([group[place] for place in wanted])
    return found


def accesses_of(block: Iterable[Instruction], width: int, never: set[int]) -> Accesses:
    result = Accesses()
    groups: dict[tuple[str, str, int, str], dict[int, Instruction]] = defaultdict(dict)
    whole: set[tuple[str, str, str]] = set()  # base, kind, predicate
    for one in block:
        place = address_of(one)
        if not one.is_global or one.address in never or place is None:
            continue
        kind = "load" if one.is_global_load else "store"
        if one.width == width:
            result.moved[one.address] = kind
            whole.add((place[0], kind, one.predicate))
        elif one.width < VECTOR:
            groups[place[0], kind, one.width, one.predicate][place[1]] = one
    for (base, kind, size, predicate), group in groups.items():
        other = opposite(predicate)
        if predicate and (base, kind, other) in whole:
            result.fallback |= {one.address for one in group.values()}
            continue
        twin = groups.get((base, kind, size, other), {})
        if predicate and not predicate.startswith("!") and set(twin) == set(group):
            result.fallback |= {one.address for one in group.values()}
        elif width == VECTOR:
            for run in runs(group, size):
                result.split[run[0].address] = kind
    return result
