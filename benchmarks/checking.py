"""Checks a peer against the reference: y, and the gradients of x and of all tensors that it trains."""

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
DROPPED = 100  # so many elements must be dropped, and kept, before their share is judged
CALLS = 50  # at most so many calls are made for that

_passed: dict[tuple[Callable[[Case], Peer], Settings], float] = {}


class WrongPeer(AssertionError):
    """A peer does not compute what the reference computes; the message names the tensor and the error."""


def check_inference(peer: Peer, case: Case) -> float:
    """Compares y alone, without gradients; see check."""
    with torch.no_grad():
        found = {"y": peer.call(case.x)}
    return _judge([_compare(found, _expected(peer.gate, None, case))], case.x.dtype)


def check(peer: Peer, build: Callable[[Case], Peer], case: Case) -> float:
    """Compares a peer, made by `build` from the case, with the reference: y and every gradient.

    Returns the largest error, relative to the largest value of its tensor; raises WrongPeer beyond the tolerance.
    The reference runs in float32 (float64) on the same tensors. With dropout, a peer whose mask can be drawn again from
    the same state of torch's generator is compared under that mask. A peer whose mask cannot be known (torch.compile)
    is compared at p = 0, and then at p under the mask that its own gradient of x shows (see _check_dropout).
    """
    without = replace(case.settings, dropout=0.0)
    if case.settings == without or peer.mask is not None or not peer.trained:
        passed = _passed[build, case.settings] = _check_exactly(peer, case)
        return passed
    if (build, without) not in _passed:  # compiling again for this check would take seconds
        plain = replace(case, settings=without)
        _passed[build, without] = _check_exactly(build(plain), plain)
    return max(_passed[build, without], _check_dropout(build, case))


def _check_exactly(peer: Peer, case: Case) -> float:
    torch.manual_seed(1)
    mask = None if peer.mask is None else peer.mask()
    torch.manual_seed(1)
    return _judge([_compare(run_peer(peer, case), _expected(peer.gate, mask, case))], case.x.dtype)


def _check_dropout(build: Callable[[Case], Peer], case: Case) -> float:
    """Reads the mask off the gradient of x, compares all other results under it, and checks the share that it keeps.

    The update's part of that gradient is the mask times its value at p = 0, element by element. The check fails for a
    mask with values other than 0 and 1/(1-p), for another mask in y or in the gradients of A, B or the gate, and for a
    share of kept elements more than five standard errors away from 1 - p.
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
        found = run_peer(peer, case)
        mask = ((found["x"] - through) / update > 0.5 / (1.0 - p)).to(update.dtype)
        compared.append(_compare(found, _expected(peer.gate, mask / (1.0 - p), case)))
        kept += int(mask.sum())
    worst = _judge(compared, case.x.dtype, f"dropout {p:g}, under the mask that the gradient of x shows: ")
    share, limit = kept / (calls * case.x.numel()), 5.0 * math.sqrt(p * (1.0 - p) / (calls * case.x.numel()))
    if abs(share - (1.0 - p)) > limit:
        raise WrongPeer(f"dropout {p:g} keeps {share:.4g} of x, expected {1.0 - p:.4g} ± {limit:.2g}")
    return worst


def _readable(case: Case) -> Case:
    """The case with A, B and dy positive and away from zero, so that no element of the update's dx is small. dy is
    scaled down, because sums that no longer cancel would overflow float16."""

    def positive(tensor: Tensor) -> Tensor:
        return tensor.detach().abs() + tensor.detach().abs().mean()

    return replace(case, A=positive(case.A), B=positive(case.B), dy=positive(case.dy) * case.settings.d_out**-0.5)


def run_peer(peer: Peer, case: Case) -> dict[str, Tensor]:
    """y and the gradients of x and of all tensors that the peer trains, by name."""
    y = peer.call(case.x)
    grads = iter(torch.autograd.grad(y, [case.x, *peer.parameters], case.dy))
    found = {"y": y.detach(), "x": next(grads)}
    for name, tensors in peer.trained.items():
        found[name] = torch.cat([next(grads) for _ in tensors], dim=1 if name == "B" else 0)
    return found


@torch.enable_grad()
def _expected(gate: Tensor, mask: Tensor | None, case: Case) -> dict[str, Tensor]:
    """y and the gradients of x, A, B and gate by the reference, whose update reads x · mask."""
    wide = torch.promote_types(case.x.dtype, torch.float32)
    x, A, B = (t.detach().to(wide).requires_grad_() for t in (case.x, case.A, case.B))
    weight, bias, gate = case.weight.to(wide), case.bias.to(wide), gate.detach().to(wide).requires_grad_()
    seen = x if mask is None else x * mask
    update = reference.ilora_linear(seen, torch.zeros_like(weight), None, A, B, gate, case.scaling)
    y = F.linear(x, weight, bias) + update
    grads = torch.autograd.grad(y, [x, A, B, gate], case.dy.to(wide))
    return {"y": y.detach(), **dict(zip(("x", "A", "B", "gate"), grads, strict=True))}


def _compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """[largest difference, largest wanted value] of each tensor; WrongPeer for another shape."""
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise WrongPeer(f"{_called(name)} has shape {list(tensor.shape)}, expected {list(wanted[name].shape)}")
    return {name: torch.stack([(found[name] - wanted[name]).abs().max(), wanted[name].abs().max()]) for name in found}


def _judge(calls: list[dict[str, Tensor]], dtype: torch.dtype, under: str = "") -> float:
    """The worst ratio of a difference to a largest value, over all tensors and calls, as _compare gives them.

    Raises WrongPeer beyond the tolerance and for NaN; `under` begins its message.
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
