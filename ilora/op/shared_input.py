"""Layers that get one input (q, k and v; gate and up) and share a pass over it, forward and backward.

A model calls such layers one by one. The first call computes xa = dropout(x) [A_1; A_2; …]ᵀ for all of them and makes
one node of the autograd graph, `_AllProjections`. For each layer the node has a placeholder: a tensor of y's shape that
takes no memory and holds no values. Each layer then computes its own y, in a node `_OneProjection` that takes the
layer's placeholder as its input and passes dy on as the placeholder's gradient. So the first node gets the dy of every
layer at once: one pass over x gives every dA, and dx is written once, with the products dy W added on top. A layer that
is never called costs the ranks it has in xa and gets no gradient.

Computing every y in the first call would waste a product with W wherever a layer then gets another input, and could
hand out a y that is out of date. One node for each layer, each with a dx of its own, would have autograd add these up,
which takes a pass over [M, d_in] for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .checks import as_number, check_dtypes, check_segments, check_tensors, checked_seed, rows
from .functional import autocast_to, autocasts
from .registration import BACKWARD, dense, refuse_second_derivative, seed_tensor, unseen


class Projection(NamedTuple):
    """weight [d_out, d_in], bias [d_out] or None, A [R, d_in], B [d_out, R]; R is the same for all."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor


class Settings(NamedTuple):
    """What holds for all of the projections; scaling holds the 1/(1-p) of dropout."""

    scaling: float
    dropout_p: float
    backend: str


class SharedInput:
    """x's product with every A, and a placeholder for each projection.

    Arguments as of `ilora.ilora_linear`, with one seed, and so one dropout mask, for all projections. `y(j)` is the
    output of projection j, to be asked for once. spent: whether a backward has been through here already.
    """

    def __init__(
        self,
        x: Tensor,
        projections: Sequence[Projection],
        gate: Tensor,
        scaling: float,
        segments: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: int | Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        scaling, dropout_p = as_number("scaling", scaling), as_number("dropout_p", dropout_p)
        (gate, *_) = [check_tensors(x, p.weight, p.bias, None, p.A, p.B, gate, segments) for p in projections]
        check_segments(segments, rows(x))
        self.device = x.device.type
        if autocasts(self.device):
            dtype = torch.get_autocast_dtype(self.device)
            (x,) = autocast_to(dtype, x)  # type: ignore[assignment]
            projections = [Projection(*autocast_to(dtype, *p)) for p in projections]  # type: ignore[arg-type]
        for p in projections:
            check_dtypes(x, p.weight, p.bias, None, p.A, p.B)
        seed = seed_tensor(checked_seed(seed, dropout_p, x.device), dropout_p, x)
        self.settings = Settings(scaling / (1.0 - dropout_p), dropout_p, backend or "")
        projections, segments = [p._replace(bias=dense(p.bias)) for p in projections], dense(segments)
        self.x, self.projections, self.gate, self.segments = x, projections, gate, segments
        self._spent: list[bool] = []
        flat = [tensor for p in projections for tensor in p]
        with torch.autocast(self.device, enabled=False):
            self.xa, *self.placeholders = _AllProjections.apply(
                self.settings, self._spent, x, gate, segments, seed, *flat
            )

    @property
    def spent(self) -> bool:
        return bool(self._spent)

    def y(self, j: int) -> Tensor:
        with torch.autocast(self.device, enabled=False):
            return _OneProjection.apply(self.placeholders[j], self, j)


class _AllProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Any, spent: Any, x: Any, gate: Any, segments: Any, seed: Any, *flat: Any) -> Any:
        """flat: weight, bias, A and B of each projection."""
        module = backends.select(settings.backend, x.device.type, x.dtype)
        As, Bs = flat[2::4], flat[3::4]
        xa = module.shrink_x(x.reshape(-1, x.shape[-1]), torch.cat(As), settings.dropout_p, seed)
        xas = xa.view(len(xa), len(As), len(As[0])).transpose(0, 1).contiguous()  # each projection's [M, R] by itself
        ctx.save_for_backward(x, gate, segments, seed, *flat, xas)
        ctx.settings, ctx.spent = settings, spent
        ctx.mark_non_differentiable(xas)
        ctx.set_materialize_grads(False)
        return xas, *(x.new_empty(()).expand(*x.shape[:-1], len(B)) for B in Bs)

    @staticmethod
    def backward(ctx: Any, _: None, *dys: Tensor | None) -> Any:
        ctx.spent.append(True)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        given = {j: dy for j, dy in enumerate(dys) if dy is not None}
        if not given:
            return None, None, *(None for _ in needs)
        if not unseen(*given.values(), *saved):
            return None, None, *_gradients_by_op(ctx.settings, given, saved, needs)
        with torch.no_grad():
            grads = _gradients(ctx.settings, given, saved, needs)
        if torch.is_grad_enabled():
            grads = _Once.apply(*grads, *given.values(), *saved)[: len(needs)]
        return None, None, *grads


def _gradients(settings: Settings, dys: dict[int, Tensor], saved: Any, needs: Any) -> list[Tensor | None]:
    """Gradients of x, gate, segments, seed and flat; dys of those projections that have one."""
    (x, gate, segments, seed, *flat, xas), (scaling, dropout_p, backend) = saved, settings
    module = backends.select(backend, x.device.type, x.dtype)
    flat_x = x.reshape(-1, x.shape[-1])
    check_segments(segments, len(flat_x))  # again, because the caller may have changed them since the forward
    grads: list[Any] = [None] * len(needs)
    products, dxas = [], []
    for j, dy in dys.items():
        weight, _, _, B = flat[4 * j : 4 * j + 4]
        dy = dy.reshape(-1, len(B))
        dxa, dB, dgate = module.backward_dy(dy, xas[j], B, gate, segments, scaling)
        at = 4 + 4 * j
        grads[at] = dy.T @ flat_x if needs[at] else None
        grads[at + 1] = dy.sum(0) if needs[at + 1] else None
        grads[at + 3] = dB
        grads[1] = dgate if grads[1] is None else grads[1] + dgate
        products.append((dy, weight))
        dxas.append(dxa)
    A = torch.cat([flat[4 * j + 2] for j in dys])
    dx, dA = module.backward_x(torch.cat(dxas, 1), flat_x, A, dropout_p, seed, products, needs[0])
    for j, part in zip(dys, dA.chunk(len(dys)), strict=True):
        grads[6 + 4 * j] = part
    grads[0] = None if dx is None else dx.view(x.shape)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _gradients_by_op(settings: Settings, dys: dict[int, Tensor], saved: Any, needs: Any) -> list[Tensor | None]:
    """The same by one op for each projection, for tensors that a backend cannot read by itself (a vmapped dy, say)."""
    x, gate, segments, seed, *flat, xas = saved
    scaling, dropout_p, backend = settings
    grads: list[Any] = [None] * len(needs)
    for j, dy in dys.items():
        weight, _, A, B = flat[4 * j : 4 * j + 4]
        low = (A, B, gate, segments, scaling, dropout_p, seed)
        dx, dA, dB, dgate = BACKWARD(dy, x, xas[j], weight, *low, needs[0], backend)
        flat_dy, at = dy.reshape(-1, len(B)), 4 + 4 * j
        dweight = flat_dy.T @ x.reshape(-1, x.shape[-1]) if needs[at] else None
        grads[at : at + 4] = dweight, flat_dy.sum(0) if needs[at + 1] else None, dA, dB
        grads[:2] = (dx, dgate) if grads[1] is None else (grads[0] + dx, grads[1] + dgate)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class _Once(torch.autograd.Function):
    """Gives its arguments back, tied to one another: under create_graph a second differentiation is refused."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors)

    backward = staticmethod(refuse_second_derivative)  # type: ignore[assignment]


class _OneProjection(torch.autograd.Function):
    """y of one projection; dy goes to the projection's placeholder as it is."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, shared: SharedInput, j: int) -> Tensor:
        ctx.set_materialize_grads(False)
        x, p = shared.x, shared.projections[j]
        module = backends.select(shared.settings.backend, x.device.type, x.dtype)
        flat_x = x.reshape(-1, x.shape[-1])
        settings = (p.weight, p.bias, None, p.B, shared.gate, shared.segments, shared.settings.scaling)
        y = module.expand_xa(flat_x, shared.xa[j], *settings)
        # Not view: autograd would refuse in-place operations on the output of the Function.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(p.B)])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return dy, None, None
