"""The op layer: registration, compile, autocast, the choice of backend, and every refusal."""

import shutil

import numpy as np
import pytest
import torch
from cases import BF16, F32, F64, Case, assert_same

import ilora
from ilora.op import backends

SAMPLE = {"M": 24, "N": 3}


def arguments(**changes):
    t = Case(**SAMPLE).tensors()
    known = {k: t[k] for k in ("x", "weight", "bias", "A", "B", "gate", "segments")} | {"scaling": 2.0}
    return known | changes


def leaves_of(arguments):
    for name in ("x", "A", "B", "gate"):
        arguments[name].requires_grad_()
    return [arguments[name] for name in ("x", "A", "B", "gate")]


def test_opcheck(target):
    backend, device = target
    t = Case(**SAMPLE, lengths=(10, 0, 14), device=device).tensors()
    seed = torch.tensor([3], device=device)
    names = ("x", "weight", "bias", "A", "B", "gate", "segments")
    x, weight, bias, A, B, gate, segments = (t[k] for k in names)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for base in (None, torch.randn_like(t["dy"])):
        frozen = (None, None, base) if base is not None else (weight, bias, None)
        args = (x, *frozen, A, B, gate, segments, 2.0, 0.1, seed, backend)
        torch.library.opcheck(torch.ops.ilora.forward, args, test_utils=tests)
    _, xa = torch.ops.ilora.forward(*args)
    for need_dx in (True, False):
        args = (t["dy"], x, xa, weight, A, B, gate, segments, 2.0, 0.1, seed, need_dx, backend)
        torch.library.opcheck(torch.ops.ilora.backward, args, test_utils=tests)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_in_one_graph_forward_and_backward(target, compiler):
    backend, device = target
    if compiler == "inductor" and (backend == "triton" and device == "cpu"):
        pytest.skip("one inductor run a device is enough; the interpreter is no target of inductor")
    if compiler == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    t = Case(**SAMPLE, device=device).tensors()
    leaves = [t[k].requires_grad_() for k in ("x", "A", "B", "gate")]

    def f(x, A, B, gate):
        return ilora.ilora_linear(x, t["weight"], t["bias"], A, B, gate, 2.0, None, 0.2, 5, backend=backend).sin()

    assert_same(torch.compile(f, fullgraph=True, backend=compiler)(*leaves), f(*leaves), leaves, t["dy"], 1e-5)


def test_a_changing_seed_compiles_in_one_graph():
    kwargs = arguments(dropout_p=0.5, backend="reference")
    compiled = torch.compile(lambda seed: ilora.ilora_linear(**kwargs, seed=seed), backend="eager", fullgraph=True)
    for seed in (3, 4, 5, 6):  # from the second on torch takes it for a symbol
        assert torch.equal(compiled(seed), ilora.ilora_linear(**kwargs, seed=seed))


def test_compiles_with_dynamic_shapes_without_recompiling():
    torch._dynamo.reset()
    kwargs = arguments()
    compiled = torch.compile(lambda x: ilora.ilora_linear(**{**kwargs, "x": x}), dynamic=True, backend="aot_eager")
    compiled(torch.randn(24, 20))
    with torch.compiler.set_stance("fail_on_recompile"):
        for M in (30, 48):
            x = torch.randn(M, 20)
            torch.testing.assert_close(compiled(x), ilora.ilora_linear(**{**kwargs, "x": x}))


def test_autocast_casts_as_a_linear_does(target):
    backend, device = target
    if backend == "triton" and device == "cpu":
        pytest.skip("CPU autocast is bfloat16, which Triton's interpreter computes wrongly")
    t = Case(**SAMPLE, device=device).tensors()
    leaves = [t[k].requires_grad_() for k in ("x", "A", "B", "gate")]
    with torch.autocast(device, dtype=BF16):
        y = ilora.ilora_linear(leaves[0], t["weight"], t["bias"], *leaves[1:], 2.0, backend=backend)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert y.dtype == BF16
    assert [g.dtype for g in grads] == [F32] * 4
    want = ilora.reference.ilora_linear(leaves[0], t["weight"], t["bias"], *leaves[1:], 2.0)
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    for a, b in zip(grads, torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


def test_autocast_leaves_float64_alone():
    t = Case(**SAMPLE, dtype=F64).tensors()
    with torch.autocast("cpu", dtype=BF16):
        y = ilora.ilora_linear(t["x"], t["weight"], t["bias"], t["A"], t["B"], t["gate"], 2.0)
    assert y.dtype == F64


def test_double_backward_is_refused_and_only_then(target):
    backend, device = target
    t = Case(**SAMPLE, device=device).tensors()
    leaves = [t[k].requires_grad_() for k in ("x", "A", "B", "gate")]
    y = ilora.ilora_linear(leaves[0], t["weight"], t["bias"], *leaves[1:], 2.0, backend=backend)
    with_graph = torch.autograd.grad(y.sum(), leaves, create_graph=True)
    plain = torch.autograd.grad(
        ilora.ilora_linear(leaves[0], t["weight"], t["bias"], *leaves[1:], 2.0, backend=backend).sum(), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(with_graph, plain, strict=True))
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*ilora\.reference"):
        with_graph[0].square().sum().backward()


def test_only_the_gradients_asked_for():
    kwargs = arguments()
    kwargs["B"].requires_grad_()
    kwargs["weight"].requires_grad_()
    ilora.ilora_linear(**kwargs).sum().backward()
    want = ilora.reference.ilora_linear(**kwargs).sum()
    for name in ("B", "weight"):
        torch.testing.assert_close(kwargs[name].grad, torch.autograd.grad(want, kwargs[name], retain_graph=True)[0])
    assert all(kwargs[name].grad is None for name in ("x", "A", "gate", "bias"))


def test_the_output_may_be_changed_in_place():
    kwargs = arguments()
    leaves = leaves_of(kwargs)
    assert_same(ilora.ilora_linear(**kwargs).relu_(), ilora.reference.ilora_linear(**kwargs).relu(), leaves)


@pytest.mark.parametrize("shape", [(20,), (24, 20), (2, 3, 4, 20), (0, 20), (3, 0, 20)])
def test_leading_dimensions(shape):
    kwargs = arguments(x=torch.randn(shape), gate=torch.rand(1, 4))
    leaves = [kwargs[name].requires_grad_() for name in ("x", "weight", "bias", "A", "B", "gate")]
    y, want = ilora.ilora_linear(**kwargs), ilora.reference.ilora_linear(**kwargs)
    assert y.shape == (*shape[:-1], 12)
    assert_same(y, want, leaves)


def test_saves_x_xa_and_the_arguments_and_nothing_else():
    kwargs = arguments(dropout_p=0.1)
    leaves_of(kwargs)
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ilora.ilora_linear(**kwargs)
    known = {kwargs[k].untyped_storage().data_ptr() for k in ("x", "weight", "A", "B", "gate")}
    rest = [size for pointer, size in saved.items() if pointer not in known]
    assert sorted(rest) == [8, 24 * 8 * 4]  # the seed; xa [24, 8] float32


BAD = [
    ("x", "text", TypeError, r"x: expected a torch\.Tensor, got str"),
    ("x", torch.ones(24, 20, dtype=torch.int64), TypeError, r"x: expected one of .* got torch\.int64"),
    ("x", torch.tensor(1.0), ValueError, r"x: expected \[\.\.\., d_in\]"),
    ("x", torch.ones(24, 0), ValueError, r"d_in >= 1, got \[24, 0\]"),
    ("x", torch.ones(24, 20, dtype=F64), TypeError, r"weight: expected x's dtype torch\.float64, got torch\.float32"),
    ("x", torch.ones(24, 20, device="meta"), ValueError, r"weight: expected it on x's device meta, got cpu"),
    ("weight", torch.ones(11, 20), ValueError, r"weight: expected \[d_out=12, d_in=20\].* got \[11, 20\]"),
    ("bias", torch.ones(11), ValueError, r"bias: expected \[d_out=12\], got \[11\]"),
    ("A", torch.ones(8, 21), ValueError, r"A: expected \[R, d_in=20\].* got \[8, 21\]"),
    ("A", torch.ones(0, 20), ValueError, r"rank of 1 to 256, got R=0"),
    ("A", torch.ones(257, 20), ValueError, r"rank of 1 to 256, got R=257"),
    ("A", torch.ones(8, 20, dtype=BF16), TypeError, r"B: expected A's dtype torch\.bfloat16, got torch\.float32"),
    (
        "x",
        torch.ones(24, 20).to_sparse(),
        TypeError,
        r"x: expected a dense tensor, got one of layout torch\.sparse_coo",
    ),
    ("x", torch.nested.nested_tensor([torch.ones(2, 20)] * 12), TypeError, r"x: expected a dense tensor, got a nested"),
    ("weight", torch.ones(12, 20).to_sparse_csr(), TypeError, r"weight: expected a dense tensor.*sparse_csr"),
    ("bias", torch.ones(12).to_sparse(), TypeError, r"bias: expected a dense tensor.*sparse_coo"),
    ("A", torch.ones(8, 20).to_sparse_bsc((2, 2)), TypeError, r"A: expected a dense tensor.*sparse_bsc"),
    ("B", torch.ones(12, 8).to_mkldnn(), TypeError, r"B: expected a dense tensor, got one of layout torch\._mkldnn"),
    ("gate", torch.ones(3, 4).to_sparse(), TypeError, r"gate: expected a dense tensor.*sparse_coo"),
    ("B", torch.ones(0, 8), ValueError, r"B: expected \[d_out, R=8\] with d_out >= 1, got \[0, 8\]"),
    ("B", torch.ones(12, 7), ValueError, r"B: expected \[d_out, R=8\].* got \[12, 7\]"),
    ("gate", torch.ones(4), ValueError, r"gate: expected \[N, E\].* got \[4\]"),
    ("gate", torch.ones(3, 3), ValueError, r"E=3 experts must divide the rank R=8"),
    (
        "gate",
        torch.ones(5, 4),
        ValueError,
        r"gate: \[5, 4\] does not fit x \[24, 20\]: N=5 must divide 24; .*segments=",
    ),
    ("gate", torch.ones(0, 4), ValueError, r"gate: \[0, 4\] does not fit x \[24, 20\]: N=0 must divide 24"),
    ("segments", torch.tensor([0, 24], dtype=torch.int32), ValueError, r"expected \[N\+1=4\] row offsets"),
    ("segments", torch.tensor([0, 5, 9, 24]), TypeError, r"segments: expected torch\.int32, got torch\.int64"),
    (
        "segments",
        torch.tensor([0, 9, 5, 24], dtype=torch.int32),
        ValueError,
        r"rising from 0 to M=24, got \[0, 9, 5, 24\]",
    ),
    ("segments", torch.tensor([0, 5, 9, 23], dtype=torch.int32), ValueError, r"rising from 0 to M=24"),
    ("segments", torch.tensor([1, 5, 9, 24], dtype=torch.int32), ValueError, r"rising from 0 to M=24"),
    ("base", torch.ones(12, 12), ValueError, r"base: expected \[24, 12\].* got \[12, 12\]"),
    ("dropout_p", 1.0, ValueError, r"dropout_p: expected 0 <= p < 1, got 1\.0"),
    ("dropout_p", -0.1, ValueError, r"dropout_p"),
    ("dropout_p", float("nan"), ValueError, r"dropout_p"),
    ("dropout_p", torch.tensor(0.1, requires_grad=True), TypeError, r"dropout_p: .*requires a gradient"),
    ("dropout_p", "0.1", TypeError, r"dropout_p: expected a number, got '0\.1'"),
    (
        "scaling",
        torch.nn.Parameter(torch.ones(1)),
        TypeError,
        r"scaling: .*requires a gradient.*multiply the gate by it",
    ),
    ("scaling", torch.ones(2), TypeError, r"scaling: expected a number, got a tensor \[2\] of torch\.float32 on cpu"),
    ("scaling", torch.ones(0), TypeError, r"scaling: expected a number, got a tensor \[0\]"),
    ("scaling", torch.ones((), dtype=torch.complex64), TypeError, r"scaling: expected a number.*complex64"),
    ("scaling", torch.ones((), device="meta"), TypeError, r"scaling: expected a number.*on meta"),
    ("scaling", 1j, TypeError, r"scaling: expected a number, got 1j"),
    ("seed", 2**63, ValueError, r"seed: expected 64 bits"),
    ("seed", "1", TypeError, r"seed: expected an int, a tensor or None, got str"),
    ("seed", torch.tensor([1.0]), ValueError, r"seed: expected one torch\.int64"),
    ("backend", "cuda", ValueError, r"backend='cuda': expected one of reference, native, triton"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_are_named(name, value, error, message):
    known = arguments(**{name: value})
    if name == "base":
        del known["weight"], known["bias"]
    with pytest.raises(error, match=message):
        (ilora.ilora_update if name == "base" else ilora.ilora_linear)(**known)


FITTING = [  # x without d_in, gate without E; how many rows an instance has
    ((6, 10), (6,), 10),
    ((6, 10), (3,), 20),  # an instance has two rows of the batch, as with beams
    ((6, 10), (1,), 60),
    ((6, 10), (60,), 1),
    ((6, 10), (6, 10), 1),
    ((2, 3, 4), (6,), 4),  # a choice is an instance
    ((2, 3, 4), (2, 3), 4),
    ((2, 3, 4), (2,), 12),
    ((2, 3, 4), (2, 3, 4), 1),
    ((2, 3, 4), (24,), 1),
    ((1, 8), (8,), 1),
    ((60,), (15,), 4),  # flattened already
    ((60,), (60,), 1),
    ((), (1,), 1),
]
CUTTING = [((6, 10), n) for n in (4, 5, 10, 12, 15, 20, 30)] + [((2, 3, 4), n) for n in (3, 4, 8, 12)]
CUTTING += [((1, 8), 2), ((1, 8), 4), ((7, 256), 8), ((3, 0), 2), ((), 2), ((6, 10), 0)]


@pytest.mark.parametrize(("leading", "gates", "length"), FITTING)
def test_gates_that_fit(leading, gates, length, target):
    backend, device = target
    t = Case(M=60, device=device).tensors()
    low, gate = (t["A"], t["B"]), torch.rand(*gates, 4, device=device, requires_grad=True)
    x, rows = torch.randn(*leading, 20, device=device), gate.reshape(-1, 4).repeat_interleave(length, 0)
    for f in (ilora.ilora_linear, ilora.ilora_update):
        frozen = (t["weight"], t["bias"]) if f is ilora.ilora_linear else (None,)
        ours = f(x, *frozen, *low, gate, 2.0, backend=backend)
        each = f(x.reshape(-1, 20), *frozen, *low, rows, 2.0, backend="reference").view_as(ours)
        assert_same(ours, each, [gate])
    assert_same(
        *(f(x, t["weight"], None, *low, gate, 2.0) for f in (ilora.ilora_linear, ilora.reference.ilora_linear)), [gate]
    )


@pytest.mark.parametrize(("leading", "N"), CUTTING)
def test_gates_that_would_cut_a_sequence(leading, N):
    known = arguments(x=torch.randn(*leading, 20), gate=torch.rand(N, 4))
    message = rf"gate: \[{N}, 4\] does not fit x \[{', '.join(map(str, (*leading, 20)))}\]: N={N} must .*segments="
    with pytest.raises(ValueError, match=message):
        ilora.ilora_linear(**known)
    if N:
        lengths = torch.tensor([0] * N + [known["x"].numel() // 20], dtype=torch.int32)
        ilora.ilora_linear(**known | {"segments": lengths})


@pytest.mark.parametrize("gates", [(6, 1), (10, 6), (3, 10), (6, 10, 1), (2, 6)])
def test_gates_of_other_dimensions_are_refused(gates):
    with pytest.raises(ValueError, match=r"gate: expected \[N, E\].*x's first dimensions.*for x \[6, 10, 20\]"):
        ilora.ilora_linear(**arguments(x=torch.randn(6, 10, 20), gate=torch.rand(*gates, 4)))


def test_a_scaling_that_is_learned_multiplies_the_gate():
    """As the message says; and where no gradient is wanted, any tensor of one element will do."""
    known, scaling = arguments(), torch.tensor([1.5], requires_grad=True)
    y = ilora.ilora_linear(**known | {"scaling": 1.0, "gate": known["gate"] * scaling})
    assert_same(y, ilora.reference.ilora_linear(**known | {"scaling": scaling}), [scaling])
    with torch.no_grad():
        assert torch.equal(
            ilora.ilora_linear(**known | {"scaling": scaling}), ilora.ilora_linear(**known | {"scaling": 1.5})
        )
    with pytest.raises(TypeError, match="scaling: expected a number, got a tensor that requires a gradient"):
        torch.func.grad(lambda s: ilora.ilora_linear(**known | {"scaling": s}).sum())(torch.tensor(2.0))


@pytest.mark.parametrize("backend", [None, "reference", "native", "triton"])
def test_every_backend_gives_shapes_on_the_meta_device(backend):
    known = {k: v.to("meta") for k, v in arguments().items() if isinstance(v, torch.Tensor)}
    leaves = [t.requires_grad_() for t in known.values()]
    y = ilora.ilora_linear(**known, scaling=2.0, dropout_p=0.1, backend=backend)
    assert (y.shape, y.device.type, y.requires_grad) == ((24, 12), "meta", True)
    assert [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [t.shape for t in leaves]
    with torch.no_grad():
        update = ilora.ilora_update(known["x"], y, known["A"], known["B"], known["gate"], 2.0, backend=backend)
    assert (update.shape, update.device.type) == ((24, 12), "meta")
    with pytest.raises(ValueError, match=r"backend='cuda': expected one of"):
        ilora.ilora_linear(**known, scaling=2.0, backend="cuda")


def low(d_in, d_out):
    return torch.ones(4, d_in), torch.ones(d_out, 4), torch.ones(2, 2), 1.0


TWICE = {  # one tensor in two places or more
    "x and base": ((8, 12), lambda x: ilora.ilora_update(x, x, *low(12, 12))),
    "x and weight": ((12, 12), lambda x: ilora.ilora_linear(x, x, None, *low(12, 12))),
    "weight and A": ((4, 12), lambda w: ilora.ilora_linear(torch.ones(8, 12), w, None, w, *low(12, 4)[1:])),
    "all but the bias": ((4, 4), lambda x: ilora.ilora_linear(x, x, None, x, x, x, 1.0)),
    "x and a token gate": ((4, 4), lambda x: ilora.ilora_update(x, None, torch.eye(4), torch.eye(4), x, 1.0)),
    "two views": ((8, 12), lambda x: ilora.ilora_update(x[:, :6], x[:, 6:], *low(6, 6))),
}


@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_in_two_places_compiles_in_one_graph(name):
    torch._dynamo.reset()
    shape, f = TWICE[name]
    x = torch.randn(shape, requires_grad=True)
    assert_same(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x), [x])


def test_a_seed_may_be_numpys():
    y = [ilora.ilora_linear(**arguments(dropout_p=0.5, seed=seed)) for seed in (3, np.int64(3))]
    assert torch.equal(*y)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_segments_that_changed_before_the_backward_are_refused(backend):
    """A loader may use its buffer anew, which torch does not notice; what lies outside x must not be read."""
    if (reason := backends.why_not(backend, "cpu")) is not None:
        pytest.skip(reason)
    buffer = np.array([0, 5, 9, 24], dtype=np.int32)
    kwargs = arguments(segments=torch.from_numpy(buffer), backend=backend)
    leaves = leaves_of(kwargs)
    y = ilora.ilora_linear(**kwargs)
    buffer[1:3] = 10**9, 15 * 10**8
    with pytest.raises(ValueError, match="segments: expected offsets rising from 0 to M=24"):
        torch.autograd.grad(y.sum(), leaves)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_dropped_is_gone_whatever_it_was(backend, value):
    if (reason := backends.why_not(backend, "cpu")) is not None:
        pytest.skip(reason)
    results = {}
    for name in ("reference", backend):
        known = arguments()
        known["x"][3, 4] = known["x"][5, 6] = value
        leaves = leaves_of(known)
        low = (known["A"], known["B"], known["gate"], 2.0)
        y = ilora.ilora_update(known["x"], torch.zeros(24, 12), *low, dropout_p=0.9, seed=1, backend=name)
        results[name] = [y, *torch.autograd.grad(y[:3].sum() + y[6:].sum(), leaves)]
    assert results[backend][0].isfinite().sum() > 200
    for ours, theirs in zip(results[backend], results["reference"], strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


def test_environment_chooses_and_names_itself(monkeypatch):
    kwargs = arguments()
    monkeypatch.setenv("ILORA_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"ILORA_BACKEND='fastest'"):
        ilora.ilora_linear(**kwargs)
    ilora.ilora_linear(**kwargs, backend="reference")  # the argument goes first
    monkeypatch.setenv("ILORA_BACKEND", "reference")
    ilora.ilora_linear(**kwargs)


def test_a_backend_that_cannot_run_says_why():
    t = Case(**SAMPLE, dtype=torch.float16).tensors()
    names = ("x", "weight", "bias", "A", "B", "gate")
    with pytest.raises(ilora.BackendUnavailable, match=r"native.*float16"):
        ilora.ilora_linear(*(t[k] for k in names), 2.0, backend="native")


def test_available_backends_are_those_of_devices_that_are_there(monkeypatch):
    everywhere = ilora.available_backends()
    assert {"reference", *ilora.available_backends("cpu")} <= set(everywhere) <= set(ilora.op.backends.NAMES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ilora.available_backends("cuda") == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "reference" in ilora.available_backends("cuda:0")
    assert ilora.available_backends("cuda:1") == ()
    with pytest.raises(RuntimeError, match="gpu"):
        ilora.available_backends("gpu")
