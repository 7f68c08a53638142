"""What the layer sweep times: ours by each strategy, the peers of peers.py, and two kernel libraries where they are."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import peers
import torch
import torch.nn.functional as F
from measure import Program
from peers import Case, Peer, Settings
from torch import Tensor

import ilora.op.native

from .machine import backend_of, loads_by_descriptor

STRATEGIES = ("beta", "gemm", "whole")


class Arm(NamedTuple):
    """strategy, table, pdl: what ILORA_STRATEGY, ILORA_TABLE and ILORA_PDL say while it runs, None leaves them alone (a
    peer); bias: whether it has the frozen layer's."""

    name: str
    build: Callable[[Case], Peer]
    strategy: str | None = None
    bias: bool = True
    table: str | None = None
    pdl: str | None = None

    @property
    def under(self) -> tuple[str | None, str | None, str | None]:
        return self.strategy, self.table, self.pdl


@contextmanager
def using(strategy: str | None, table: str | None = None, pdl: str | None = None) -> Iterator[None]:
    """ILORA_STRATEGY, ILORA_TABLE and ILORA_PDL for a while; None leaves one alone."""
    wanted = {"ILORA_STRATEGY": strategy, "ILORA_TABLE": table, "ILORA_PDL": pdl}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Under:
    """A program whose parts run under a strategy, a table and so on, see `using`."""

    def __init__(self, program: Program, *under: str | None) -> None:
        self.program, self.sets, self.queued, self.under = program, program.sets, program.queued, under
        self.parts: Sequence[Callable[[], object]] = [partial(self._part, part) for part in program.parts]

    @property
    def outputs(self) -> list[Tensor]:
        return self.program.outputs

    def _part(self, part: Callable[[], object]) -> None:
        with using(*self.under):
            part()


def unsloth(case: Case) -> Peer:
    """Unsloth's LoRA of one projection, under the uniform gate as PEFT's: no dropout, no bias. Importing the package
    patches PEFT and transformers for the rest of the run."""
    lora = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    scale = case.scaling / case.settings.experts
    A, B = peers._leaves(case.A, case.B)
    gate = torch.full_like(case.gate, 1.0 / case.settings.experts)
    return Peer(lambda x: lora.apply(x, case.weight, None, A, B, scale), gate, {"A": [A], "B": [B]})


def lorafusion(case: Case) -> Peer:
    """LoRAFusion's fused linear, under the uniform gate; its seed is a host's number, the same in every call."""
    fused = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    drop = importlib.import_module("lorafusion.ops.triton_ops.dropout").seeded_dropout
    scale, p, seed = case.scaling / case.settings.experts, case.settings.dropout, 1234
    A, B = peers._leaves(case.A, case.B)
    gate = torch.full_like(case.gate, 1.0 / case.settings.experts)

    def call(x: Tensor) -> Tensor:
        return fused(x, case.weight, A, B, scale, seed=seed, dropout_p=p, linear_bias=case.bias)

    def mask() -> Tensor:
        ones = torch.ones(case.x[..., 0].numel(), case.x.shape[-1], dtype=case.x.dtype, device=case.x.device)
        return drop(x=ones, p=p, seed=seed, store_mask=True)[0].view_as(case.x)

    return Peer(call, gate, {"A": [A], "B": [B]}, mask)


@cache
def _missing(module: str, function: str) -> str | None:
    """Why a library outside of this project cannot be timed; trying is the only way to know."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"{module.split('.')[0]} is not installed (--peer-path names a folder that holds it)"
    try:
        getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever its import does; the reason is in the report
        return f"{module} does not import here: {type(error).__name__}: {error}"[:300]
    return None


def _libraries(p: float) -> list[tuple[Arm, str | None]]:
    first = _missing("unsloth.kernels.fast_lora", "LoRA_W")
    second = _missing("lorafusion.ops.lora_v1", "fused_linear_lora")
    return [
        (Arm("unsloth", unsloth, bias=False), first or ("it has no dropout" if p else None)),
        (Arm("lorafusion", lorafusion), second or (None if p else "its backward wants a dropout mask")),
    ]


def ours(settings: Settings, every: bool = False) -> list[tuple[Arm, str | None]]:
    """Our arms, each with the reason why it cannot run, or None; every: programmatic dependent launch too."""
    backend = backend_of(settings.device, settings.dtype)
    triton = backend == "triton"
    wide = settings.dtype.itemsize == 2
    forced = None if triton else f"strategies are Triton's; this runs on {backend}"
    tensor = forced or (None if wide else f"it computes in float16 and bfloat16, not {settings.dtype}")
    ranks = settings.rank
    few = None if ranks <= 32 and ranks % 8 == 0 else f"its ranks are at most 32, rows of B whole 16 bytes: not {ranks}"
    if not loads_by_descriptor(settings.device):
        few = "it loads by tensor descriptor, which this device does not"
    build = built_by(backend)
    reasons = {"beta": forced, "gemm": tensor, "whole": tensor or few}
    arms = [(Arm(f"ilora[{name}]", build, name, table=""), reasons[name]) for name in STRATEGIES]
    if every:
        early = forced or (None if loads_by_descriptor(settings.device) else "kernels there wait for one another")
        arms.append((Arm("ilora[pdl]", build, "auto", pdl="1"), early))
    return [(Arm("ilora", build, "auto"), None), *arms]  # "auto" goes by a table that is in force, tiles and all


@cache
def built_by(backend: str) -> Callable[[Case], Peer]:
    return partial(peers.ours, backend=backend)  # one object: checking.check remembers what has passed


def arms_of(settings: Settings, every: bool) -> tuple[list[Arm], dict[str, str]]:
    """The arms that run here, the frozen layer first, and why the others do not; every: all peers, else PEFT alone."""
    device, dtype, p = settings.device, settings.dtype, settings.dropout
    names = ["frozen", "peft"] + ["published", "loop", "eager", "compile"] * every
    known = [(Arm(name, peers.PEERS[name]), peers.unavailable(name, device, dtype)) for name in names]
    candidates = known[:1] + ours(settings, every) + known[1:] + (_libraries(p) if every else [])
    return (
        [arm for arm, reason in candidates if reason is None],
        {arm.name: reason for arm, reason in candidates if reason is not None},
    )


def cuda_decode(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, gate: Tensor, scaling: float
) -> Tensor:
    """y by the CUDA library: in one launch, or, above its rows for a weight, upon the frozen layer's output."""
    if len(x) > ilora.op.native.DECODE_FUSED_ROWS:
        base = F.linear(x, weight, bias)
        result = ilora.op.native.decode(x, None, None, base, A, B, gate, None, scaling)
    else:
        result = ilora.op.native.decode(x, weight, bias, None, A, B, gate, None, scaling)
    if result is None:
        raise ValueError(f"the CUDA library refuses x {list(x.shape)}, {x.dtype}, R = {len(A)}")
    return result[0]


def case_for(arm: Arm, case: Case) -> Case:
    """The case as the arm computes it: without a bias where it has none."""
    return case if arm.bias else replace(case, bias=torch.zeros_like(case.bias))
