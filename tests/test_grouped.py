"""The grouped operation: rows sorted by slot, each slot with an A, a B and a weight of its own."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from cases import BF16, DTYPES, F32, F64, OUTPUTS, within
from torch.utils._python_dispatch import TorchDispatchMode

import ilora
from ilora.grouped import reference
from ilora.op import backends


@dataclass
class Case:
    """One problem. lengths: rows of each slot. shared: one weight for all slots."""

    lengths: tuple[int, ...] = (7, 0, 12, 5)
    N: int = 3
    E: int = 4
    R: int = 8
    d_in: int = 20
    d_out: int = 12
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype = F32
    bias: bool = True
    shared: bool = False
    dropout_p: float = 0.0
    strided: bool = False
    device: str = "cpu"

    def tensors(self):
        """x, weight, bias, A, B, gate, offsets, instances, dy: random, of the scale that a trained layer has."""
        rng = torch.Generator().manual_seed(sum(self.lengths) + 1000 * self.R)
        M, X = sum(self.lengths), len(self.lengths)

        def draw(*shape, dtype=self.dtype):
            return torch.randn(*shape, generator=rng, dtype=F64).to(dtype).to(self.device)

        slots = () if self.shared else (X,)
        x, dy = draw(M, self.d_in), draw(M, self.d_out)
        weight = draw(*slots, self.d_out, self.d_in) / self.d_in**0.5
        if self.strided:  # columns far apart, rows with a gap, a weight stored transposed
            x, dy = draw(self.d_in, M + 3).T[1 : M + 1], draw(M, 2 * self.d_out + 1)[:, 1 : self.d_out + 1]
            weight = weight.mT.contiguous().mT
        made = {
            "x": x,
            "weight": weight,
            "bias": draw(*slots, self.d_out) if self.bias else None,
            "A": draw(X, self.R, self.d_in, dtype=self.adapter_dtype) / self.d_in**0.5,
            "B": draw(X, self.d_out, self.R, dtype=self.adapter_dtype) / 4,
            "gate": torch.rand(self.N, self.E, generator=rng, dtype=F64).to(F64 if self.dtype is F64 else F32),
            "offsets": torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32),
            "instances": torch.randint(max(self.N, 1), (M,), generator=rng).to(torch.int32),
            "dy": dy,
        }
        return {name: None if tensor is None else tensor.to(self.device) for name, tensor in made.items()}


def run(case, backend, wide=False, squared=False):
    """y and the gradients: by a backend, or by the definition (backend None), on inputs cast to float64 when wide."""
    tensors = case.tensors()
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point():
            tensors[name] = (tensor * tensor if squared else tensor).to(F64 if wide else tensor.dtype)
    x, A, B, gate = leaves = [tensors[name].detach().requires_grad_() for name in ("x", "A", "B", "gate")]
    settings = (4.0 if squared else 2.0, tensors["offsets"], tensors["instances"], case.dropout_p, 77)
    frozen = (tensors["weight"], tensors["bias"])
    if backend is None:
        y = reference.grouped_linear(x, *frozen, A, B, gate, *settings)
    else:
        y = ilora.grouped_linear(x, *frozen, A, B, gate, *settings, backend=backend)
    return dict(zip(OUTPUTS, (y.detach(), *torch.autograd.grad(y, leaves, tensors["dy"])), strict=True))


def test_literals():
    """d_in = 2, d_out = 1, R = E = 2. Slot 0: x Wᵀ = x0 + 10 x1, update 2·(3·g0·x0 + 5·g1·x1). Slot 1 has no row.
    Slot 2: x Wᵀ = 100 x0, bias 7, update 2·(g0·x1 + g1·x0)."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    W = torch.tensor([[[1.0, 10.0]], [[9.0, 9.0]], [[100.0, 0.0]]])
    b = torch.tensor([[0.0], [9.0], [7.0]])
    A = torch.stack([torch.eye(2), torch.full((2, 2), 9.0), torch.eye(2).flip(0)])
    B = torch.tensor([[[3.0, 5.0]], [[9.0, 9.0]], [[1.0, 1.0]]])
    gate, offsets = torch.tensor([[0.5, 0.25], [1.0, 0.0]]), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    instances = torch.tensor([1, 0, 0], dtype=torch.int32)
    # row 0, gate [1, 0]: 21 + 2·3·1; row 1, gate [.5, .25]: 43 + 2·(3·.5·3 + 5·.25·4); row 2: 507 + 2·(.5·6 + .25·5)
    want = [27.0, 62.0, 515.5]
    assert reference.grouped_linear(x, W, b, A, B, gate, 2.0, offsets, instances).flatten().tolist() == want


EDGES = {
    "empty slots": Case(),
    "one row": Case(lengths=(0, 0, 1, 0)),
    "no rows": Case(lengths=(0, 0)),
    "one slot": Case(lengths=(31,)),
    "all rows in one slot": Case(lengths=(0, 0, 700, 0)),
    "a row a slot": Case(lengths=(1,) * 40, N=40),
    "many slots, skewed": Case(lengths=tuple(400 // (s + 1) for s in range(64)), N=8),
    "long runs and short": Case(lengths=(1100, 3, 0, 250), d_in=77, d_out=40),
    "one expert": Case(E=1),
    "rank not a power of two": Case(E=3, R=12),
    "the largest rank": Case(R=256),
    "odd features": Case(lengths=(67, 5), d_in=131, d_out=97),
    "wide": Case(lengths=(9, 3), d_in=1030, d_out=517),
    "one weight for all": Case(shared=True),
    "one weight, no bias": Case(shared=True, bias=False),
    "no bias": Case(bias=False),
    "slots of one and of several blocks": Case(lengths=(40, 0, 3, 67, 1), R=33, E=3, d_in=70, d_out=33),
    "strided": Case(strided=True),
    "dropout": Case(lengths=(40, 0, 26), d_in=77, dropout_p=0.3),
    "dropout, strided": Case(dropout_p=0.5, strided=True),
}


INTERPRETED = ("triton", "cpu")  # as slow as it is, it runs the edges that are ways of their own through the kernels
INTERPRETED_EDGES = ("empty slots", "one row", "no rows", "one slot", "rank not a power of two", "odd features")
INTERPRETED_EDGES += ("one weight for all", "strided", "slots of one and of several blocks", "dropout")


@pytest.mark.parametrize("edge", EDGES)
def test_edges(target, edge):
    """The rule of the plain operation: error below twice that of the definition in the same dtype."""
    backend, device = target
    if target == INTERPRETED and edge not in INTERPRETED_EDGES:
        pytest.skip("slow in Triton's interpreter")
    for dtype, adapter_dtype in DTYPES[backend][: 1 if target == INTERPRETED and edge != "dropout" else None]:
        case = replace(EDGES[edge], dtype=dtype, adapter_dtype=adapter_dtype, device=device)
        exact, sizes = run(case, None, wide=True), run(case, None, wide=True, squared=True)
        within(case, run(case, backend), run(case, None), exact, sizes)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", ["definition", "reference", "native"])
def test_float64_gradients_against_finite_differences(backend, shared, dropout_p):
    if backend != "definition" and (reason := backends.why_not(backend, "cpu", F64)) is not None:
        pytest.skip(reason)
    t = Case(lengths=(2, 0, 3), R=4, E=2, d_in=5, d_out=4, dtype=F64, adapter_dtype=F64, shared=shared).tensors()

    def f(x, A, B, gate):
        settings = (1.5, t["offsets"], t["instances"], dropout_p, 11)
        if backend == "definition":
            return reference.grouped_linear(x, t["weight"], t["bias"], A, B, gate, *settings)
        return ilora.grouped_linear(x, t["weight"], t["bias"], A, B, gate, *settings, backend=backend)

    assert torch.autograd.gradcheck(f, [t[name].requires_grad_() for name in ("x", "A", "B", "gate")])


def test_one_slot_equals_the_plain_operation(target):
    """Forward and backward, dropout's mask included."""
    backend, device = target
    t = Case(lengths=(24,), dropout_p=0.3, device=device).tensors()
    leaves = [t[name].requires_grad_() for name in ("x", "A", "B", "gate")]
    order = torch.argsort(t["instances"], stable=True)
    t["instances"], counts = t["instances"][order], torch.bincount(t["instances"], minlength=3)
    segments = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    x, A, B, gate = leaves
    settings = (t["offsets"], t["instances"], 0.3, 5)
    y = ilora.grouped_linear(x, t["weight"], t["bias"], A, B, gate, 2.0, *settings, backend=backend)
    plain = ilora.ilora_linear(
        x, t["weight"][0], t["bias"][0], A[0], B[0], gate, 2.0, segments, 0.3, 5, backend=backend
    )
    torch.testing.assert_close(y, plain)
    for a, b in zip(*(torch.autograd.grad(out, leaves, t["dy"]) for out in (y, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_update_alone_and_upon_a_base(target):
    backend, device = target
    t = Case(device=device).tensors()
    leaves = [t[name].requires_grad_() for name in ("x", "A", "B", "gate")]
    base = torch.randn_like(t["dy"]).requires_grad_()
    untouched = base.detach().clone()
    settings = (*leaves[1:], 2.0, t["offsets"], t["instances"])
    alone = ilora.grouped_update(leaves[0], None, *settings, backend=backend)
    upon = ilora.grouped_update(leaves[0], base, *settings, backend=backend)
    zero = torch.zeros_like(t["weight"])
    want = reference.grouped_linear(leaves[0], zero, None, *settings)
    torch.testing.assert_close(alone, want)
    torch.testing.assert_close(upon, want + base)
    assert torch.equal(base, untouched)
    grads = torch.autograd.grad(upon, [*leaves, base], t["dy"])
    for a, b in zip(grads, (*torch.autograd.grad(want, leaves, t["dy"]), t["dy"]), strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_bits_every_time(target):
    backend, device = target
    case = Case(lengths=(40, 0, 4), dropout_p=0.2, device=device)
    first, second = run(case, backend), run(case, backend)
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


def test_the_same_bits_with_any_number_of_threads():
    if (reason := backends.why_not("native", "cpu")) is not None:
        pytest.skip(reason)
    t = Case(lengths=(900, 0, 40, 1, 300), d_in=130, d_out=70).tensors()
    threads = torch.get_num_threads()

    def outputs(count):  # the product with W is the BLAS's, whose threads may change its bits, so W is left out
        torch.set_num_threads(count)
        leaves = [t[name].detach().requires_grad_() for name in ("x", "A", "B", "gate")]
        settings = (*leaves[1:], 2.0, t["offsets"], t["instances"], 0.2, 77)
        y = ilora.grouped_update(leaves[0], None, *settings, backend="native")
        return y, *torch.autograd.grad(y, leaves, t["dy"])

    try:
        one, three = outputs(1), outputs(3)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_saved_for_backward_are_x_and_xa_alone(target):
    backend, device = target
    t = Case(lengths=(30, 20), N=7, dropout_p=0.3, device=device).tensors()
    x, A, B, gate = (t[name].requires_grad_() for name in ("x", "A", "B", "gate"))
    y = ilora.grouped_linear(
        x, t["weight"], t["bias"], A, B, gate, 2.0, t["offsets"], t["instances"], 0.3, backend=backend
    )
    given = {each.data_ptr() for each in t.values()}
    saved = [each for each in y.grad_fn.saved_tensors if each is not None and each.data_ptr() not in given]
    assert sorted(list(each.shape) for each in saved) == [[1], [50, 8]]  # the seed, and xa


class Unread(TorchDispatchMode):
    """Refuses operations whose result or its shape depends on values: a GPU would have to be waited for."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags), op
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("shared", [False, True])
def test_triton_reads_no_value_on_the_host(target, shared):
    if target[0] != "triton":
        pytest.skip("these read the offsets, which lie on the CPU")
    from ilora.kernels import grouped

    t = Case(lengths=(2, 0, 3), shared=shared, device=target[1]).tensors()
    x, dy, A, B, weight, offsets = (t[name] for name in ("x", "dy", "A", "B", "weight", "offsets"))
    gates = (offsets, t["gate"], t["instances"], 2.0)
    with Unread():
        xa = grouped.shrink_x(x, A, offsets, 0.0, None)
        y = grouped.expand_xa(x, xa, weight, t["bias"], None, B, *gates)
        dxa, dB, dgate = grouped.backward_dy(dy, xa, B, *gates)
        dx, dA = grouped.backward_x(dxa, x, A, offsets, 0.0, None, [(dy, weight)], True)
        with pytest.raises(AssertionError):
            offsets[0].item()
    leaves = [t[name].requires_grad_() for name in ("x", "A", "B", "gate")]
    want = reference.grouped_linear(leaves[0], weight, t["bias"], *leaves[1:], 2.0, offsets, t["instances"])
    expected = (want, *torch.autograd.grad(want, leaves, dy))
    torch.testing.assert_close((y, dx, dA, dB, dgate), expected)


def test_opcheck(target):
    backend, device = target
    if target == INTERPRETED:
        pytest.skip("slow in Triton's interpreter")
    t = Case(device=device).tensors()
    seed, names = torch.tensor([3], device=device), ("A", "B", "gate", "offsets", "instances")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for frozen in ((t["weight"], t["bias"], None), (None, None, torch.randn_like(t["dy"]))):
        args = (t["x"], *frozen, *(t[name] for name in names), 2.0, 0.1, seed, backend)
        torch.library.opcheck(torch.ops.ilora.grouped_forward, args, test_utils=tests)
    _, xa = torch.ops.ilora.grouped_forward(*args)
    for need_dx in (True, False):
        args = (t["dy"], t["x"], xa, t["weight"], *(t[name] for name in names), 2.0, 0.1, seed, need_dx, backend)
        torch.library.opcheck(torch.ops.ilora.grouped_backward, args, test_utils=tests)


def test_compiles_in_one_graph(target):
    torch._dynamo.reset()
    backend, device = target
    if target == INTERPRETED:
        pytest.skip("slow in Triton's interpreter")
    t = Case(device=device).tensors()
    leaves = [t[name].requires_grad_() for name in ("x", "A", "B", "gate")]

    def f(x, A, B, gate):
        settings = (2.0, t["offsets"], t["instances"], 0.2, 5)
        return ilora.grouped_linear(x, t["weight"], t["bias"], A, B, gate, *settings, backend=backend).sin()

    results = [
        (y, *torch.autograd.grad(y, leaves, t["dy"]))
        for y in (torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), f(*leaves))
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_as_a_linear_does(target):
    backend, device = target
    if target == INTERPRETED:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    t = Case(device=device).tensors()
    settings = (t["A"], t["B"], t["gate"], 2.0, t["offsets"], t["instances"])
    with torch.autocast(device, dtype=BF16):
        y = ilora.grouped_linear(t["x"], t["weight"], t["bias"], *settings, backend=backend)
    assert y.dtype == BF16
    want = reference.grouped_linear(t["x"], t["weight"], t["bias"], *settings)
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)


def test_double_backward_is_refused(target):
    backend, device = target
    t = Case(device=device).tensors()
    x = t["x"].requires_grad_()
    settings = (t["A"], t["B"], t["gate"], 2.0, t["offsets"], t["instances"])
    y = ilora.grouped_linear(x, t["weight"], None, *settings, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.zeros(24, 3, 20)}, ValueError, r"x: expected \[M, d_in\]"),
        ({"A": torch.zeros(8, 20)}, ValueError, r"A: expected \[X, R, d_in=20\]"),
        ({"A": torch.zeros(4, 300, 20)}, ValueError, "rank of 1 to 256"),
        ({"B": torch.zeros(3, 12, 8)}, ValueError, r"B: expected \[X=4, d_out, R=8\]"),
        ({"B": torch.zeros(4, 12, 8, dtype=F64)}, TypeError, "B: expected A's dtype"),
        ({"gate": torch.zeros(3, 3)}, ValueError, "E=3 experts must divide the rank R=8"),
        ({"weight": torch.zeros(4, 12, 19)}, ValueError, r"weight: expected \[4, 12, 20\]"),
        ({"weight": None}, TypeError, "grouped_update"),
        ({"weight": torch.zeros(4, 12, 20).requires_grad_()}, ValueError, "weight: it is frozen here"),
        ({"bias": torch.zeros(12)}, ValueError, r"bias: expected \[4, 12\]"),
        ({"offsets": torch.tensor([0, 7, 19, 24])}, TypeError, "offsets: expected torch.int32"),
        ({"offsets": torch.zeros(4, dtype=torch.int32)}, ValueError, r"offsets: expected \[5\]"),
        ({"offsets": torch.tensor([0, 9, 7, 20, 24], dtype=torch.int32)}, ValueError, "rising from 0 to M=24"),
        ({"offsets": torch.tensor([0, 7, 7, 19, 23], dtype=torch.int32)}, ValueError, "rising from 0 to M=24"),
        ({"instances": torch.zeros(23, dtype=torch.int32)}, ValueError, r"instances: expected \[24\]"),
        ({"instances": torch.full((24,), 3, dtype=torch.int32)}, ValueError, "numbers from 0 to N-1=2"),
        ({"instances": torch.full((24,), -1, dtype=torch.int32)}, ValueError, "numbers from 0 to N-1=2"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"backend": "cublas"}, ValueError, "expected one of"),
    ],
)
def test_refusals(changes, error, words):
    arguments = {name: tensor for name, tensor in Case().tensors().items() if name != "dy"}
    with pytest.raises(error, match=words):
        ilora.grouped_linear(**{**arguments, "scaling": 2.0, **changes})


@pytest.mark.parametrize("shared", [False, True])
def test_flops_are_counted(shared):
    from torch.utils.flop_counter import FlopCounterMode

    t, (M, d_in, d_out, R) = Case(shared=shared).tensors(), (24, 20, 12, 8)
    leaves = [t[name].requires_grad_() for name in ("x", "A", "B", "gate")]
    settings = (*leaves[1:], 2.0, t["offsets"], t["instances"])
    with FlopCounterMode(display=False) as forward:
        y = ilora.grouped_linear(leaves[0], t["weight"], t["bias"], *settings)
    with FlopCounterMode(display=False) as backward:
        y.backward(t["dy"])
    assert forward.get_total_flops() == 2 * M * (d_in * d_out + R * (d_in + d_out))
    assert backward.get_total_flops() == 2 * M * (d_in * d_out + 2 * R * (d_in + d_out))
    with FlopCounterMode(display=False) as quiet, torch.no_grad():
        ilora.grouped_update(leaves[0], None, *settings)
    assert quiet.get_total_flops() == 2 * M * R * (d_in + d_out)
