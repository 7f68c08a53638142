"""Projections that share a pass over their input equal separate ones: in every backend, value and gradients."""

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, F64, LAZY, Case, within

import ilora
from ilora.op import backends
from ilora.op.shared_input import Projection, SharedInput

WIDTHS = (12, 7, 50)
CASES = {
    "equal instances": Case(M=60, N=3, d_in=77),
    "dropout": Case(M=66, N=2, d_in=77, dropout_p=0.3),
    "dropout, strided, segments": Case(lengths=(9, 0, 20), dropout_p=0.5, strided=True),
    "token gates": Case(M=50, N=50),
    "one row": Case(M=1, N=1),
    "no rows": Case(M=0, N=2),
    "one expert, odd features": Case(M=67, N=1, E=1, R=3, d_in=131),
    "the largest rank": Case(M=36, R=84),
    "no bias": Case(bias=False),
}


def problem(case, change=lambda t: t):
    """x, gate, segments, the projections and their dys; x and gate are the first's."""
    each = [replace(case, d_out=width, seed=case.seed + i).tensors() for i, width in enumerate(WIDTHS)]
    each = [{k: v if v is None or k == "segments" else change(v) for k, v in t.items()} for t in each]
    leaves = {k: each[0][k].detach().requires_grad_() for k in ("x", "gate")}
    projections = []
    for i, t in enumerate(each):
        for k in ("A", "B"):
            leaves[f"{k}{i}"] = t[k].detach().requires_grad_()
        projections.append(Projection(t["weight"], t["bias"], leaves[f"A{i}"], leaves[f"B{i}"]))
    return leaves, projections, each[0]["segments"], [t["dy"] for t in each]


def outputs(case, backend, change=lambda t: t, scaling=2.0):
    """Every y and every gradient: of a shared input in a backend, or of the definition of separate layers (None)."""
    leaves, projections, segments, dys = problem(case, change)
    x, gate = leaves["x"], leaves["gate"]
    if backend is None:
        settings = (gate, scaling, segments, case.dropout_p, 77)
        ys = [ilora.reference.ilora_linear(x, p.weight, p.bias, p.A, p.B, *settings) for p in projections]
    else:
        shared = SharedInput(x, projections, gate, scaling, segments, case.dropout_p, 77, backend)
        ys = [shared.y(j) for j in range(len(WIDTHS))]
    grads = torch.autograd.grad(ys, list(leaves.values()), dys)
    return {f"y{j}": y.detach() for j, y in enumerate(ys)} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition_of_separate_layers(target, name):
    backend, device = target
    slow = backend == "triton" and device == "cpu" and name != "no bias"  # the interpreter
    for dtype, adapter_dtype in DTYPES[backend][: 1 if slow else None]:
        case = replace(CASES[name], dtype=dtype, adapter_dtype=adapter_dtype, device=device)
        exact = outputs(case, None, lambda t: t.to(F64))
        sizes = outputs(case, None, lambda t: t.to(F64) ** 2, 4.0)
        within(case, outputs(case, backend), outputs(case, None), exact, sizes)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_same_bits_every_time(target, dropout_p):
    case = replace(Case(M=100, N=4, d_in=70, dropout_p=dropout_p), device=target[1])
    first, second = outputs(case, target[0]), outputs(case, target[0])
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_float64_gradients_against_finite_differences(backend, dropout_p):
    if (reason := backends.why_not(backend, "cpu", F64)) is not None:
        pytest.skip(reason)
    draw = lambda *shape: torch.randn(*shape, dtype=F64).requires_grad_()  # noqa: E731
    tensors = [t for width in (4, 3) for t in (draw(width, 5), draw(width), draw(6, 5), draw(width, 6))]

    def f(x, gate, *flat):
        projections = [Projection(*flat[i : i + 4]) for i in (0, 4)]
        shared = SharedInput(x, projections, gate, 1.5, None, dropout_p, 11, backend)
        return shared.y(1), shared.y(0)

    assert torch.autograd.gradcheck(f, [draw(3, 2, 5), draw(3, 3), *tensors])


@pytest.mark.parametrize("kind", [*LAZY, "batched"])
def test_a_dy_whose_memory_does_not_hold_its_values(kind, target):
    backend, device = target
    leaves, projections, _, dys = problem(replace(CASES["dropout"], device=device))
    weight, bias = projections[1].weight.requires_grad_(), projections[1].bias.requires_grad_()
    shared = SharedInput(leaves["x"], projections, leaves["gate"], 2.0, None, 0.3, 5, backend)
    ys, asked = [shared.y(j) for j in range(3)], [*leaves.values(), weight, bias]

    def gradients(dys, **options):
        return torch.autograd.grad(ys, asked, dys, retain_graph=True, **options)

    if kind == "batched":
        found = gradients([torch.stack([dy, -2 * dy]) for dy in dys], is_grads_batched=True)
        expected = [torch.stack([grad, -2 * grad]) for grad in gradients(dys)]
    else:
        found = gradients([LAZY[kind](dy) for dy in dys])
        expected = gradients([torch.zeros_like(dy) if kind == "a lazy zero" else dy for dy in dys])
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_token_gate_may_have_the_dimensions_of_x(target):
    backend, device = target
    leaves, projections, _, dys = problem(replace(CASES["token gates"], device=device))
    x, gate = leaves["x"].view(5, 10, -1), leaves["gate"].view(5, 10, -1)
    shared = SharedInput(x, projections, gate, 2.0, backend=backend)
    flat = SharedInput(leaves["x"], projections, leaves["gate"], 2.0, backend=backend)
    for j, dy in enumerate(dys):
        found, expected = shared.y(j), flat.y(j)
        assert torch.equal(found.flatten(0, 1), expected)
        pairs = ((found, dy.view(found.shape)), (expected, dy))
        grads = [torch.autograd.grad(y, leaves["gate"], dy, retain_graph=True)[0] for y, dy in pairs]
        assert torch.equal(*grads)


def test_only_what_was_called_and_asked_for_gets_a_gradient(target):
    backend, device = target
    leaves, projections, _, dys = problem(replace(CASES["dropout"], device=device))
    x, gate = leaves["x"], leaves["gate"]
    weight, bias = projections[1].weight.requires_grad_(), projections[1].bias.requires_grad_()
    leaves["A1"].requires_grad_(False)
    leaves["x"].requires_grad_(False)
    SharedInput(x, projections, gate, 2.0, None, 0.3, 5, backend).y(1).backward(dys[1])
    mine = {"weight": weight.grad, "bias": bias.grad, **{k: v.grad for k, v in leaves.items()}}
    for t in (weight, bias, *leaves.values()):
        t.grad = None
    ilora.ilora_linear(x, *projections[1], gate, 2.0, None, 0.3, 5, backend).backward(dys[1])
    for key, got in mine.items():
        want = {"weight": weight, "bias": bias, **leaves}[key].grad
        assert (got is None) == (want is None) == (key not in ("weight", "bias", "B1", "gate"))
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_double_backward_is_refused_and_only_then():
    case = CASES["equal instances"]
    leaves, projections, _, dys = problem(case)
    shared = SharedInput(leaves["x"], projections, leaves["gate"], 2.0)
    ys = [shared.y(j).relu_() for j in range(3)]  # an output may be changed in place
    plain = torch.autograd.grad(ys, leaves["x"], dys, retain_graph=True)[0]
    (dx,) = torch.autograd.grad(ys, leaves["x"], dys, create_graph=True)
    assert torch.equal(plain, dx)
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*ilora\.reference"):
        dx.square().sum().backward()


def test_what_is_kept_for_backward_is_x_once_and_the_ranks():
    leaves, projections, _, _ = problem(Case(M=300, N=3, d_in=40, dropout_p=0.2))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        shared = SharedInput(leaves["x"], projections, leaves["gate"], 2.0, None, 0.2, 5)
        ys = [shared.y(j) for j in range(3)]
    parameters = [leaves["gate"], *(t for p in projections for t in p)]
    allowed = sum(t.nbytes for t in parameters) + leaves["x"].nbytes + 4 * 300 * 3 * 8 + 8
    assert sum(kept.values()) <= allowed
    assert len(ys) == 3


def test_bad_arguments_are_named():
    leaves, projections, _, _ = problem(Case())
    with pytest.raises(ValueError, match=r"gate: \[5, 4\] does not fit x \[24, 20\]"):
        SharedInput(leaves["x"], projections, torch.ones(5, 4), 2.0)
    for scaling in (torch.ones((), requires_grad=True), torch.ones(2)):
        with pytest.raises(TypeError, match="scaling: expected a number, got a tensor"):
            SharedInput(leaves["x"], projections, leaves["gate"], scaling)
    with pytest.raises(ValueError, match=r"segments: expected offsets rising from 0 to M=24"):
        SharedInput(leaves["x"], projections, leaves["gate"], 2.0, torch.tensor([0, 5, 9, 23], dtype=torch.int32))


def test_triton_reads_x_once_each_way(monkeypatch):
    """Counted in the launches: one that reads x forward, one backward, and each dy once."""
    if (reason := backends.why_not("triton", "cuda" if torch.cuda.is_available() else "cpu")) is not None:
        pytest.skip(reason)
    from ilora.kernels import replay

    case = Case(M=40, N=2, d_in=33, device="cuda" if torch.cuda.is_available() else "cpu")
    leaves, projections, _, dys = problem(case)
    replay.forget()
    read, run = [], replay.run

    def counted(launches, device):
        wide = [launch.args.get(name) for launch in launches for name in ("x_ptr", "dy_ptr")]
        read.extend(tensor.data_ptr() for tensor in wide if tensor is not None)
        return run(launches, device)

    monkeypatch.setattr(replay, "run", counted)
    x = leaves["x"]
    shared = SharedInput(x, projections, leaves["gate"], 2.0, backend="triton")
    ys = [shared.y(j) for j in range(3)]
    assert read == [x.data_ptr()]
    torch.autograd.grad(ys, list(leaves.values()), dys)
    assert sorted(read[1:]) == sorted([x.data_ptr(), *(dy.data_ptr() for dy in dys)])


def test_a_default_device_elsewhere_changes_nothing():
    leaves, projections, _, dys = problem(Case())

    def results():
        shared = SharedInput(leaves["x"], projections, leaves["gate"], 2.0)
        ys = [shared.y(j) for j in range(3)]
        return [*ys, *torch.autograd.grad(ys, list(leaves.values()), dys)]

    expected = results()
    torch.set_default_device("meta")
    try:
        found = results()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
