"""The peers of `ilora_linear`: every way we know to compute an adapted linear layer, each a plain callable x -> y.

All are built from one `Case` (the same weight, bias, A, B and gate, B not zero), so that at p = 0 they compute the same
function and can be checked against `ilora.reference` (see checking.check). PEFT's LoRA has no gate: its scaling alpha/r
makes it the function whose gate is uniform, 1/E. The frozen layer is the one whose gate is zero.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilora.op.backends
from ilora.reference import as_seed, keep_mask


@dataclass(frozen=True)
class Settings:
    """One case of the sweep: M = batch · length rows, one gate row per batch entry."""

    d_in: int
    d_out: int
    batch: int
    length: int
    rank: int
    experts: int
    dropout: float
    dtype: torch.dtype
    device: torch.device

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}

    def __str__(self) -> str:
        return (
            f"{self.as_json()['dtype']}, {self.batch}×{self.length} rows, {self.d_in}→{self.d_out}, "
            f"R={self.rank}, E={self.experts}, p={self.dropout:g}"
        )


@dataclass(frozen=True)
class Case:
    """x [batch, length, d_in], dy [batch, length, d_out], weight, bias, A, B in one dtype; gate [batch, E] float32."""

    settings: Settings
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    gate: Tensor
    scaling: float

    @property
    def constants(self) -> list[Tensor]:
        """What exists whether the layer runs or not."""
        return [self.weight, self.bias, self.A, self.B, self.gate]


def make_case(settings: Settings, seed: int = 0) -> Case:
    """Random tensors, scaled so that the update is as large as the frozen layer's output."""
    s, generator = settings, torch.Generator(settings.device).manual_seed(seed)
    scaling = 32.0 / (s.rank // s.experts)

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = s.dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=s.device, dtype=torch.float32)
        return (values * scale).to(dtype)

    return Case(
        settings=s,
        x=randn(s.batch, s.length, s.d_in).requires_grad_(),
        dy=randn(s.batch, s.length, s.d_out),
        weight=randn(s.d_out, s.d_in, scale=s.d_in**-0.5),
        bias=randn(s.d_out),
        A=randn(s.rank, s.d_in, scale=s.d_in**-0.5),
        B=randn(s.d_out, s.rank, scale=s.experts / scaling / s.rank**0.5),
        gate=randn(s.batch, s.experts, dtype=torch.float32).softmax(-1),
        scaling=scaling,
    )


@dataclass
class Peer:
    """A peer built for one case.

    call: x -> y.
    gate: the gate of the ilora_linear that it must equal.
    trained: what it trains besides x, named as in ilora_linear; a list is joined along the argument's rank dimension.
    mask: draws, from torch's generator as the call would find it, the factor by which the call multiplies x before A;
        None without dropout, or where it cannot be foretold.
    """

    call: Callable[[Tensor], Tensor]
    gate: Tensor
    trained: dict[str, list[Tensor]] = field(default_factory=dict)
    mask: Callable[[], Tensor] | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """All that it trains besides x."""
        return [tensor for tensors in self.trained.values() for tensor in tensors]


def frozen(case: Case) -> Peer:
    """The layer without an adapter: the limit. Its backward computes dx only."""
    return Peer(lambda x: F.linear(x, case.weight, case.bias), torch.zeros_like(case.gate))


def peft_lora(case: Case) -> Peer:
    """PEFT's own LoRA layer, r = R, alpha such that alpha/r · B A is our update under the gate 1/E."""
    import peft

    s = case.settings
    linear = nn.Linear(s.d_in, s.d_out, device="meta")
    linear.weight, linear.bias = nn.Parameter(case.weight, False), nn.Parameter(case.bias, False)
    alpha = case.scaling * s.rank / s.experts
    config = peft.LoraConfig(r=s.rank, lora_alpha=alpha, lora_dropout=s.dropout, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].to(case.x.device, s.dtype)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(case.A)
        B.copy_(case.B)
    gate = torch.full_like(case.gate, 1.0 / s.experts)
    return Peer(layer.train(), gate, {"A": [A], "B": [B]}, _torch_mask(case))


def published(case: Case) -> Peer:
    """The published iLoRA arithmetic: every expert's output exists, [batch, length, E, d_out]; the gate weighs them."""
    s = case.settings
    A, B, gate = _leaves(case.A, case.B, case.gate)

    def call(x: Tensor) -> Tensor:
        xa = F.linear(F.dropout(x, s.dropout), A).unflatten(-1, (s.experts, -1))
        outputs = torch.einsum("bser,oer->bseo", xa, B.unflatten(1, (s.experts, -1)))
        update = (outputs * gate.to(x.dtype)[:, None, :, None]).sum(2)
        return F.linear(x, case.weight, case.bias) + update * case.scaling

    return Peer(call, case.gate, {"A": [A], "B": [B], "gate": [gate]}, _torch_mask(case))


def expert_loop(case: Case) -> Peer:
    """A LoRA per expert, as PEFT would hold them, in a Python loop; the experts share the dropped-out x."""
    s = case.settings
    A, B = _leaves(*case.A.chunk(s.experts)), _leaves(*case.B.chunk(s.experts, dim=1))
    (gate,) = _leaves(case.gate)

    def call(x: Tensor) -> Tensor:
        y, dropped = F.linear(x, case.weight, case.bias), F.dropout(x, s.dropout)
        weights = gate.to(x.dtype)
        for e in range(s.experts):
            y = y + F.linear(F.linear(dropped, A[e]), B[e]) * weights[:, e, None, None] * case.scaling
        return y

    return Peer(call, case.gate, {"A": A, "B": B, "gate": [gate]}, _torch_mask(case))


def _algebraic(
    x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, gate: Tensor, s: float, p: float
) -> Tensor:
    gamma = (gate * s).to(x.dtype).repeat_interleave(A.shape[0] // gate.shape[1], dim=1)
    return F.linear(x, weight, bias) + F.linear(F.linear(F.dropout(x, p), A) * gamma[:, None], B)


def eager(case: Case, function: Callable[..., Tensor] = _algebraic) -> Peer:
    """The algebraic form, (x̃ Aᵀ ⊙ γ) Bᵀ, in eager torch: what a careful user writes without a kernel."""
    A, B, gate = _leaves(case.A, case.B, case.gate)
    s, p = case.scaling, case.settings.dropout

    def call(x: Tensor) -> Tensor:
        return function(x, case.weight, case.bias, A, B, gate, s, p)

    return Peer(call, case.gate, {"A": [A], "B": [B], "gate": [gate]}, _torch_mask(case))


@cache
def _compiled_algebraic() -> Callable[..., Tensor]:
    return torch.compile(_algebraic, fullgraph=True, dynamic=False)  # fullgraph: past its limit of graphs it raises


def compiled(case: Case) -> Peer:
    """The same function under torch.compile, whose dropout mask we cannot foretell."""
    peer = eager(case, _compiled_algebraic())
    if case.settings.dropout:
        peer.mask = None
    return peer


def ours(case: Case, backend: str) -> Peer:
    """ilora.ilora_linear on one backend; the seed of its dropout is drawn from torch's generator in each call."""
    s, p = case.scaling, case.settings.dropout
    A, B, gate = _leaves(case.A, case.B, case.gate)

    def call(x: Tensor) -> Tensor:
        return ilora.ilora_linear(x, case.weight, case.bias, A, B, gate, s, dropout_p=p, backend=backend)

    def mask() -> Tensor:
        seed = as_seed(None, case.x.device)
        return keep_mask(seed, case.x[..., 0].numel(), case.x.shape[-1], p).view_as(case.x) / (1.0 - p)

    return Peer(call, case.gate, {"A": [A], "B": [B], "gate": [gate]}, mask if p else None)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    """A trained copy of each."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _torch_mask(case: Case) -> Callable[[], Tensor] | None:
    p = case.settings.dropout
    return (lambda: F.dropout(torch.ones_like(case.x, requires_grad=False), p)) if p else None


PEERS: dict[str, Callable[[Case], Peer]] = {
    "frozen": frozen,
    "peft": peft_lora,
    "published": published,
    "loop": expert_loop,
    "eager": eager,
    "compile": compiled,
    "ilora[reference]": partial(ours, backend="reference"),
    "ilora[native]": partial(ours, backend="native"),
    "ilora[triton]": partial(ours, backend="triton"),
}


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this peer cannot run here, or None if it can."""
    if name == "ilora[triton]" and device.type == "cpu":
        return "Triton needs a GPU; its interpreter is not for timing"
    if name.startswith("ilora["):
        return ilora.op.backends.why_not(name[6:-1], device.type, dtype)
    if name == "peft":
        return _peft_trouble()
    return _compiler_trouble(device) if name == "compile" else None


@cache
def _peft_trouble() -> str | None:
    """PEFT's import fails beside some versions of other packages, and so may making a layer; only trying tells."""
    if importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    try:
        importlib.import_module("peft")
    except Exception as error:  # whatever its import does
        return f"peft does not import here: {_first_line(error)}"
    try:
        peft_lora(make_case(Settings(8, 8, 1, 1, 1, 1, 0.0, torch.float32, torch.device("cpu"))))
    except ImportError as error:  # of what PEFT looks for when it makes a layer
        return f"peft makes no layer here: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


@cache
def _compiler_trouble(device: torch.device) -> str | None:
    """Inductor needs a C++ compiler on the CPU and Triton on a GPU; only trying tells."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError) as error:
        return f"torch.compile does not work here: {_first_line(error)}"
    return None
