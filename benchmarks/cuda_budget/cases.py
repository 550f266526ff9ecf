"""What is measured: operators at shapes of networks, the fewest bytes that they must move, and what their kernels move.

A kernel is named by a regular expression.  `sweeps` says how many tensors it loads and stores in each pass over its
data; alternatives stand in the order of preference.  `moves` says how many tensors travel from and to device memory: a
row that is swept twice is there once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .path import Moves

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Kernel:
    name: str  # regular expression, of the mangled name
    moves: Moves = (0, 0)  # tensors from and to device memory
    sweeps: tuple[tuple[Moves, ...], ...] = ()
    inner: Moves | None = None  # what a loop within the work on one vector moves
    parts: tuple[Moves, ...] = ()  # what several loops move that are one sweep, nothing joining threads in between
    times: tuple[int, ...] = ()  # how often each sweep is made, if they are found one by one
    again: int = 0  # of the tensors read, those that the kernel before it has read or written
    backwards: bool = False  # goes over them from the end, where L2 still holds them
    held: int = 0  # bytes of a row that a thread still has in registers for a later sweep, besides shared memory
    rounds: int = 0  # of a small kernel, which moves no tensors: loads that wait for each other
    floor: str = ""  # why its arithmetic cannot keep up with memory, if it cannot
    needs: float = 0.0  # instructions that the formula needs for an element of the shape, where a floor is stated


@dataclass(frozen=True)
class Case:
    name: str
    source: str  # stem in csrc/cuda
    dtype: str
    shape: tuple[int, ...]
    tensors: int  # of that shape, which any implementation moves at least
    kernels: tuple[Kernel, ...]
    call: Callable[[], object]
    row: int = 0  # elements of a row, where a kernel works by rows

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes


def empty(shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype])


def text(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


CASES: dict[str, Case] = {}


def add(case: Case) -> None:
    CASES[case.name] = case


def two_sweeps(reads: int, writes: int, first: int | None = None) -> tuple[tuple[Moves, ...], ...]:
    """Sums over a row, then results: read again, or kept in registers."""
    loads = reads if first is None else first
    return ((loads, 0), (reads, writes)), ((loads, 0), (0, writes))


def batch_norm(shape: tuple[int, ...], dtype: str, innermost: bool) -> None:
    n, c, h, w = shape
    image = (n * h * w, c, 1) if innermost else (n, c, h * w)

    def call() -> object:
        x, numbers = empty(image, dtype), empty((c,))
        return torch.ops.robustkern.batch_norm_double_backward(
            x, None, None, empty(image, dtype), empty(image, dtype), numbers, numbers, numbers, True, True, True, True
        )

    kernels = (
        Kernel("batch_norm_fused", (3, 2), (((3, 0),), ((3, 2),))),
        Kernel("batch_norm_sums", (3, 0), (((3, 0),),)),
        Kernel("batch_norm_coefficients", rounds=2),
        Kernel("batch_norm_apply", (3, 2), (((3, 2),),), again=3, backwards=True),
    )
    layout = "NHWC" if innermost else "NCHW"
    add(Case(f"batch_norm {text(shape)} {dtype} {layout}", "batch_norm", dtype, shape, 5, kernels, call))


def layer_norm(shape: tuple[int, int], dtype: str, rms: bool) -> None:
    rows, columns = shape

    def call() -> object:
        x, r = empty(shape, dtype), empty((rows,))
        return torch.ops.robustkern.layer_norm_double_backward(
            x, None, None, empty(shape, dtype), empty(shape, dtype), empty((columns,)), None if rms else r, r,
            True, True, True,
        )  # fmt: skip

    kernels = (
        Kernel("layer_norm_double_backward", (3, 2), two_sweeps(3, 2)),
        Kernel("column_totals", rounds=-(-rows // 8 // 12)),
    )
    name = "rms_norm" if rms else "layer_norm"
    add(Case(f"{name} {text(shape)} {dtype}", "layer_norm", dtype, shape, 5, kernels, call, columns))


def activation(shape: tuple[int, ...], dtype: str, function: str) -> None:
    def call() -> object:
        x = empty(shape, dtype)
        return torch.ops.robustkern.activation_double_backward(
            x, empty(shape, dtype), empty(shape, dtype), function, [], True, True
        )

    kernels = (Kernel("activation_", (3, 2), (((3, 2),),), inner=(2, 1)),)
    add(Case(f"{function} {text(shape)} {dtype}", "activation", dtype, shape, 5, kernels, call))


def group_norm(shape: tuple[int, ...], dtype: str, innermost: bool) -> None:
    n, c, h, w = shape
    groups = 32

    def image() -> torch.Tensor:
        return empty((n, h * w, c), dtype).transpose(1, 2) if innermost else empty((n, c, h * w), dtype)

    def call() -> object:
        numbers = empty((n, groups))
        return torch.ops.robustkern.group_norm_double_backward(
            image(), None, None, image(), image(), empty((c,)), numbers, numbers, groups, True, True, True
        )

    kernels = (
        Kernel("group_norm_(planes|rows)", (3, 2), two_sweeps(3, 2)),
        Kernel("column_totals", rounds=-(-n // 8)),
    )
    layout = "NHWC" if innermost else "NCHW"
    row = c // groups * h * w
    add(Case(f"group_norm {text(shape)} {dtype} {layout}", "group_norm", dtype, shape, 5, kernels, call, row))


def softmax(shape: tuple[int, int], dtype: str) -> None:
    def call() -> object:
        x = empty((*shape, 1), dtype)
        return torch.ops.robustkern.softmax_double_backward(
            x, empty((*shape, 1), dtype), empty((*shape, 1), dtype), False, True, True
        )

    kernels = (Kernel("softmax_double_backward", (3, 2), two_sweeps(3, 2), held=32 * 3),)
    add(Case(f"softmax {text(shape)} {dtype}", "softmax", dtype, shape, 5, kernels, call, shape[1]))


def cross_entropy(shape: tuple[int, int], dtype: str) -> None:
    rows, classes = shape
    more = (0.0, 1.0, -100)

    def arguments() -> tuple[torch.Tensor, ...]:
        return empty(shape, dtype), empty((rows, 2)), torch.zeros(rows, dtype=torch.int64)

    def value() -> object:
        z, _, target = arguments()
        return torch.ops.robustkern.softmax_cross_entropy(z, target, *more)

    def backward() -> object:
        z, statistics, target = arguments()
        return torch.ops.robustkern.softmax_cross_entropy_backward(empty((rows,)), z, statistics, target, *more)

    def double() -> object:
        z, statistics, target = arguments()
        return torch.ops.robustkern.softmax_cross_entropy_double_backward(
            empty(shape, dtype), empty((rows,)), z, statistics, target, *more
        )

    stem = "softmax_cross_entropy"
    for order, call, tensors, kernel in (
        ("value", value, 1, Kernel(f"{stem}_kernel", (1, 0), (((1, 0), (1, 0)), ((1, 0),)))),
        ("backward", backward, 2, Kernel(f"{stem}_backward", (1, 1), (((1, 1),),))),
        ("double", double, 3, Kernel(f"{stem}_double_backward", (2, 1), two_sweeps(2, 1), held=64 * 2)),
    ):
        add(Case(f"{stem} {order} {text(shape)} {dtype}", stem, dtype, shape, tensors, (kernel,), call, classes))


def kl(shape: tuple[int, int], dtype: str) -> None:
    rows = shape[0]

    def tensors(count: int) -> list[torch.Tensor]:
        return [empty(shape, dtype) for _ in range(count)]

    def value() -> object:
        return torch.ops.robustkern.kl_divergence(*tensors(2), 1.0)

    def backward() -> object:
        return torch.ops.robustkern.kl_divergence_backward(
            empty((rows,)), *tensors(2), empty((rows, 6)), 1.0, True, True
        )

    def double() -> object:
        return torch.ops.robustkern.kl_divergence_double_backward(
            *tensors(2), empty((rows,)), *tensors(2), empty((rows, 6)), 1.0, True, True
        )

    stem, two = "kl_divergence", (2, 0)
    values = ((two, two), (two,))
    bends = two_sweeps(4, 2)
    for order, call, count, kernel in (
        ("value", value, 2, Kernel(f"{stem}_kernel", (2, 0), values, held=32 * 2)),
        ("backward", backward, 4, Kernel(f"{stem}_backward", (2, 2), (((2, 2),),))),
        ("double", double, 6, Kernel(f"{stem}_double_backward", (4, 2), bends, held=32 * 4)),
    ):
        add(Case(f"{stem} {order} {text(shape)} {dtype}", stem, dtype, shape, count, (kernel,), call, shape[1]))


def attack_step(shape: tuple[int, ...], dtype: str, ball: str) -> None:
    rows, columns = shape[0], shape[1] * shape[2] * shape[3]

    def call() -> object:
        x = empty((rows, columns), dtype)
        others = empty((rows, columns), dtype), empty((rows, columns), dtype)
        norm = {"linf": 0, "l2": 1, "l1": 2}[ball]
        return torch.ops.robustkern.attack_step(
            x, *others, empty((1,)), empty((1,)), None, shape[2] * shape[3], norm, max(1, columns // 100)
        )

    held = columns <= 16384 // DTYPES[dtype].itemsize  # a block's registers hold the row
    clear = Kernel("clear_queue", rounds=1)
    if ball == "linf":
        kernels: tuple[Kernel, ...] = (Kernel("attack_step_linf", (3, 1), (((3, 1),),)),)
    elif ball == "l2" and held:
        kernels = (Kernel("attack_step_l2_kernel", (3, 1), (((3, 0), (0, 1)),)),)
    elif ball == "l2":
        kernels = (clear, Kernel("attack_step_l2_queue", (3, 1), (((3, 0), (3, 1)),), times=(1, 1)))
    elif held:
        kernels = (Kernel("attack_step_l1", (3, 1), (((3, 0), (0, 1)),)),)
    else:  # the largest size and two histograms; the largest step and a search that ends within about four
        kernels = (Kernel("attack_step_l1", (3, 1), (((2, 0), (3, 0), (3, 1)),), times=(3, 5, 1)),)
    name = f"attack_step {ball} {text(shape)} {dtype}"
    add(Case(name, "attack_step", dtype, shape, 4, kernels, call, 0 if ball == "linf" else columns))


def row_norm(shape: tuple[int, int], dtype: str) -> None:
    rows, columns = shape
    more = (None, 1, 2.0, False)

    def value() -> object:
        return torch.ops.robustkern.row_norm(empty(shape, dtype), *more)

    def backward() -> object:
        return torch.ops.robustkern.row_norm_backward(empty((rows,)), empty(shape, dtype), empty((rows,)), *more)

    def double() -> object:
        return torch.ops.robustkern.row_norm_double_backward(
            empty(shape, dtype), empty((rows,)), empty(shape, dtype), empty((rows,)), *more
        )

    one = (((1, 0),),)
    chunk = min(columns, 16384 // DTYPES[dtype].itemsize)
    several = columns > chunk
    finish = (Kernel("row_norm_finish", rounds=2),) if several else ()
    queue = Kernel("row_norm_queue", (2, 1), (((2, 0), (2, 1)),), times=(1, 1))
    whole = (Kernel("row_norm_double", (2, 1), (((2, 0), (0, 1)),)),)
    for order, call, tensors, kernels in (
        ("value", value, 1, (Kernel("row_norm_kernel", (1, 0), one), *finish)),
        ("backward", backward, 2, (Kernel("row_norm_backward", (1, 1), (((1, 1),),)),)),
        ("double", double, 3, (Kernel("clear_queue", rounds=1), queue) if several else whole),
    ):
        row = columns if order == "double" else chunk
        add(Case(f"row_norm {order} {text(shape)} {dtype}", "row_norm", dtype, shape, tensors, kernels, call, row))


def margin_loss(shape: tuple[int, int], dtype: str) -> None:
    rows, classes = shape

    def value() -> object:
        target = torch.zeros(rows, dtype=torch.int64)
        return torch.ops.robustkern.margin_loss(empty(shape, dtype), target, None, 0)

    def backward() -> object:
        return torch.ops.robustkern.margin_loss_backward(empty((rows,)), empty(shape, dtype))

    for order, call, kernel in (
        ("value", value, Kernel("margin_loss_kernel", (1, 1), (((1, 0), (0, 1)), ((1, 1),)))),
        ("backward", backward, Kernel("margin_loss_backward", (1, 1), (((1, 1),),))),
    ):
        row = classes if order == "value" else 0
        add(Case(f"margin_loss {order} {text(shape)} {dtype}", "margin_loss", dtype, shape, 2, (kernel,), call, row))


for _dtype in DTYPES:
    for _innermost in (False, True):
        batch_norm((128, 64, 32, 32), _dtype, _innermost)
for _innermost in (False, True):
    batch_norm((256, 256, 56, 56), "bfloat16", _innermost)
    batch_norm((128, 512, 4, 4), "bfloat16", _innermost)
for _dtype in DTYPES:
    layer_norm((64 * 197, 768), _dtype, rms=False)
    layer_norm((64 * 197, 768), _dtype, rms=True)
    activation((64 * 197, 3072), _dtype, "gelu")
    activation((128, 64, 32, 32), _dtype, "silu")
    for _innermost in (False, True):
        group_norm((64, 64, 32, 32), _dtype, _innermost)
    softmax((64 * 12 * 197, 197), _dtype)
for _shape, _dtype in (((1024, 1000), "float32"), ((8192, 32000), "float32"), ((8192, 32000), "bfloat16")):
    softmax((_shape), _dtype)
    cross_entropy(_shape, _dtype)
    kl(_shape, _dtype)
for _dtype in DTYPES:
    for _ball in ("linf", "l2", "l1"):
        attack_step((128, 3, 224, 224), _dtype, _ball)
        attack_step((512, 3, 32, 32), _dtype, _ball)
    row_norm((128, 150528), _dtype)
    row_norm((512, 3072), _dtype)
    margin_loss((8192, 1000), _dtype)
