"""Every backend against the definition, over shapes, dtypes, strides, segments and dropout."""

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, OUTPUTS, Case, assert_same, check, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ilora
from ilora.op.shared_input import Projection, SharedInput

EDGES = {
    "one row": Case(M=1, N=1),
    "no rows": Case(M=0, N=2),
    "no rows, no instances": Case(M=0, N=0),
    "one expert": Case(E=1, R=8),
    "an expert a rank": Case(E=8, R=8),
    "rank one": Case(E=1, R=1),
    "rank not a power of two": Case(E=3, R=12),
    "rank 64": Case(R=64, M=69, d_in=65),
    "the largest rank": Case(R=256, E=4, M=36),
    "token gates": Case(M=50, N=50),
    "one gate": Case(M=50, N=1),
    "segments": Case(lengths=(5, 1, 17, 30)),
    "empty segments": Case(lengths=(0, 5, 0, 0, 7, 0)),
    "segments with no rows": Case(lengths=(0, 0)),
    "features of one": Case(d_in=1, d_out=1),
    "odd features": Case(M=67, N=1, d_in=131, d_out=97),
    "a narrow sum beside a larger update": Case(
        M=15, N=3, E=3, R=9, d_in=4, d_out=75, lengths=(0, 2, 18), strided=True, dropout_p=0.6, seed=0
    ),
    "wide": Case(M=9, d_in=1030, d_out=517),
    "tall": Case(M=1100, N=2, d_in=9, d_out=7),
    "one long instance": Case(M=1100, N=1, d_in=9, d_out=7),
    "whole blocks": Case(M=192, N=2, d_in=192, d_out=96),
    "blocks and a rest": Case(M=156, N=1, R=12, d_in=250, d_out=1201),
    "no bias": Case(bias=False),
    "strided": Case(strided=True),
    "dropout": Case(M=66, N=2, d_in=77, dropout_p=0.3),
    "dropout, strided, segments": Case(lengths=(9, 0, 20), dropout_p=0.5, strided=True),
}


def on(target, case, dtypes):
    return replace(case, dtype=dtypes[0], adapter_dtype=dtypes[1], device=target[1])


@pytest.mark.parametrize("edge", EDGES)
def test_edges(target, edge):
    for dtypes in DTYPES[target[0]]:
        check(on(target, EDGES[edge], dtypes), target[0])


@st.composite
def cases(draw):
    E = draw(st.integers(1, 5))
    N = draw(st.integers(1, 6))
    lengths = draw(st.none() | st.lists(st.integers(0, 20), min_size=1, max_size=6).map(tuple))
    return Case(
        M=N * draw(st.integers(0, 20)),
        N=N,
        E=E,
        R=E * draw(st.integers(1, 6)),
        d_in=draw(st.integers(1, 90)),
        d_out=draw(st.integers(1, 90)),
        lengths=lengths,
        bias=draw(st.booleans()),
        strided=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.6])),
        seed=draw(st.integers(0, 10**6)),
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(target, data):
    dtypes = data.draw(st.sampled_from(DTYPES[target[0]]))
    check(on(target, data.draw(cases()), dtypes), target[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_same_bits_every_time(target, dropout_p):
    case = replace(Case(M=300, N=3, d_in=130, d_out=70, dropout_p=dropout_p), device=target[1])
    first, second = run(case, target[0]), run(case, target[0])
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


@pytest.mark.skipif(ilora.op.backends.why_not("native", "cpu") is not None, reason="the native module is not built")
def test_native_bits_do_not_depend_on_threads():
    """The low-rank part, that is: the product with W is the BLAS's, so W is left out."""
    case = Case(M=3000, N=3, d_in=64, d_out=48, dropout_p=0.1)
    t = case.tensors()
    threads = torch.get_num_threads()

    def outputs():
        leaves = [t[k].detach().requires_grad_() for k in ("x", "A", "B", "gate")]
        y = ilora.ilora_update(leaves[0], None, *leaves[1:], 2.0, None, 0.1, 77, backend="native")
        return y, *torch.autograd.grad(y, leaves, t["dy"])

    try:
        torch.set_num_threads(1)
        one = outputs()
        torch.set_num_threads(3)
        three = outputs()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_update_alone_and_upon_a_base(target):
    backend, device = target
    t = Case(M=24, N=3, device=device).tensors()
    leaves = [t[k].requires_grad_() for k in ("x", "A", "B", "gate")]
    base = torch.randn_like(t["dy"]).requires_grad_()
    untouched = base.detach().clone()
    zero = torch.zeros_like(t["weight"])
    want = [ilora.reference.ilora_linear(leaves[0], zero, None, *leaves[1:], 2.0) for _ in range(2)]
    alone = ilora.ilora_update(leaves[0], None, *leaves[1:], 2.0, backend=backend)
    upon = ilora.ilora_update(leaves[0], base, *leaves[1:], 2.0, backend=backend)
    assert_same(alone, want[0], leaves, t["dy"])
    assert_same(upon, want[1] + base, [*leaves, base], t["dy"])
    assert torch.equal(base, untouched)


@pytest.mark.parametrize("shared", [False, True])
def test_a_bias_and_segments_with_strides(target, shared):
    backend, device = target
    t = Case(lengths=(5, 0, 17, 2), device=device).tensors()
    bias, segments = torch.stack([t["bias"]] * 3, 1)[:, 1], torch.stack([t["segments"]] * 2, 1)[:, 0]
    assert not bias.is_contiguous()
    assert not segments.is_contiguous()
    leaves = [t[k].requires_grad_() for k in ("x", "A", "B", "gate")]
    x, A, B, gate = leaves
    if shared:
        y = SharedInput(x, [Projection(t["weight"], bias, A, B)], gate, 2.0, segments, backend=backend).y(0)
    else:
        y = ilora.ilora_linear(x, t["weight"], bias, A, B, gate, 2.0, segments, backend=backend)
    expected = ilora.reference.ilora_linear(x, t["weight"], t["bias"], A, B, gate, 2.0, t["segments"])
    assert_same(y, expected, leaves, t["dy"])


def test_an_expanded_dy_and_inputs_left_as_they_were(target):
    backend, device = target
    t = Case(M=24, N=3, device=device).tensors()
    before = {k: v.clone() for k, v in t.items() if v is not None}
    leaves = [t[k].requires_grad_() for k in ("x", "A", "B", "gate")]
    y = ilora.ilora_linear(leaves[0], t["weight"], t["bias"], *leaves[1:], 2.0, backend=backend)
    assert_same(y, ilora.reference.ilora_linear(leaves[0], t["weight"], t["bias"], *leaves[1:], 2.0), leaves)
    assert all(torch.equal(t[k], v) for k, v in before.items())
