"""The CUDA budget reads machine code as it should, and fails a bad kernel.  Neither nvcc nor a GPU is needed."""

from __future__ import annotations

import dataclasses
import struct
import sys
from pathlib import Path

import pytest

from benchmarks.cuda_budget import machine, report, toolchain
from benchmarks.cuda_budget.accesses import accesses_of
from benchmarks.cuda_budget.cases import CASES, Case, Kernel
from benchmarks.cuda_budget.constants import Evaluator, decide
from benchmarks.cuda_budget.counts import simulate, strides
from benchmarks.cuda_budget.flow import flow_of
from benchmarks.cuda_budget.model import TARGET, Unread, held_in_l2, predict, read, reloaded
from benchmarks.cuda_budget.path import main_loop, vectors_moved
from benchmarks.cuda_budget.products import Pass, passes_of
from benchmarks.cuda_budget.recorder import Launch
from benchmarks.cuda_budget.sass import Instruction, decode, parse
from benchmarks.cuda_budget.sass import Kernel as Code

FOLDER = Path(__file__).parent / "cuda_budget"
RECORDED = (FOLDER / "sample.sass").read_text()


def kernel(word):
    return next(code for name, code in parse(RECORDED, RECORDED).items() if word in name)


def instruction(text, address=0, stall=1, sets=None, waits=0, predicate=""):
    return Instruction(address, text, predicate, stall, sets, None, waits)


def case_of(name, sweeps=(((1, 1),),), moves=(1, 1), tensors=2, floor="", **more):
    stated = Kernel(name, moves, sweeps, floor=floor, **more)
    return Case(name, "sample", "bfloat16", (64, 2**20), tensors, (stated,), lambda: None), stated


def launch_of(code, blocks=16384, parameters=b""):
    return Launch(code.name, blocks, 256, (256, 1, 1, blocks, 1, 1), 0, parameters)


def test_fields_of_an_instruction():
    one = decode("@!P0 LDG.E.128 R4, desc[UR6][R2.64+0x10]", 0xE0, 0x000EA8000C1E1D00)
    assert (one.predicate, one.opcode, one.width, one.is_global_load) == ("!P0", "LDG.E.128", 16, True)
    assert (one.stall, one.sets, one.reads, one.waits) == (4, 2, None, 0)
    assert [instruction(text).width for text in ("LDG.E.U16 R2", "LDG.E R2", "STG.E.64 [R2.64]", "LDG.E.U8 R2")] == [
        2,
        4,
        8,
        1,
    ]


def test_kernels_and_resources_of_a_file():
    found = parse(RECORDED, RECORDED)
    assert len(found) == 3
    assert all(code.registers > 0 and code.spilled == 0 and code.shared == 0 for code in found.values())
    assert all(any(one.base == "EXIT" for one in code.instructions) for code in found.values())


@pytest.mark.parametrize("word, width, instructions", [("good", 16, 15), ("bad", 2, 10)])
def test_main_loop(word, width, instructions):
    way = main_loop(flow_of(kernel(word)), [((1, 1),)])
    assert (way.width, way.vectors) == (width, 1)
    assert sum(len(step.instructions) for step in way.steps) == instructions


def test_what_arguments_decide():
    """A null pointer takes the loop away that reads it, another pointer the loop that does not."""
    code = kernel("optional")
    for pointer, tensors in ((0, 1), (0x7F0000000010, 2)):
        parameters = struct.pack("<QQQI", 0x7F0000000000, pointer, 0x7F0000000020, 2**20)
        evaluator = Evaluator(code, parameters, (256, 1, 1, 64, 1, 1))
        flow = flow_of(code, lambda blocks, evaluator=evaluator: decide(blocks, evaluator))
        reachable = [i for loop in flow.loops for i in loop.body]
        loads = [one for i in reachable for one in flow.blocks[i].instructions if one.is_global_load]
        assert len(loads) == tensors
        assert main_loop(flow, [((tensors, 1),)]).width == 16
    assert len(flow_of(code).loops) == 2


def test_good_kernel_holds_and_bad_kernel_fails():
    stated = case_of("good_kernel")
    good = read(*stated, launch_of(kernel("good")), kernel("good"))
    assert good.share >= TARGET and good.passed
    bad = read(*stated, launch_of(kernel("bad")), kernel("bad"))
    assert bad.share < 0.5 and not bad.passed
    assert report.row_of(bad)["verdict"] == "FAILS"
    assert report.row_of(bad)["loads / stores"] == "1x16 / 1x16"


def test_a_floor_needs_its_count():
    def bad(**more):
        return read(*case_of("good_kernel", **more), launch_of(kernel("bad")), kernel("bad"))

    share = bad().share
    needs = 1000 * bad(floor="exp", needs=1000).most / share  # of which the kernel's share is all that they allow
    assert not bad(floor="exp").passed
    assert not bad(floor="exp", needs=0.8 * needs).passed
    excused = bad(floor="exp", needs=0.9 * needs)
    assert excused.share < TARGET and excused.passed and report.row_of(excused)["verdict"] == "floor"


def test_what_a_block_holds_is_not_loaded_again():
    case, stated = case_of("good_kernel", held=32)
    case = dataclasses.replace(case, row=2**13)
    reading = read(case, stated, launch_of(kernel("good"), blocks=2**13), kernel("good"))
    assert reading.warps_of_row == 8
    assert reading.held == pytest.approx(8 * 32 * 32 / (2**13 * 2))
    kept = dataclasses.replace(reading.launch, shared=2**20)
    assert dataclasses.replace(reading, launch=kept).held == 1
    assert dataclasses.replace(reading, stated=dataclasses.replace(stated, held=0)).held == 0


def test_known_numbers_decide_comparisons():
    evaluator = Evaluator(kernel("good"), b"", (32, 4, 1, 10, 1, 1))
    state = {"R1": 3}
    for text in ("LDC R2, c[0x0][RZ]", "LDC R3, c[0x0][0x4]", "IADD3 R4, R2, -R3, R1", "VIADD R5, R4, 0xffffffff"):
        evaluator.step(instruction(text), state)
    assert [state[name] for name in ("R2", "R3", "R4", "R5")] == [32, 4, 31, 30]
    evaluator.step(instruction("ISETP.GE.AND P0, PT, R5, 0x1f, PT"), state)
    evaluator.step(instruction("ISETP.LT.OR P1, PT, R5, 0x1f, P0"), state)
    evaluator.step(instruction("ISETP.GT.AND P2, PT, R9, 0x0, P0"), state)
    assert (state["P0"], state["P1"], state["P2"]) == (0, 1, 0)


def test_words_that_do_not_fit_are_refused():
    with pytest.raises(Unread, match="no way through"):
        read(*case_of("good_kernel", sweeps=(((5, 2),),)), launch_of(kernel("good")), kernel("good"))


def test_prediction():
    case, stated = case_of("good_kernel")
    reading = read(case, stated, launch_of(kernel("good")), kernel("good"))
    predicted = predict(case, [reading], [])
    assert predicted.copy_seconds == pytest.approx(2 * 2**27 / machine.BANDWIDTH)
    assert predicted.seconds == pytest.approx(reading.seconds(0) + machine.LAUNCH)
    assert predict(case, [reading], [100]).seconds > predicted.seconds + machine.LAUNCH
    few = read(case, stated, launch_of(kernel("good"), blocks=10), kernel("good"))
    assert few.seconds(0) > 5 * reading.seconds(0)  # ten of 132 SMs


def test_what_l2_holds():
    big = read(*case_of("good_kernel", again=1), launch_of(kernel("good")), kernel("good"))
    assert held_in_l2(big) == 0
    back = read(*case_of("good_kernel", again=1, backwards=True), launch_of(kernel("good")), kernel("good"))
    assert held_in_l2(back) == machine.L2


def test_occupancy():
    assert machine.resident_blocks(256, 32, 0) == 8
    assert machine.resident_blocks(256, 64, 0) == 4
    assert machine.resident_blocks(256, 65, 0) == 3
    assert machine.resident_blocks(1024, 64, 0) == 1
    assert machine.resident_blocks(32, 16, 0) == 32
    assert machine.resident_blocks(256, 32, 100 * 1024) == 2
    assert 22e3 < machine.IN_FLIGHT < 24e3


def test_vectors_moved():
    assert vectors_moved((6, 4), (3, 2), True) == 2
    assert vectors_moved((7, 4), (3, 2), True) is None
    assert vectors_moved((7, 4), (3, 2), False) == 2
    assert vectors_moved((5, 0), (3, 0), False) == 1
    assert vectors_moved((4, 0), (1, 1), True) is None


def test_waits_are_counted():
    """Two loads that are waited for together take as long as one, one after the other twice as long."""
    load = [instruction("LDG.E.128 R4, [R2.64]", 0, sets=0), instruction("LDG.E.128 R8, [R2.64+0x1000]", 16, sets=1)]
    use = [instruction("FADD R0, R4, R8", 32, waits=0b11)]
    together, most = simulate(load + use, 16, set(), first=2)
    assert most == 2 and together == pytest.approx(machine.MEMORY_LATENCY + 2, abs=1)
    apart = [load[0], instruction("FADD R0, R4, R4", 32, waits=0b01), load[1], use[0]]
    serial, most = simulate(apart, 16, set(), first=2)
    assert most == 1 and serial > 1.9 * together
    cached, _ = simulate(apart, 16, set(), first=1)
    assert together < cached < serial


def test_scalar_accesses_that_lie_apart():
    """Eight adjacent floats of each thread: every access spans 1 KiB, eight wavefronts."""
    apart = [instruction(f"LDG.E R{4 + i}, [R2.64+{4 * i:#x}]", 16 * i) for i in range(8)]
    assert set(strides(apart).values()) == {32}
    assert set(strides(apart[:1]).values()) == {4}


def test_fallbacks_of_vectors_that_are_not_aligned():
    vector = instruction("LDG.E.128 R4, desc[UR4][R2.64]", 0, predicate="!P0")
    narrow = [
        instruction(f"LDG.E R{4 + i}, desc[UR4][R2.64+{4 * i:#x}]", 16 + 16 * i, predicate="P0") for i in range(4)
    ]
    found = accesses_of([vector, *narrow], 16, set())
    assert found.moved == {0: "load"} and found.fallback == {16, 32, 48, 64} and not found.split
    found = accesses_of([instruction(one.text, one.address) for one in narrow], 16, set())
    assert found.split == {16: "load"} and not found.moved


def test_cases():
    """Each of the table's families is there, in both precisions; every source exists."""
    norms = ["batch_norm", "layer_norm", "rms_norm", "group_norm", "row_norm"]
    losses = ["softmax", "softmax_cross_entropy", "kl_divergence", "margin_loss"]
    for family in (*norms, *losses, "gelu", "attack_step linf", "attack_step l2", "attack_step l1"):
        assert {case.dtype for name, case in CASES.items() if name.startswith(f"{family} ")} == {"float32", "bfloat16"}
    assert all((toolchain.CSRC / "cuda" / f"{case.source}.cu").is_file() for case in CASES.values())


def test_the_page_shows_every_case():
    page = (toolchain.ROOT / "docs" / "cuda-budget.md").read_text()
    assert [name for name in CASES if f"| {name} |" not in page] == [], "python -m benchmarks.cuda_budget --write"


def test_recorded_code_is_what_the_compiler_makes():
    sys.path.insert(0, str(FOLDER))
    from record import disassembled

    try:
        words, ptxas = disassembled()
    except toolchain.Unavailable as missing:
        pytest.skip(str(missing))
    for word in ("good", "bad"):
        code = next(code for name, code in parse(words, ptxas).items() if word in name)
        reading = read(*case_of(f"{word}_kernel"), launch_of(code), code)
        assert reading.passed == (word == "good")


MULTIPLIES = """
    MOV R0, RZ
.L_x_0:  # tiles
    ISETP.GE.AND P0, PT, R0, R1, PT
    @P0 BRA `(.L_x_1)
    LDGSTS.E.BYPASS.128 [R2], desc[UR6][R4.64]
    LDGSTS.E.BYPASS.128 [R2+0x10], desc[UR6][R4.64]
.L_x_1:
    MOV R8, RZ
.L_x_2:  # steps
    LDSM.16.M88.4 R8, [R6]
    @P1 BRA `(.L_x_3)
    LDG.E R9, desc[UR6][R4.64]
    FADD R10, R9, R9
.L_x_3:
    HMMA.16816.F32.BF16 R12, R84, R8, RZ
    HMMA.16816.F32.BF16 R16, R84, R10, RZ
    MUFU.EX2 R6, R6
    @P2 BRA `(.L_x_2)
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P3 BRA `(.L_x_0)
    EXIT
"""


def code_of(text):
    code = Code("multiplies")
    for line in (line.split("#")[0].strip() for line in text.strip().splitlines()):
        if line.endswith(":"):
            code.labels[line[:-1]] = len(code.instructions)
        else:
            predicate, _, rest = line.rpartition("@")[2].partition(" ") if line.startswith("@") else ("", "", line)
            code.instructions.append(instruction(rest, 16 * len(code.instructions), predicate=predicate))
    return code


def test_passes_of_a_kernel_of_products():
    """The way that multiplies and fetches most, without what only some tiles need."""
    assert passes_of(code_of(MULTIPLIES)) == (Pass(2, 6, 4.0, 1, 0), Pass(0, 7, 8.0, 0, 2))
    one_loop = MULTIPLIES.replace("    @P2 BRA `(.L_x_2)\n", "")
    assert passes_of(code_of(one_loop)) == (Pass(2, 12, 12.0, 1, 2), Pass.of([]))


IN_DOUBLE = """
.L_x_0:  # work
    @P0 BRA `(.L_x_1)
    LDG.E.128 R4, desc[UR6][R2.64]
    FADD R8, R4, R5
    FADD R8, R6, R8
    FADD R8, R7, R8
    BRA `(.L_x_2)
.L_x_1:  # a row in double
    LDG.E.128 R4, desc[UR6][R2.64]
    DADD R8, R4, R6
    @P1 BRA `(.L_x_1)
.L_x_2:
    @P2 BRA `(.L_x_0)
    EXIT
"""


def test_rows_that_need_double_are_not_the_main_loop():
    way = main_loop(flow_of(code_of(IN_DOUBLE)), [((1, 0),)])
    assert [one.opcode for step in way.steps for one in step.instructions].count("FADD") == 3
    assert not any(one.base == "DADD" for step in way.steps for one in step.instructions)


def test_rows_that_several_blocks_share_are_swept_together():
    """What is loaded again comes from L2 where the rows under way fit it, and a block is not a row."""
    sweeps = (((1, 0), (1, 0)),)
    for blocks_of_row, fits in ((1, False), (64, True)):
        case, stated = case_of("good_kernel", sweeps=sweeps, moves=(1, 0), times=(1, 1))
        case = dataclasses.replace(case, row=2**20)
        launch = launch_of(kernel("good"), blocks=64 * blocks_of_row)
        reading = dataclasses.replace(read(*case_of("good_kernel"), launch, kernel("good")), case=case, stated=stated)
        reading.ways = [dataclasses.replace(reading.ways[0], sweeps=((1, 0),)) for _ in range(2)]
        again, from_memory = reloaded(reading)
        assert again > 0 and (from_memory == 0) == fits
