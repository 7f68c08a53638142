"""Cases: random problems, their exact answer in float64, and the rule that a backend's answer is held to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_map

import ilora

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# In float64 the definition is the yardstick itself, so its own error reads as zero; in float32 the order of the sums
# is what is left of the error, and the few elements of a small gradient do not average it out.
ROUNDING = {F64: 1e-13, F32: 4 * 2.0**-23, F16: 2.0**-10, BF16: 2.0**-7}
OUTPUTS = ("y", "dx", "dA", "dB", "dgate")
# Each backend's (dtype of the layer, dtype of A and B). Triton's interpreter computes bfloat16 wrongly.
DTYPES = {
    "reference": [(F32, F32), (F16, F16), (BF16, BF16), (F64, F64), (BF16, F32)],
    "native": [(F32, F32), (BF16, BF16), (F64, F64), (BF16, F32)],
    "triton": [(F32, F32), (F16, F16), (F16, F32)] + [(BF16, BF16), (BF16, F32)] * torch.cuda.is_available(),
}


@dataclass
class Case:
    """One problem. lengths: rows of each instance, or None for N equal ones."""

    M: int = 24
    N: int = 3
    E: int = 4
    R: int = 8
    d_in: int = 20
    d_out: int = 12
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype | None = None
    lengths: tuple[int, ...] | None = None
    bias: bool = True
    dropout_p: float = 0.0
    strided: bool = False
    device: str = "cpu"
    seed: int = 5

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """x, weight, bias, A, B, gate, segments, dy: random, of the scale that a trained layer has."""
        rng = torch.Generator().manual_seed(self.seed + 1000 * self.M + self.R)
        wide = self.adapter_dtype or self.dtype
        N = self.N if self.lengths is None else len(self.lengths)
        M = self.M if self.lengths is None else sum(self.lengths)

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=rng, dtype=F64).to(dtype).to(self.device)

        x, dy = draw(M, self.d_in), draw(M, self.d_out)
        if self.strided:  # columns far apart, rows with a gap
            x = draw(self.d_in, M + 3).T[1 : M + 1]
            dy = draw(M, 2 * self.d_out + 1)[:, 1 : self.d_out + 1]
        segments = None
        if self.lengths is not None:
            ends = torch.tensor((0, *self.lengths)).cumsum(0)
            segments = ends.to(torch.int32).to(self.device)
        return {
            "x": x,
            "weight": draw(self.d_out, self.d_in) / self.d_in**0.5,
            "bias": draw(self.d_out) if self.bias else None,
            "A": draw(self.R, self.d_in, dtype=wide) / self.d_in**0.5,
            "B": draw(self.d_out, self.R, dtype=wide) / 4,
            "gate": torch.rand(N, self.E, generator=rng, dtype=F64)
            .to(F64 if self.dtype is F64 else F32)
            .to(self.device),
            "segments": segments,
            "dy": dy,
        }


class Wrapped(torch.Tensor):
    """A tensor whose values lie in another one, as those of quantised and distributed tensors do."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Wrapped:
        facts = {"dtype": held.dtype, "device": held.device, "strides": held.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **facts)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held.detach()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:  # nn.Parameter wants the same type
            return cls(args[0].held)
        return op(*tree_map(cls.unwrapped, args), **tree_map(cls.unwrapped, kwargs or {}))

    @classmethod
    def unwrapped(cls, value):
        return value.held if isinstance(value, cls) else value


# Tensors whose memory does not hold their values: what a kernel must not be given.
LAZY = {
    "a lazy negation": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "a lazy zero": lambda t: torch._efficientzerotensor(t.shape, device=t.device),
    "a wrapper": Wrapped,
}

GEMM = Case(M=24, d_in=64, d_out=48)
GEMMS = {  # what every kernel that holds the frozen product takes
    "small": GEMM,
    "one row": replace(GEMM, M=1, N=1),
    "no rows": replace(GEMM, M=0),
    "no bias": replace(GEMM, bias=False),
    "sizes that no block divides": replace(GEMM, M=67, N=1, d_in=136, d_out=200),
    "several tiles a program": replace(GEMM, M=300, d_in=72, d_out=520),
    "the largest tile": replace(GEMM, M=500, N=1, d_in=520, d_out=512),
    "segments, some empty": replace(GEMM, lengths=(0, 5, 0, 0, 70, 0)),
    "token gates": replace(GEMM, M=50, N=50),
    "dropout": replace(GEMM, M=66, N=2, d_in=136, dropout_p=0.3),
    "dropout, several tiles": replace(GEMM, M=300, d_in=264, dropout_p=0.5),
    "dropout, rank 32, several tiles": replace(GEMM, M=300, R=32, d_in=264, d_out=136, dropout_p=0.5),
}


def run(case: Case, backend: str | None, wide: bool = False, squared: bool = False) -> dict[str, torch.Tensor]:
    """y and the gradients: by a backend, or by the definition (backend None), on inputs cast to float64 when wide."""
    tensors = case.tensors()
    if wide:
        tensors = {k: v if v is None or k == "segments" else v.to(F64) for k, v in tensors.items()}
    if squared:
        tensors = {k: v if v is None or k == "segments" else v * v for k, v in tensors.items()}
    dy, segments = tensors.pop("dy"), tensors.pop("segments")
    leaves = [tensors[k].detach().requires_grad_() for k in ("x", "A", "B", "gate")]
    x, A, B, gate = leaves
    weight, bias = tensors["weight"], tensors["bias"]
    settings = (A, B, gate, 4.0 if squared else 2.0, segments, case.dropout_p, 77)
    if backend is None:
        y = ilora.reference.ilora_linear(x, weight, bias, *settings)
    else:
        y = ilora.ilora_linear(x, weight, bias, *settings, backend=backend)
    grads = torch.autograd.grad(y, leaves, dy)
    return dict(zip(OUTPUTS, (y.detach(), *grads), strict=True))


def check(case: Case, backend: str) -> None:
    """The rule: max error below twice that of the definition in the same dtype, give or take one rounding.

    "One rounding" is taken at the size that the result has without cancellation, √Σ terms², which is the definition
    on squared inputs: where terms happen to cancel, torch's own error can happen to be zero.
    """
    ours, torchs, exact = run(case, backend), run(case, None), run(case, None, wide=True)
    sizes = run(case, None, wide=True, squared=True)
    within(case, ours, torchs, exact, sizes)


def within(case: Case, ours: dict, torchs: dict, exact: dict, sizes: dict) -> None:
    """The rule, for results by name: a backend's, the definition's, that in float64, and that on squared inputs."""
    for name, got in ours.items():
        want = exact[name]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)} for {tuple(want.shape)}"
        assert got.dtype == torchs[name].dtype, f"{name}: {got.dtype} for {torchs[name].dtype}"
        if not want.numel():
            continue
        error = (got.double() - want).abs().max().item()
        rounding = ROUNDING[case.dtype]
        allowed = 2 * (torchs[name].double() - want).abs().max().item() + rounding * sizes[name].max().sqrt().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} ({case})"


def assert_same(found, expected, leaves, dy=None, tolerance=1e-4) -> None:
    """Two outputs and their gradients by the leaves, of dy or of their sum, are equal but for rounding."""
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy) for y in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
