"""The facts about a device that launches are sized for, and how it multiplies tiles."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .dropout import row_keys

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Device(NamedTuple):
    """sms: multiprocessors. smem: bytes of shared memory that one program may use. hip: an AMD GPU. early:
    a kernel may be scheduled before the one before it ends (NVIDIA, sm_90 and later). tma: the GPU copies
    tiles by tensor descriptor (sm_90 and later). tmem: columns of tensor memory, 0 if it has none. interpret: kernels
    run on the CPU in Triton's interpreter, whose bfloat16 arithmetic is wrong, so they compute in float32 there.
    """

    sms: int
    smem: int
    hip: bool = False
    early: bool = False
    tma: bool = False
    tmem: int = 0
    interpret: bool = False


INTERPRETER = Device(sms=4, smem=227 * 1024, tma=True, interpret=True)  # few, so that small tests split their sums


@cache
def _gpu(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device(facts.multi_processor_count, 64 * 1024, hip=True)
    new, tmem = facts.major >= 9, 512 if facts.major in (10, 11) else 0
    return Device(facts.multi_processor_count, facts.shared_memory_per_block_optin, early=new, tma=new, tmem=tmem)


def device_of(x: Tensor) -> Device:
    """The device that x is on; raises ValueError where no Triton kernel can run."""
    if not isinstance(row_keys, triton.JITFunction):  # TRITON_INTERPRET was set when the kernels were defined
        return INTERPRETER
    if x.device.type != "cuda":
        raise ValueError(f"the triton backend needs a GPU (or TRITON_INTERPRET=1 before import), not {x.device}")
    return _gpu(x.device)


class Dots(NamedTuple):
    """wide: the type in which tiles of activations are multiplied. pieces: how many terms of that type stand for an
    element of the rank-sized matrix beside them. narrow: the type in which `expand` multiplies two rank-sized tiles.
    precision: Triton's input_precision of float32 products."""

    wide: tl.dtype
    narrow: tl.dtype
    pieces: int
    precision: str

    def arguments(self) -> dict[str, Any]:
        """The constants that `accumulate` needs, as the kernels name them."""
        return {"DOT": self.wide, "PIECES": self.pieces, "PRECISION": self.precision}


def dots(device: Device, x: torch.dtype, a: torch.dtype) -> Dots:
    """x: the dtype of the activations. a: the dtype of A and B, which is x or float32."""
    for dtype in (x, a):
        if dtype not in TYPES:
            raise ValueError(f"the triton backend computes in float16, bfloat16 and float32, not {dtype}")
    if device.interpret:
        return Dots(tl.float32, tl.float32, 1, "ieee")
    if x == a and x != torch.float32:
        return Dots(TYPES[x], TYPES[x], 1, "ieee")
    # Not allow_tf32: torch refuses to read it once fp32_precision was set, as TrainingArguments(tf32=True) does.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and not device.hip
    if x == a:
        return Dots(tl.float32, tl.float32, 1, "tf32" if tf32 else "ieee")
    # x is exact in tf32 and in its own type, so only the float32 side needs more than one term to stay float32.
    precision = "ieee" if device.hip else "tf32" if tf32 else "tf32x3"
    if x == torch.bfloat16:
        return Dots(tl.bfloat16, tl.float32, 3, precision)
    return Dots(tl.float32, tl.float32, 1, precision)
