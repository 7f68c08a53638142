"""The dropout mask: its statistics, and that every backend uses the same one, forward and backward."""

import math

import pytest
import torch

import ilora
from ilora.reference import keep_mask


def dropped(seed, M, d, p):
    return (~keep_mask(torch.tensor([seed]), M, d, p)).double()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_independence(p):
    M, d = 512, 768
    z = (dropped(2024, M, d, p) - p) / math.sqrt(p * (1 - p))
    assert abs(z.sum() / math.sqrt(M * d)) < 4
    assert z.sum(0).div(math.sqrt(M)).std().item() == pytest.approx(1, abs=0.1)
    assert z.sum(1).div(math.sqrt(d)).std().item() == pytest.approx(1, abs=0.13)
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128):
        rows, columns = z[lag:] * z[:-lag], z[:, lag:] * z[:, :-lag]
        assert abs(rows.sum() / math.sqrt(rows.numel())) < 5, f"rows {lag} apart agree"
        assert abs(columns.sum() / math.sqrt(columns.numel())) < 5, f"columns {lag} apart agree"


def test_neighbouring_seeds_give_unrelated_masks():
    # The number of dropped elements must spread as a binomial's too. It would not if seeds permuted one mask.
    p, M, d, seeds = 0.5, 64, 128, 400
    z = torch.stack([dropped(seed, M, d, p) - p for seed in range(seeds)]).flatten(1) / math.sqrt(p * (1 - p))
    assert (z.sum(1) / math.sqrt(M * d)).std().item() == pytest.approx(1, abs=0.15)
    pairs = (z @ z.T / math.sqrt(M * d)).fill_diagonal_(0)
    assert pairs.abs().max() < 6
    for seed in (2**32, 2**40, -1):
        assert abs((z[0] * (dropped(seed, M, d, p) - p).flatten()).sum() / math.sqrt(M * d) * 2) < 5


def test_mask_literals():
    """They never change: a change would silently alter every seeded run."""
    mask = keep_mask(torch.tensor([1234567890123456789]), 4, 8, 0.5).int()
    assert ["".join(map(str, row)) for row in mask.tolist()] == MASK


MASK = ["10100101", "11101000", "10010000", "11000011"]


def test_the_mask_is_a_function_of_row_and_column_alone():
    big, small = keep_mask(torch.tensor([9]), 50, 70, 0.3), keep_mask(torch.tensor([9]), 20, 33, 0.3)
    assert torch.equal(big[:20, :33], small)


@pytest.mark.parametrize("seed", [0, 1, -7, 2**31, 2**40 + 3, 2**63 - 1, -(2**63)])
def test_every_backend_draws_this_mask_forward_and_backward(target, seed):
    """With A, B = I and W = 0, y is the scaled mask; with dy = 1, so is dx."""
    backend, device = target
    d, p = 40, 0.25
    x = torch.ones(21, d, device=device, requires_grad=True)
    eye = torch.eye(d, device=device)
    y = ilora.ilora_linear(x, torch.zeros_like(eye), None, eye, eye, eye[:1, :1], 0.75, None, p, seed, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    want = keep_mask(torch.tensor([seed]), 21, d, p).float()
    assert torch.equal(y.detach().cpu(), want)
    assert torch.equal(dx.cpu(), want)


def test_seeds_come_from_torchs_generator(target):
    backend, device = target
    x, W, A, B = (torch.randn(s, device=device) for s in ((8, 16), (4, 16), (4, 16), (4, 4)))
    gate = torch.ones(1, 1, device=device)

    def draw():
        return ilora.ilora_linear(x, W, None, A, B, gate, 1.0, None, 0.5, backend=backend)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
