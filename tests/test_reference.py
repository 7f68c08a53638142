"""The definition against literals worked by hand, and against finite differences."""

import pytest
import torch
from cases import F64

import ilora
from ilora.reference import ilora_linear, keep_mask, row_instances


def worked_example(gate, segments=None):
    """d_in = 2, d_out = 1, R = E = 2: x Wᵀ = x0 + 10 x1, expert 0 adds 2·3·g0·x0 and expert 1 2·5·g1·x1."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    W, A, B = torch.tensor([[1.0, 10.0]]), torch.eye(2), torch.tensor([[3.0, 5.0]])
    return ilora_linear(x, W, torch.tensor([100.0]), A, B, torch.tensor(gate), 2.0, segments)


def test_one_gate_for_all_rows():
    # 100 + x0 + 10 x1 + 2·(3·0.5·x0 + 5·0.25·x1): 121 + 3 + 5, 143 + 9 + 10, 165 + 15 + 15
    assert worked_example([[0.5, 0.25]]).flatten().tolist() == [129.0, 162.0, 195.0]


def test_token_gates():
    # rows: 121 + 2·3·1; 143 + 2·5·4; 165 unchanged by a zero gate
    assert worked_example([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).flatten().tolist() == [127.0, 183.0, 165.0]


def test_segments_with_an_empty_one():
    # instance 0 owns row 0, instance 1 none, instance 2 rows 1 and 2: 121 + 6; 143 + 10·4; 165 + 10·6
    segments = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    assert worked_example([[1.0, 0.0], [9.0, 9.0], [0.0, 1.0]], segments).flatten().tolist() == [127.0, 183.0, 225.0]


def test_experts_own_contiguous_ranks():
    # R = 4, E = 2: expert 0 owns ranks 0 and 1. x = 1, A = 1: xa = [1, 1, 1, 1]; B = [1, 10, 100, 1000]
    A, B = torch.ones(4, 1), torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    y = ilora_linear(torch.ones(1, 1), torch.zeros(1, 1), None, A, B, torch.tensor([[2.0, 3.0]]), 1.0)
    assert y.item() == 2 * 11 + 3 * 1100


def test_equals_plain_lora_with_one_expert():
    x, W, A, B = torch.randn(5, 6), torch.randn(4, 6), torch.randn(3, 6), torch.randn(4, 3)
    y = ilora_linear(x, W, None, A, B, torch.ones(1, 1), 0.5)
    torch.testing.assert_close(y, x @ W.T + 0.5 * (x @ A.T) @ B.T)


def test_equals_the_sum_over_experts_of_the_paper():
    x, W, A, B = torch.randn(2, 3, 6), torch.randn(4, 6), torch.randn(6, 6), torch.randn(4, 6)
    g = torch.rand(2, 3)
    experts = torch.stack([x @ A[2 * e : 2 * e + 2].T @ B[:, 2 * e : 2 * e + 2].T for e in range(3)], dim=2)
    want = x @ W.T + 4.0 * torch.einsum("bseo,be->bso", experts, g)
    torch.testing.assert_close(ilora_linear(x, W, None, A, B, g, 4.0), want)


def test_dropout_scales_what_it_keeps():
    x, A, B, eye = torch.ones(3, 50), torch.eye(50), torch.eye(50), torch.ones(1, 1)
    y = ilora_linear(x, torch.zeros(50, 50), None, A, B, eye, 1.0, None, 0.2, seed=3)
    keep = keep_mask(torch.tensor([3]), 3, 50, 0.2)
    torch.testing.assert_close(y, keep / 0.8)


def test_rows_map_to_instances():
    cpu = torch.device("cpu")
    assert row_instances(6, 3, None, cpu).tolist() == [0, 0, 1, 1, 2, 2]
    offsets = torch.tensor([0, 0, 2, 2, 5, 6, 6], dtype=torch.int32)
    assert row_instances(6, 6, offsets, cpu).tolist() == [1, 1, 3, 3, 3, 4]
    assert row_instances(0, 0, None, cpu).tolist() == []


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [None, (2, 0, 1)])
@pytest.mark.parametrize("backend", ["definition", "reference", "native"])
def test_float64_gradients_against_finite_differences(backend, lengths, dropout_p):
    if backend != "definition" and (reason := ilora.op.backends.why_not(backend, "cpu", F64)) is not None:
        pytest.skip(reason)
    x, W, b = torch.randn(3, 5, dtype=F64), torch.randn(4, 5, dtype=F64), torch.randn(4, dtype=F64)
    A, B, gate = torch.randn(6, 5, dtype=F64), torch.randn(4, 6, dtype=F64), torch.rand(3, 3, dtype=F64)
    segments = None if lengths is None else torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)

    def f(x, W, b, A, B, gate):
        if backend == "definition":
            return ilora_linear(x, W, b, A, B, gate, 1.5, segments, dropout_p, 11)
        return ilora.ilora_linear(x, W, b, A, B, gate, 1.5, segments, dropout_p, 11, backend=backend)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (x, W, b, A, B, gate)])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_float64_gradients_of_the_update_alone(backend):
    if (reason := ilora.op.backends.why_not(backend, "cpu", F64)) is not None:
        pytest.skip(reason)
    x, base = torch.randn(2, 2, 5, dtype=F64), torch.randn(2, 2, 4, dtype=F64)
    A, B, gate = torch.randn(6, 5, dtype=F64), torch.randn(4, 6, dtype=F64), torch.rand(2, 3, dtype=F64)

    def f(x, base, A, B, gate):
        return ilora.ilora_update(x, base, A, B, gate, 1.5, backend=backend)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (x, base, A, B, gate)])
