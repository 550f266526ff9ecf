"""How long kernels of matrix products take: from the machine code of their loops, and from how often these are passed.

A warp of them has 16 rows and meets columns tile by tile, 16 columns at a time: a loop over tiles, which fetches the
next one, and in it a loop over steps, which multiplies; one loop where a tile is a step.  Of each loop that way is
counted which multiplies and fetches most and is then the shortest: every cotangent is there, no tile is cut off.  A
kernel is bound by the largest of

    tensor cores  products of 16 x 8 x 16 numbers, 1,024 multiply-adds a cycle of an SM
    shared        wavefronts of 128 bytes, one a cycle of an SM
    instructions  as of the other kernels
    special       exponentials, 16 lanes a cycle of an SM

times the share of the last round of blocks that has nothing to do.  The floor is the operation's multiply-adds alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import machine
from .cases import DTYPES, text
from .flow import Flow, flow_of
from .recorder import Launch
from .sass import Instruction, Kernel

STEP = 16  # rows, and columns, of what a warp multiplies at a time
HMMA = 16 * 8 * 16  # multiply-adds of one instruction
# Half of what wgmma does.  Published microbenchmarks of the H100 measure 62 % of that for mma.sync.
MULTIPLY_ADDS = 1024  # a cycle of an SM


@dataclass(frozen=True)
class ProductKernel:
    name: str  # regular expression, of the mangled name
    products: int  # of every pair of a row and a column, each as long as a head's row
    tensors: int  # that pass by
    turned: bool = False  # rows are keys


@dataclass(frozen=True)
class ProductCase:
    name: str
    source: str
    shape: tuple[int, int, int, int, int]  # batch, heads, queries, keys, head size
    kernels: tuple[ProductKernel, ...]
    call: Callable[[], object]


PRODUCTS: dict[str, ProductCase] = {}


def attention(shape: tuple[int, int, int, int, int], dtype: str) -> None:
    batch, heads, queries, keys, size = shape

    def call() -> object:
        q, k = ((batch, heads, rows, size) for rows in (queries, keys))
        like_q, like_k = ([torch.empty(x, dtype=DTYPES[dtype]) for _ in range(5)] for x in (q, k))
        return torch.ops.robustkern_cuda.attention_double_backward(
            like_q[0], like_k[0], like_k[1], like_q[1], like_q[2], like_k[2], like_k[3], like_q[3],
            torch.empty((batch, heads, queries)), None, False, 0.125, like_q[4], torch.empty_like(like_q[4]),
            like_k[4], torch.empty_like(like_k[4]),
        )  # fmt: skip

    kernels = (
        ProductKernel("attention_moments", 7, 4),
        ProductKernel("attention_queries", 7, 4),
        ProductKernel("attention_keys", 8, 3, turned=True),
    )
    name = f"attention {text(shape)} {dtype}"
    PRODUCTS[name] = ProductCase(name, "attention", shape, kernels, call)


def attention_jvp(shape: tuple[int, int, int, int, int], dtype: str) -> None:
    batch, heads, queries, keys, size = shape

    def call() -> object:
        q, k = ((batch, heads, rows, size) for rows in (queries, keys))
        like_q, like_k = ([torch.empty(x, dtype=DTYPES[dtype]) for _ in range(4)] for x in (q, k))
        return torch.ops.robustkern_cuda.attention_jvp(
            like_q[0], like_k[0], like_k[1], like_q[1], like_k[2], like_k[3], None, None, False, 0.125, *like_q[2:],
            torch.empty((batch, heads, queries)),
        )  # fmt: skip

    name = f"attention_jvp {text(shape)} {dtype}"
    PRODUCTS[name] = ProductCase(name, "attention_jvp", shape, (ProductKernel("attention_jvp", 6, 4),), call)


for each in (attention, attention_jvp):
    each((64, 12, 197, 197, 64), "bfloat16")
    each((64, 12, 1024, 1024, 64), "bfloat16")
    each((64, 8, 1024, 1024, 128), "bfloat16")


def best_way(flow: Flow, loop: int) -> list[Instruction]:
    """Of one pass through a loop, without those in it."""
    body, header = flow.loops[loop].body, flow.loops[loop].header
    inner = {flow.loops[i].header: flow.loops[i].body for i in flow.children(loop)}

    def successors(at: int) -> set[int]:
        ways = {out for one in inner.get(at, {at}) for out in flow.blocks[one].next} - inner.get(at, set())
        return {way for way in ways if way in body and way != header}

    def own(at: int) -> list[Instruction]:
        return [] if at in inner else flow.blocks[at].instructions

    def rank(way: list[Instruction]) -> tuple[int, int]:
        return sum(one.base in ("HMMA", "LDGSTS") for one in way), -len(way)

    found: dict[int, list[Instruction] | None] = {}

    def from_here(at: int) -> list[Instruction] | None:
        """To the end of the pass; None where there is no way to it."""
        if at not in found:
            rest = [way for way in map(from_here, sorted(successors(at))) if way is not None]
            ends = any(header in flow.blocks[one].next for one in inner.get(at, {at}))
            rest += [[]] if ends else []
            found[at] = own(at) + max(rest, key=rank) if rest else None
        return found[at]

    return from_here(header) or []


@dataclass
class Pass:
    """What a warp does in one pass through a loop."""

    hmma: int
    instructions: int
    wavefronts: float
    special: int
    fetched: int  # pieces of 16 bytes by each thread

    @classmethod
    def of(cls, way: Iterable[Instruction]) -> Pass:
        result = cls(0, 0, 0.0, 0, 0)
        for one in way:
            result.instructions += 1
            result.hmma += one.base == "HMMA"
            result.special += one.base == "MUFU"
            result.fetched += one.base == "LDGSTS"
            if one.base == "LDSM":
                result.wavefronts += int(one.opcode.split(".")[-1])
            elif one.base in ("LDS", "STS", "LDGSTS", "SHFL") and not one.predicate.endswith("PT"):
                result.wavefronts += (4 if one.base == "SHFL" else one.width) * 32 / machine.L1_WAVEFRONT
        return result


def passes_of(code: Kernel) -> tuple[Pass, Pass]:
    """Through the loop over steps, and through that over tiles around it; all of it in the first where they are one."""
    flow = flow_of(code)
    multiplying = [i for i, loop in enumerate(flow.loops) if any(
        one.base == "HMMA" for at in loop.body for one in flow.blocks[at].instructions)]  # fmt: skip
    step = Pass.of(best_way(flow, multiplying[0]))  # loops stand in the order of their sizes
    around = flow.loops[multiplying[0]].parent
    if step.fetched or around is None:
        return step, Pass.of([])
    return step, Pass.of(best_way(flow, around))


def row_of(case: ProductCase, stated: ProductKernel, launch: Launch, code: Kernel) -> dict[str, Any]:
    batch, heads, queries, keys, size = case.shape
    rows, columns = (keys, queries) if stated.turned else (queries, keys)
    step, tile = passes_of(code)
    of_tile = (step.fetched or tile.fetched) // stated.tensors * launch.block * 16 // (size * 2)  # columns
    warps = launch.block // 32
    steps = batch * heads * -(-rows // STEP) * -(-columns // STEP)
    tiles = launch.grid * warps * -(-columns // of_tile)
    cycles = {
        "tensor cores": steps * step.hmma * HMMA / MULTIPLY_ADDS,
        "shared": steps * step.wavefronts + tiles * tile.wavefronts,
        "instructions": (steps * step.instructions + tiles * tile.instructions) / machine.SCHEDULERS / machine.ISSUE,
        "special": steps * step.special * 32 / machine.SPECIAL_LANES,
    }
    bound = max(cycles, key=lambda name: cycles[name])
    shared = code.shared + launch.shared
    resident = machine.resident_blocks(launch.block, code.registers, shared)
    at_a_time = machine.SMS * resident
    idle = -(-launch.grid // at_a_time) * at_a_time / launch.grid
    seconds = cycles[bound] / machine.SMS / machine.CLOCK * idle
    floor = stated.products * batch * heads * queries * keys * size / MULTIPLY_ADDS / machine.SMS / machine.CLOCK
    return {
        "case": case.name,
        "kernel": stated.name,
        "registers": code.registers,
        "shared KiB": round(shared / 1024),
        "blocks an SM": resident,
        "local": code.spilled,
        "products": stated.products,
        "HMMA a step": step.hmma,
        "instructions": step.instructions + round(tile.instructions * STEP / of_tile),
        "wavefronts": round(step.wavefronts + tile.wavefronts * STEP / of_tile),
        "bound": bound,
        "floor us": round(floor * 1e6),
        "predicted us": round(seconds * 1e6),
    }


def rows_of(case: ProductCase, launches: list[Launch], kernels: dict[str, Kernel]) -> list[dict[str, Any]]:
    rows = []
    for launch in launches:
        stated = next(kernel for kernel in case.kernels if re.search(kernel.name, launch.kernel))
        rows.append(row_of(case, stated, launch, kernels[launch.kernel]))
    total = {"case": case.name, "kernel": "all", "products": sum(row["products"] for row in rows)}
    for name in ("floor us", "predicted us"):
        total[name] = sum(row[name] for row in rows)
    return [*rows, {name: total.get(name, "") for name in rows[0]}]
