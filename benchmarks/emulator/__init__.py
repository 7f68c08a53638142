"""Runs the PTX that Triton makes for sm_90 in numpy, and reports unsafe accesses to shared memory.

    program.py        PTX as text → instructions
    formats.py        numbers in registers
    shared_memory.py  bytes, and which accesses nothing puts in order
    block.py          a thread block: registers, control flow, loads and stores
    arithmetic.py     instructions between registers
    copies.py         cp.async, TMA and its barriers
    tensor_cores.py   ldmatrix, mma.sync and wgmma

All threads of a block take each instruction together, and blocks run one after another. A copy that is under way fills
its place with NaN and delivers when the program waits for it. What a wgmma or a TMA store reads is guarded until then.
Not modelled: time; fences between ordinary accesses and TMA or wgmma; what ptxas makes of the PTX; clusters; threads of
a block that part ways. wgmma sums in float32, in another order than the GPU.
"""

from . import arithmetic, copies, tensor_cores  # noqa: F401  their instructions join the table in block.py
from .block import Block, Descriptor, Memory, emulate
from .program import Program, parse

__all__ = ["Block", "Descriptor", "Memory", "Program", "emulate", "parse"]
