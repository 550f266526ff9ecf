"""The GPU of the model, an H200, and what the model assumes of it; every figure with where it is from."""

from __future__ import annotations

# NVIDIA's data sheet and the Hopper tuning guide.
SMS = 132
SCHEDULERS = 4  # each issues at most one instruction of one warp a cycle
CLOCK = 1.755e9  # cycles a second; a GPU that is not at its power limit runs faster
WARPS = 64  # on one SM
BLOCKS = 32
REGISTERS = 65536
REGISTERS_UNIT = 256  # a warp's registers are given out in these
SHARED = 227 * 1024  # bytes of one SM that blocks may use
SHARED_OF_BLOCK = 1024  # bytes that the system takes for each block
L2 = 50 * 2**20  # bytes
L1_AND_SHARED = 256 * 1024  # bytes of an SM
L1 = 192 * 1024  # of these, what holds rows while little shared memory is asked for
L1_WAVEFRONT = 128  # bytes that L1 and shared memory move in a cycle
SPECIAL_LANES = 16  # exponentials, reciprocals, conversions that an SM does in a cycle: a warp's take two
DOUBLE_LANES = 64  # operations on doubles that an SM does in a cycle

# Assumptions.
BANDWIDTH = 4.3e12  # bytes a second that a copy moves: 90 % of the data sheet's 4.8e12
L2_BANDWIDTH = 5.5e12  # bytes a second; published microbenchmarks of the H100 say 5.5 to 7
ISSUE = 0.6  # of a scheduler's cycles that issue: integer, logic and conversion instructions, two thirds of what such
# kernels consist of, go to pipes that take one every second cycle, which leaves 2.7 of 4; dependences take the rest
MEMORY_LATENCY = 700e-9 * CLOCK  # cycles, of device memory under the load of a copy
L2_LATENCY = 270  # cycles, of what lies in L2; published microbenchmarks of the H100 say 200 to 300
L1_LATENCY = 40  # cycles, of what lies in L1, such as a channel's coefficients
SHORT_LATENCY = 25  # cycles, of shared memory, shuffles, special functions
LAUNCH = 2.5e-6  # seconds between the ends of two kernels that the kernels do not fill; in a replayed graph about half

BYTES_A_CYCLE = BANDWIDTH / SMS / CLOCK  # that one SM's share of a copy moves: 18.6
IN_FLIGHT = BANDWIDTH * 700e-9 / SMS  # bytes that one SM must have under way for a copy's rate: Little's law


def resident_blocks(threads: int, registers: int, shared: int) -> int:
    """Blocks of a kernel that fit one SM."""
    warps = -(-threads // 32)
    of_warp = -(-max(registers, 1) * 32 // REGISTERS_UNIT) * REGISTERS_UNIT
    by_registers = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS // warps
    by_shared = SHARED // (shared + SHARED_OF_BLOCK)
    return max(0, min(BLOCKS, WARPS // warps, by_registers, by_shared))
