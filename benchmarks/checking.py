"""Checking a peer against the reference: y and the gradients of x and of all that it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from peers import Case, Peer, Settings
from torch import Tensor

from ilora import reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DROPPED = 100  # elements dropped and kept, at least, before their share is judged
CALLS = 50  # at most, for that: a p that small is beyond what it could find


_passed: dict[tuple[Callable[[Case], Peer], Settings], float] = {}


class WrongPeer(AssertionError):
    """A peer does not compute what the reference computes; the message says which tensor is off and by how much."""


def check(peer: Peer, build: Callable[[Case], Peer], case: Case) -> float:
    """Compares a peer, made by `build` from the case, with the reference: y and every gradient.

    Returns the largest error over the largest value of its tensor; raises WrongPeer beyond the tolerance.
    The reference runs in float32 (float64) on the same tensors. With dropout, a peer whose mask can be drawn again from
    the same state of torch's generator is compared under that very mask. The one whose mask cannot (torch.compile) is
    compared at p = 0, and then at p under the mask that its own gradient of x shows (see _check_dropout).
    """
    without = replace(case.settings, dropout=0.0)
    if case.settings == without or peer.mask is not None or not peer.trained:
        passed = _passed[build, case.settings] = _check_exactly(peer, case)
        return passed
    if (build, without) not in _passed:  # compiling it again only for this would cost seconds
        plain = replace(case, settings=without)
        _passed[build, without] = _check_exactly(build(plain), plain)
    return max(_passed[build, without], _check_dropout(build, case))


def _check_exactly(peer: Peer, case: Case) -> float:
    torch.manual_seed(1)
    mask = None if peer.mask is None else peer.mask()
    torch.manual_seed(1)
    return _judge([_compare(_run(peer, case), _expected(peer.gate, mask, case))], case.x.dtype)


def _check_dropout(build: Callable[[Case], Peer], case: Case) -> float:
    """Reads the mask off the gradient of x, compares all else under it, and judges how much it drops.

    The update's part of that gradient is mask · (what it is at p = 0), element by element. A mask of other values than
    0 and 1/(1-p), or another one in y or in the gradient of A, B or the gate, does not pass. The share of kept elements
    must be within five standard errors of 1 - p.
    """
    case, p = _readable(case), case.settings.dropout
    peer = build(case)
    wide = torch.promote_types(case.x.dtype, torch.float32)
    through = case.dy.to(wide) @ case.weight.to(wide)
    update = _expected(peer.gate, None, case)["x"] - through
    calls = min(math.ceil(DROPPED / (p * (1.0 - p) * case.x.numel())), CALLS)
    torch.manual_seed(1)
    compared, kept = [], 0
    for _ in range(calls):
        found = _run(peer, case)
        mask = ((found["x"] - through) / update > 0.5 / (1.0 - p)).to(update.dtype)
        compared.append(_compare(found, _expected(peer.gate, mask / (1.0 - p), case)))
        kept += int(mask.sum())
    worst = _judge(compared, case.x.dtype, f"dropout {p:g}, under the mask that the gradient of x shows: ")
    share, limit = kept / (calls * case.x.numel()), 5.0 * math.sqrt(p * (1.0 - p) / (calls * case.x.numel()))
    if abs(share - (1.0 - p)) > limit:
        raise WrongPeer(f"dropout {p:g} keeps {share:.4g} of x, expected {1.0 - p:.4g} ± {limit:.2g}")
    return worst


def _readable(case: Case) -> Case:
    """The case with A, B and dy positive, away from zero: no element of the update's dx is small then. dy is scaled
    down, lest the sums, which no longer cancel, be too large for float16."""

    def positive(tensor: Tensor) -> Tensor:
        return tensor.detach().abs() + tensor.detach().abs().mean()

    return replace(case, A=positive(case.A), B=positive(case.B), dy=positive(case.dy) * case.settings.d_out**-0.5)


def _run(peer: Peer, case: Case) -> dict[str, Tensor]:
    """y and the gradients of x and of all that the peer trains, by name."""
    y = peer.call(case.x)
    grads = iter(torch.autograd.grad(y, [case.x, *peer.parameters], case.dy))
    found = {"y": y.detach(), "x": next(grads)}
    for name, tensors in peer.trained.items():
        found[name] = torch.cat([next(grads) for _ in tensors], dim=1 if name == "B" else 0)
    return found


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


def _compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each tensor found its largest difference and the largest value wanted, [2]; WrongPeer for another shape."""
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise WrongPeer(f"{_called(name)} has shape {list(tensor.shape)}, expected {list(wanted[name].shape)}")
    return {name: torch.stack([(found[name] - wanted[name]).abs().max(), wanted[name].abs().max()]) for name in found}


def _judge(calls: list[dict[str, Tensor]], dtype: torch.dtype, under: str = "") -> float:
    """The worst of all tensors' largest differences over their largest values, over all calls, as _compare gives them.

    Raises WrongPeer, which begins with `under`, beyond the tolerance, and for nan.
    """
    errors = {}
    for name in calls[0]:
        difference, size = torch.stack([call[name] for call in calls]).amax(0).tolist()
        ratio = difference / size if size else math.inf
        errors[name] = 0.0 if difference == 0.0 else math.inf if math.isnan(ratio) else ratio
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] > TOLERANCE[dtype]:
        what = f"{under}{_called(worst)}"
        raise WrongPeer(f"{what} differs from the reference by {errors[worst]:.2g} of its largest value")
    return errors[worst]


def _called(name: str) -> str:
    return "y" if name == "y" else f"the gradient of {name}"
