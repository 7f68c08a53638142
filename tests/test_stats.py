"""The balance loss, the numbers of a gate, and its picture."""

import math
import sys

import pytest
import torch

from ilora.gates.stats import balance_loss, gate_stats, plot_gates


def test_balance_loss_by_hand():
    assert balance_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == 0  # unlike instances, but alike experts
    assert balance_loss(torch.full((3, 4), 0.25)) == 0
    assert balance_loss(torch.tensor([[1.0, 0.0, 0.0, 0.0]])) == 3
    assert balance_loss(torch.ones(5, 1)) == 0
    # importance (3/4, 1/4): 2 · (9/16 + 1/16) - 1 = 1/4
    assert balance_loss(torch.tensor([[1.0, 0.0], [0.5, 0.5]])) == 0.25
    assert balance_loss(torch.tensor([[2.0, 0.0], [1.0, 1.0]])) == 0.25  # of shares: a gate's sum does not matter
    layers = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]])
    assert balance_loss(layers) == 0.125


def test_balance_loss_is_the_formula():
    gate = torch.rand(6, 5, dtype=torch.float64)
    share = gate.mean(0) / gate.mean(0).sum()
    torch.testing.assert_close(balance_loss(gate), 5 * share.square().sum() - 1)


def test_balance_loss_gradients():
    torch.manual_seed(0)
    gate = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(balance_loss, (gate,))
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    balance_loss(logits.softmax(-1)).backward()
    assert (logits.grad[:, 0] > 0).all()  # descent takes from the expert that has too much
    assert balance_loss(torch.rand(2, 3).bfloat16()).dtype == torch.float32


def test_refuses_what_is_no_gate():
    for wrong in (torch.rand(4), torch.rand(0, 4), torch.rand(1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"gate: expected \[N, E\] or \[G, N, E\], not empty, got \["):
            balance_loss(wrong)
    for wrong, got in ((torch.ones(2, 4, dtype=torch.int64), "torch.int64"), ([[1.0]], "list")):
        with pytest.raises(TypeError, match=f"gate: expected a float tensor, .*, got {got}"):
            balance_loss(wrong)


def test_stats_by_hand():
    stats = gate_stats(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], requires_grad=True))
    assert stats.entropy == pytest.approx(0.25)  # (0 + log 2 / log 4) / 2
    assert stats.usage == (0.75, 0.25, 0.0, 0.0)
    assert stats.top1 == (0.75, 0.25, 0.0, 0.0)  # the tie is shared
    assert stats.balance == pytest.approx(4 * (9 + 1) / 16 - 1)
    assert stats.instances == 2


def test_stats_of_the_extremes():
    uniform = gate_stats(torch.full((3, 4), 0.25))
    assert (uniform.entropy, uniform.balance) == (pytest.approx(1.0), 0.0)
    assert uniform.usage == uniform.top1 == (0.25,) * 4
    single = gate_stats(torch.ones(3, 1))
    assert (single.entropy, single.usage, single.top1, single.balance) == (0.0, (1.0,), (1.0,), 0.0)
    layered = gate_stats(torch.eye(2)[:, None])  # each of two layers has an expert of its own
    assert (layered.entropy, layered.usage, layered.balance, layered.instances) == (0.0, (0.5, 0.5), 1.0, 1)


def test_stats_read_well():
    text = str(gate_stats(torch.tensor([[0.75, 0.25]])))
    lines = text.splitlines()
    assert lines[0].startswith("gate of 1 instances, 2 experts: entropy 0.811")
    assert lines[1:] == ["  usage   0.750   0.250", "  top1    1.000   0.000"]


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (2000, 4), (5, 60, 20), (1, 3, 4)])
def test_plot(tmp_path, shape):
    pytest.importorskip("matplotlib")
    before = set(sys.modules)
    gate = torch.randn(shape).softmax(-1).requires_grad_()
    path = plot_gates(gate, str(tmp_path / "gate.png"), labels=[f"user {i}" for i in range(shape[-2])])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_plot_leaves_nothing_behind_when_it_fails(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nope"):
        plot_gates(torch.ones(2, 1), tmp_path / "gate.nope")
    with pytest.raises(ValueError, match="labels: expected one for each of 2 instances, got 1"):
        plot_gates(torch.ones(2, 1), tmp_path / "gate.png", labels=["a"])
    assert not list(tmp_path.iterdir())


def test_plot_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_gates(torch.ones(2, 1), tmp_path / "gate.png")


def test_entropy_of_unnormalised_rows():
    assert gate_stats(torch.tensor([[2.0, 2.0]])).entropy == pytest.approx(1.0)
    assert math.isfinite(gate_stats(torch.zeros(1, 2)).entropy)
