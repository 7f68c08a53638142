"""The operation as torch.library ops, so that torch's tools understand it: torch.compile and torch.export, autograd,
FlopCounterMode, checkpointing and opcheck.

torch.ops.ilora.forward computes (y, xa) and has gradients by torch.ops.ilora.backward, which refuses to be
differentiated itself. torch.ops.ilora.keep_seed copies a seed that was drawn: under a memory budget for activations,
compiled code would draw it again in the backward, and another number (pytorch issue 190758), but it saves what an op
makes of something larger.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import backends
from .checks import check_segments, rows
from .reference import as_seed

_LIBRARY = torch.library.Library("ilora", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor B, Tensor gate, Tensor? segments, "
    "float scaling, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(Tensor dy, Tensor x, Tensor xa, Tensor? weight, Tensor A, Tensor B, Tensor gate, Tensor? segments, "
    "float scaling, float dropout_p, Tensor? seed, bool need_dx, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("keep_seed(Tensor seed, Tensor x) -> Tensor")
FORWARD, BACKWARD, KEEP_SEED = (getattr(torch.ops.ilora, op).default for op in ("forward", "backward", "keep_seed"))
_PLAIN = (Tensor, torch.nn.Parameter)
# What the dispatcher goes through on every call; a mode or a transform adds a key of its own.
_EVERY_CALL = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)
_MODES = ~_EVERY_CALL.raw_repr()


@torch.library.impl(_LIBRARY, "forward", "CompositeExplicitAutograd")
def forward(x, weight, bias, base, A, B, gate, segments, scaling, dropout_p, seed, backend):
    """(y [..., d_out], xa [M, R]) for x [..., d_in], by the backend of this name, "" for the fastest that fits.

    A backend with its own forward and backward may keep more of the ranks than xa: see `_kept`.
    """
    if torch.autograd.forward_ad._current_level >= 0:  # torch would take the missing tangents for zeros
        raise RuntimeError(
            "ilora_linear: forward-mode differentiation is not supported by the fused backends; "
            "ilora.reference.ilora_linear is plain torch"
        )
    check_segments(segments, rows(x))
    bias, segments = dense(bias), dense(segments)
    module = backends.select(backend, x.device.type, x.dtype)
    flat_x, flat_base = x.reshape(-1, x.shape[-1]), None if base is None else base.reshape(-1, B.shape[0])
    if hasattr(module, "forward"):
        y, xa = module.forward(flat_x, weight, bias, flat_base, A, B, gate, segments, scaling, dropout_p, seed)
    else:
        xa = module.shrink_x(flat_x, A, dropout_p, seed)
        y = module.expand_xa(flat_x, xa, weight, bias, flat_base, B, gate, segments, scaling)
    # Not view: autograd would refuse in-place operations on the output of a Function.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], B.shape[0]]), xa


@torch.library.impl(_LIBRARY, "backward", "CompositeExplicitAutograd")
def backward(dy, x, xa, weight, A, B, gate, segments, scaling, dropout_p, seed, need_dx, backend):
    """(dx, empty unless need_dx; dA, dB, dgate). xa: as `forward` returned it, or [M, R] of shrink_x."""
    check_segments(segments, rows(x))  # again, because the caller may have changed them since the forward
    segments = dense(segments)
    module = backends.select(backend, x.device.type, x.dtype)
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if hasattr(module, "backward") and xa.dim() == 2 + len(getattr(module, "KEPT", ())):
        settings = (A, B, gate, segments, scaling, dropout_p, seed, need_dx)
        dx, dA, dB, dgate = module.backward(flat_dy, flat_x, xa, weight, *settings)
    else:
        dxa, dB, dgate = module.backward_dy(flat_dy, xa, B, gate, segments, scaling)
        products = [] if weight is None else [(flat_dy, weight)]
        dx, dA = module.backward_x(dxa, flat_x, A, dropout_p, seed, products, need_dx)
    return x.new_empty(0) if dx is None else dx.view(x.shape), dA, dB, dgate


def dense(vector: Tensor | None) -> Tensor | None:
    """A bias or segments without a stride, as the kernels read them."""
    return None if vector is None else vector.contiguous()


@torch.library.impl(_LIBRARY, "keep_seed", "CompositeExplicitAutograd")
def _keep_seed(seed, x):
    return seed.clone()


@torch.library.register_fake("ilora::forward", lib=_LIBRARY)
def _forward_fake(x, weight, bias, base, A, B, gate, segments, scaling, dropout_p, seed, backend):
    backends.named(backend)
    xa = x.new_empty(rows(x), A.shape[0], dtype=torch.promote_types(x.dtype, A.dtype))
    return x.new_empty(*x.shape[:-1], B.shape[0]), _kept(xa, x, backend)


def _kept(xa, x, backend):
    """What a fake `forward` returns instead of xa for a backend that keeps more of the ranks for its own `backward`."""
    if backends.why_not("triton", x.device.type, x.dtype) is not None:
        return xa
    module = backends.select(backend, x.device.type, x.dtype)
    return xa.new_empty(*getattr(module, "KEPT", ()), *xa.shape)


@torch.library.register_fake("ilora::backward", lib=_LIBRARY)
def _backward_fake(dy, x, xa, weight, A, B, gate, segments, scaling, dropout_p, seed, need_dx, backend):
    dx = x.new_empty(x.shape if need_dx else 0)
    return dx, A.new_empty(A.shape), B.new_empty(B.shape), gate.new_empty(gate.shape)


@torch.library.register_fake("ilora::keep_seed", lib=_LIBRARY)
def _keep_seed_fake(seed, x):
    return torch.empty_like(seed)


def unseen(first: Tensor, *tensors: Tensor | None) -> bool:
    """Whether a backend may read these tensors without torch's dispatcher, which takes a third of the host's time.

    False under a compiler, a tracer, a dispatch mode, a transform of torch.func or autograd's is_grads_batched, and for
    a tensor whose memory does not hold its values: a subclass, a lazy negation, a lazy zero
    (torch._efficientzerotensor), one on the meta device.
    """
    if torch.compiler.is_compiling() or torch._C._dispatch_tls_local_include_set().raw_repr() & _MODES:
        return False
    if first.is_meta:  # then all are
        return False
    for t in (first, *tensors):
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or t._is_zerotensor()):
            return False
    return True


def seed_tensor(seed: int | Tensor | None, dropout_p: float, x: Tensor) -> Tensor | None:
    """None without dropout, else one int64 on x's device: the seed that was given, or one drawn now."""
    if dropout_p == 0.0:
        return None
    drawn = as_seed(seed, x.device)
    return drawn if seed is not None or unseen(x) else KEEP_SEED(drawn, x)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what `gradients` needs of a call of `forward`: of large tensors x alone."""
    x, weight, _, _, A, B, gate, segments, scaling, dropout_p, seed, backend = inputs
    ctx.save_for_backward(x, output[1], weight, A, B, gate, segments, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.settings = scaling, dropout_p, backend


def gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    """The gradient of every argument of `forward`, None where there is none or it is not asked for."""
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * len(needs)
    x, xa, weight, A, B, gate, segments, seed = ctx.saved_tensors
    scaling, dropout_p, backend = ctx.settings
    # Under create_graph the op itself is called, whose results refuse to be differentiated.
    plain = not torch.is_grad_enabled() and unseen(dy, x, xa, weight, A, B, gate, segments, seed)
    op = backward if plain else BACKWARD
    settings = (scaling, dropout_p, seed, needs[0], backend)
    dx, dA, dB, dgate = op(dy, x, xa, weight, A, B, gate, segments, *settings)
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dweight = flat_dy.T @ flat_x if needs[1] else None
    dbias = flat_dy.sum(0) if needs[2] else None
    grads = (dx, dweight, dbias, dy, dA, dB, dgate, *[None] * 5)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def refuse_second_derivative(*_: Any) -> None:
    """Stands where the gradients of gradients would be."""
    raise RuntimeError(
        "ilora_linear: double backward is not supported by the fused backends; "
        "ilora.reference.ilora_linear is plain torch and differentiable to any order"
    )


torch.library.register_autograd("ilora::forward", gradients, setup_context=save_for_backward, lib=_LIBRARY)
torch.library.register_autograd("ilora::backward", refuse_second_derivative, lib=_LIBRARY)


def eager_function(compute: Callable[..., Any], save: Callable[..., None], gradients: Callable[..., Any]) -> Any:
    """An autograd function of the formula that an op was registered with, which does without the dispatcher: for calls
    that no tool of torch needs to see."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            save(ctx, inputs, output)
            return output

        backward = staticmethod(gradients)

    return Eager


Eager = eager_function(forward, save_for_backward, gradients)


def _forward_flops(x: Sequence[int], weight: Any, bias: Any, base: Any, A: Any, B: Any, *_: Any, **__: Any) -> int:
    (R, d_in), d_out = A[-2:], B[-2]
    return 2 * prod(x[:-1]) * (R * (d_in + d_out) + (d_in * d_out if weight is not None else 0))


def _backward_flops(dy: Any, x: Any, xa: Any, weight: Any, A: Any, B: Any, *rest: Any, **_: Any) -> int:
    (R, d_in), d_out, need_dx = A[-2:], B[-2], rest[-2]
    frozen = d_in * d_out if need_dx and weight is not None else 0
    return 2 * prod(x[:-1]) * (R * (2 * d_out + (2 if need_dx else 1) * d_in) + frozen)


_COUNTED: list[tuple[Any, Any]] = []  # (forward, backward) of each operation


def count_flops(forward: Any, backward: Any) -> None:
    """Has FlopCounterMode count an operation by these ops. Both get x as [..., d_in], A as [..., R, d_in] and B as
    [..., d_out, R]: a row meets one A and one B however many there are."""
    _COUNTED.append((forward, backward))
    if "torch.utils.flop_counter" in sys.modules:
        _register_flops()


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    while _COUNTED:
        forward, backward = _COUNTED.pop()
        register_flop_formula(forward)(_forward_flops)
        register_flop_formula(backward)(_backward_flops)


class _AfterFlopCounter(MetaPathFinder):
    """Registers the FLOP formulas when torch.utils.flop_counter is imported; it imports Triton, so ilora does not."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "torch.utils.flop_counter":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                _register_flops()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "torch.utils.flop_counter" not in sys.modules:
    sys.meta_path.insert(0, _AfterFlopCounter())
count_flops(torch.ops.ilora.forward, torch.ops.ilora.backward)
