"""The peers of `ilora_linear`: the ways to compute an adapted linear layer, each a plain callable x -> y.

All are built from one `Case` (the same weight, bias, A, B and gate; B is not zero), so without dropout they compute the
same function and can be checked against `ilora.reference` (see checking.py). PEFT's LoRA has no gate: its scaling
alpha/r equals ours under the uniform gate 1/E. The frozen layer equals ours under a gate of zeros.
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

import ilora
from ilora.op import backends, native
from ilora.reference import as_seed, keep_mask


@dataclass(frozen=True)
class Settings:
    """The sizes of one case: M = batch · length rows, one row of the gate for each of the batch."""

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
        """The tensors that exist whether the layer runs or not."""
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
    gate: the gate under which ilora_linear must equal it.
    trained: the tensors that it trains besides x, by their names in ilora_linear; where there are several, they are
        joined along the rank dimension.
    mask: draws the dropout mask (the factor on x before A) from torch's generator as the next call would draw it; None
        without dropout, or where the mask cannot be known beforehand.
    """

    call: Callable[[Tensor], Tensor]
    gate: Tensor
    trained: dict[str, list[Tensor]] = field(default_factory=dict)
    mask: Callable[[], Tensor] | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """All tensors that it trains besides x."""
        return [tensor for tensors in self.trained.values() for tensor in tensors]


def frozen(case: Case) -> Peer:
    """The layer without an adapter, which no adapted layer can beat. Its backward computes dx only."""
    return Peer(lambda x: F.linear(x, case.weight, case.bias), torch.zeros_like(case.gate))


def peft_lora(case: Case) -> Peer:
    """PEFT's own LoRA layer with r = R and the alpha for which it equals our layer under the uniform gate 1/E."""
    import peft

    s = case.settings
    alpha = case.scaling * s.rank / s.experts
    config = peft.LoraConfig(r=s.rank, lora_alpha=alpha, lora_dropout=s.dropout, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(_linear(case)), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].to(case.x.device, s.dtype)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(case.A)
        B.copy_(case.B)
    gate = torch.full_like(case.gate, 1.0 / s.experts)
    return Peer(layer.train(), gate, {"A": [A], "B": [B]}, torch_mask(case))


def published(case: Case) -> Peer:
    """The arithmetic of the published iLoRA code: it materialises every expert's output, [batch, length, E, d_out]."""
    s = case.settings
    A, B, gate = leaves(case.A, case.B, case.gate)

    def call(x: Tensor) -> Tensor:
        xa = F.linear(F.dropout(x, s.dropout), A).unflatten(-1, (s.experts, -1))
        outputs = torch.einsum("bser,oer->bseo", xa, B.unflatten(1, (s.experts, -1)))
        update = (outputs * gate.to(x.dtype)[:, None, :, None]).sum(2)
        return F.linear(x, case.weight, case.bias) + update * case.scaling

    return Peer(call, case.gate, {"A": [A], "B": [B], "gate": [gate]}, torch_mask(case))


def expert_loop(case: Case) -> Peer:
    """A Python loop over experts, each with an A and B of its own; they share the dropped-out x."""
    s = case.settings
    A, B = leaves(*case.A.chunk(s.experts)), leaves(*case.B.chunk(s.experts, dim=1))
    (gate,) = leaves(case.gate)

    def call(x: Tensor) -> Tensor:
        y, dropped = F.linear(x, case.weight, case.bias), F.dropout(x, s.dropout)
        weights = gate.to(x.dtype)
        for e in range(s.experts):
            y = y + F.linear(F.linear(dropped, A[e]), B[e]) * weights[:, e, None, None] * case.scaling
        return y

    return Peer(call, case.gate, {"A": A, "B": B, "gate": [gate]}, torch_mask(case))


def _algebraic(
    x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, gate: Tensor, s: float, p: float
) -> Tensor:
    gamma = (gate * s).to(x.dtype).repeat_interleave(A.shape[0] // gate.shape[1], dim=1)
    return F.linear(x, weight, bias) + F.linear(F.linear(F.dropout(x, p), A) * gamma[:, None], B)


def eager(case: Case, function: Callable[..., Tensor] = _algebraic) -> Peer:
    """The algebraic form, (x̃ Aᵀ ⊙ γ) Bᵀ, in eager torch: what a careful user writes without our kernels."""
    A, B, gate = leaves(case.A, case.B, case.gate)
    s, p = case.scaling, case.settings.dropout

    def call(x: Tensor) -> Tensor:
        return function(x, case.weight, case.bias, A, B, gate, s, p)

    return Peer(call, case.gate, {"A": [A], "B": [B], "gate": [gate]}, torch_mask(case))


@cache
def _compiled_algebraic() -> Callable[..., Tensor]:
    return torch.compile(_algebraic, fullgraph=True, dynamic=False)  # fullgraph: too many recompilations raise


def compiled(case: Case) -> Peer:
    """The same function under torch.compile, whose dropout mask cannot be known beforehand."""
    peer = eager(case, _compiled_algebraic())
    if case.settings.dropout:
        peer.mask = None
    return peer


def ours(case: Case, backend: str) -> Peer:
    """ilora.ilora_linear on one backend; each call draws its dropout seed from torch's generator."""
    s, p = case.scaling, case.settings.dropout
    A, B, gate = leaves(case.A, case.B, case.gate)

    def call(x: Tensor) -> Tensor:
        return ilora.ilora_linear(x, case.weight, case.bias, A, B, gate, s, dropout_p=p, backend=backend)

    return Peer(call, case.gate, {"A": [A], "B": [B], "gate": [gate]}, seeded_mask(case))


def module(case: Case) -> Peer:
    """Our `ILoRALinear`, as a model calls it, without dropout."""
    s = case.settings
    layer = ilora.ILoRALinear(_linear(case), r=s.rank, num_experts=s.experts, lora_alpha=32.0)
    with torch.no_grad():
        layer.lora_A.copy_(case.A)
        layer.lora_B.copy_(case.B)
    (gate,) = leaves(case.gate)
    trained: dict[str, list[Tensor]] = {"A": [layer.lora_A], "B": [layer.lora_B], "gate": [gate]}
    return Peer(lambda x: layer(x, gate=gate), case.gate, trained)


def cuda_decode(case: Case) -> Peer:
    """The CUDA library's kernel for few rows, without gradients. Up to 16 rows one launch computes the whole layer.

    Its call raises ValueError for what the library does not take.
    """

    def call(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        few = len(rows) <= native.DECODE_FUSED_ROWS
        weight, bias = (case.weight, case.bias) if few else (None, None)
        base = None if few else F.linear(rows, case.weight, case.bias)
        result = native.decode(rows, weight, bias, base, case.A, case.B, case.gate, None, case.scaling)
        if result is None:
            raise ValueError(f"the CUDA library does not take x {list(x.shape)}, {x.dtype}, R = {len(case.A)}")
        return result[0].view(*x.shape[:-1], -1)

    return Peer(call, case.gate)


def _linear(case: Case) -> nn.Linear:
    """The frozen layer as a module."""
    linear = nn.Linear(case.settings.d_in, case.settings.d_out, device="meta")
    linear.weight, linear.bias = nn.Parameter(case.weight, False), nn.Parameter(case.bias, False)
    return linear


def leaves(*tensors: Tensor) -> list[Tensor]:
    """A copy of each tensor, for training."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def torch_mask(case: Case) -> Callable[[], Tensor] | None:
    """The mask of torch's dropout."""
    p = case.settings.dropout
    return (lambda: F.dropout(torch.ones_like(case.x, requires_grad=False), p)) if p else None


def seeded_mask(case: Case) -> Callable[[], Tensor] | None:
    """The mask of our dropout, whose seed is drawn from torch's generator."""
    p, rows = case.settings.dropout, case.x[..., 0].numel()

    def mask() -> Tensor:
        return keep_mask(as_seed(None, case.x.device), rows, case.x.shape[-1], p).view_as(case.x) / (1.0 - p)

    return mask if p else None


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


OF_TRITON = ("automodel", "lorafusion", "ilora[triton]", "ilora[ungated]")
INFERENCE_PEERS = {"ilora[cuda]": cuda_decode}  # these have no backward
MODULES: dict[str, Callable[[Case], Peer]] = {  # what one call costs in a model
    "frozen": lambda case: Peer(_linear(case), torch.zeros_like(case.gate)),
    "peft": peft_lora,
    "ilora": module,
}


def unavailable(name: str, device: torch.device, dtype: torch.dtype, asked: bool = False) -> str | None:
    """Why this peer cannot run here, or None if it can. asked: by name; then Triton's interpreter will do."""
    if name == "ilora[cuda]":
        return "the CUDA library needs a GPU" if device.type == "cpu" else native.cuda_unavailable()
    if name in OF_TRITON:
        if device.type == "cpu" and not asked:
            return "Triton needs a GPU; its interpreter is not for timing"
        return backends.why_not("triton", device.type, dtype)
    if name.startswith("ilora["):
        return backends.why_not(name[6:-1], device.type, dtype)
    return "peft is not installed" if name == "peft" and importlib.util.find_spec("peft") is None else None
