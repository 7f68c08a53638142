"""Checking a peer against the reference: y and the gradients of x and of all that it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from peers import Case, Peer, Settings
from torch import Tensor

from ilora import reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


_passed: dict[tuple[Callable[[Case], Peer], Settings], float] = {}


class WrongPeer(AssertionError):
    """A peer does not compute what the reference computes; the message says which tensor is off and by how much."""


def check(peer: Peer, build: Callable[[Case], Peer], case: Case) -> float:
    """Compares a peer, made by `build` from the case, with the reference: y and every gradient.

    Returns the largest error over the largest value of its tensor; raises WrongPeer beyond the tolerance.
    The reference runs in float32 (float64) on the same tensors. With dropout, a peer whose mask can be drawn again from
    the same state of torch's generator is compared under that very mask. The one whose mask cannot (torch.compile) is
    compared at p = 0, and then the update at p > 0 must have the right mean and the right variance; its gradients at
    p > 0 are not checked.
    """
    without = replace(case.settings, dropout=0.0)
    if case.settings == without or peer.mask is not None or not peer.trained:
        passed = _passed[build, case.settings] = _check_exactly(peer, case)
        return passed
    if (build, without) not in _passed:  # compiling it again only for this would cost seconds
        plain = replace(case, settings=without)
        _passed[build, without] = _check_exactly(build(plain), plain)
    _check_moments(peer, case)
    return _passed[build, without]


def _check_exactly(peer: Peer, case: Case) -> float:
    torch.manual_seed(1)
    mask = None if peer.mask is None else peer.mask()
    torch.manual_seed(1)
    y = peer.call(case.x)
    grads = iter(torch.autograd.grad(y, [case.x, *peer.parameters], case.dy))
    found = {"y": y, "x": next(grads)}
    for name, tensors in peer.trained.items():
        found[name] = torch.cat([next(grads) for _ in tensors], dim=1 if name == "B" else 0)
    wanted = _expected(peer.gate, mask, case)
    errors = {name: _error(value, wanted[name]) for name, value in found.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= TOLERANCE[case.x.dtype]:  # so written that nan fails
        what = "y" if worst == "y" else f"the gradient of {worst}"
        raise WrongPeer(f"{what} differs from the reference by {errors[worst]:.2g} of its largest value")
    return errors[worst]


def _expected(gate: Tensor, mask: Tensor | None, case: Case) -> dict[str, Tensor]:
    """y and the gradients of x, A, B, gate by the reference, where the update sees x · mask."""
    wide = torch.promote_types(case.x.dtype, torch.float32)
    x, A, B = (t.detach().to(wide).requires_grad_() for t in (case.x, case.A, case.B))
    weight, bias, gate = case.weight.to(wide), case.bias.to(wide), gate.detach().to(wide).requires_grad_()
    seen = x if mask is None else x * mask
    update = reference.ilora_linear(seen, torch.zeros_like(weight), None, A, B, gate, case.scaling)
    y = F.linear(x, weight, bias) + update
    grads = torch.autograd.grad(y, [x, A, B, gate], case.dy.to(wide))
    return {"y": y.detach(), **dict(zip(("x", "A", "B", "gate"), grads, strict=True))}


def _error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise WrongPeer(f"shape {list(found.shape)}, expected {list(wanted.shape)}")
    return float((found.detach() - wanted).abs().max() / wanted.abs().max())


def _check_moments(peer: Peer, case: Case) -> None:
    """Inverted dropout of x leaves the update's mean as it is and adds p/(1-p) of its energy as noise."""
    p, base = case.settings.dropout, F.linear(case.x, case.weight, case.bias).detach().float()
    plain = _expected(peer.gate, None, case)["y"].float() - base
    update = peer.call(case.x).detach().float() - base
    mean = float((update * plain).sum() / plain.square().sum())
    noise = float((update - plain).square().sum() / plain.square().sum()) * (1.0 - p) / p
    if not (abs(mean - 1.0) < 0.05 and 0.5 < noise < 2.0):
        raise WrongPeer(f"dropout {p:g}: the update's mean is {mean:.3g} of the expected, its variance {noise:.3g}")
