"""The call in one step of C++: the bits of the way through Python, and nothing taken that is not the common case."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, F64, Case

import ilora
from ilora.op import native

if native.DIRECT_CALL is None:
    pytest.skip(f"a call in C++: {native.CALL_UNAVAILABLE}", allow_module_level=True)

NAMES = ("x", "weight", "bias", "A", "B", "gate")
CASES = {
    "a few rows": Case(M=6),
    "many rows": Case(M=600, d_in=70, d_out=50),
    "one row": Case(M=1, N=1),
    "token gates": Case(M=20, N=20),
    "no bias": Case(bias=False),
    "float64": Case(dtype=F64),
    "bfloat16, one row": Case(M=1, N=1, dtype=BF16),
    "bfloat16": Case(M=48, dtype=BF16),
    "bfloat16 beside float32": Case(dtype=BF16, adapter_dtype=F32),
    "dropout": Case(dropout_p=0.3),
    "strided": Case(strided=True),
}


@pytest.fixture
def taken(monkeypatch):
    """What the call returned, None where it left the work to Python."""
    results, call = [], native.DIRECT_CALL

    def noting(*args):
        results.append(call(*args))
        return results[-1]

    monkeypatch.setattr(native, "DIRECT_CALL", noting)
    return results


def results(case, wanted=NAMES):
    torch.manual_seed(3)
    t = case.tensors()
    leaves = {n: t[n].detach().requires_grad_(n in wanted) for n in NAMES if t[n] is not None}
    first = 2 if case.N == case.M else case.N
    x = leaves["x"].view(first, -1, case.d_in) if case.M % 2 == 0 and not case.strided else leaves["x"]
    y = ilora.ilora_linear(x, leaves["weight"], leaves.get("bias"), *(leaves[n] for n in ("A", "B", "gate")), 2.0,
                           dropout_p=case.dropout_p)  # fmt: skip
    asked = [leaves[n] for n in wanted if n in leaves]
    grads = torch.autograd.grad(y, asked, t["dy"].view(y.shape) if not case.strided else t["dy"]) if asked else ()
    return [y.detach(), *grads]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wanted", [NAMES, ("A", "B"), ("x", "gate"), ()], ids=["all", "A B", "x gate", "none"])
def test_the_same_bits(name, wanted, taken, monkeypatch):
    found = results(CASES[name], wanted)
    assert len(taken) == 1
    assert taken[0] is not None
    assert taken[0].requires_grad == bool(wanted)
    monkeypatch.setattr(native, "DIRECT_CALL", None)
    expected = results(CASES[name], wanted)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def arguments(**changes):
    t = Case().tensors()
    return {n: t[n] for n in NAMES} | {"scaling": 2.0} | changes


class Subclass(torch.Tensor):
    pass


UNCOMMON = {
    "segments": {"segments": torch.tensor([0, 5, 9, 24], dtype=torch.int32)},
    "a seed": {"seed": 3},
    "a backend": {"backend": "reference"},
    "a scaling that is no float": {"scaling": 2},
    "float16": {n: t.to(F16) if n != "gate" else t for n, t in Case(dtype=F16).tensors().items() if n in NAMES},
    "no rows": {"x": torch.randn(0, 20)},
    "a strided bias": {"bias": torch.randn(24)[::2]},
    "a subclass": {"B": torch.randn(12, 8).as_subclass(Subclass)},
    "choices": {"x": torch.randn(2, 3, 4, 20), "gate": torch.rand(6, 4)},
    "a token gate as x": {"x": torch.randn(2, 5, 20), "gate": torch.rand(2, 5, 4)},
    "a lazy negation": {"x": torch.complex(torch.randn(24, 20), torch.randn(24, 20)).conj().imag},
}


@pytest.mark.parametrize("what", UNCOMMON)
def test_what_is_not_common_is_left_to_python(what, taken):
    known = arguments(**UNCOMMON[what])
    y = ilora.ilora_linear(**known)
    assert not any(each is not None for each in taken)
    known = {n: t for n, t in known.items() if n != "backend"}
    torch.testing.assert_close(y, ilora.reference.ilora_linear(**known), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mode", ["autocast", "dispatch", "function", "vmap", "environment"])
def test_no_call_passes_a_mode_by(mode, taken, monkeypatch):
    from torch.overrides import BaseTorchFunctionMode
    from torch.utils._python_dispatch import BaseTorchDispatchMode

    known = arguments()
    if mode == "environment":
        monkeypatch.setenv("ILORA_BACKEND", "reference")
        ilora.ilora_linear(**known)
    elif mode == "vmap":
        rest = {n: value for n, value in known.items() if n != "x"}
        torch.vmap(lambda x: ilora.ilora_linear(x, **rest))(torch.stack([known["x"]] * 2))
    else:
        modes = {
            "autocast": torch.autocast("cpu", BF16),
            "dispatch": BaseTorchDispatchMode(),
            "function": BaseTorchFunctionMode(),
        }
        with modes[mode]:
            ilora.ilora_linear(**known)
    assert taken == [None]


def test_a_mode_that_is_on_in_the_backward_only(taken):
    """A vmapped dy, one with a lazy sign, and create_graph, behind a call that was common."""
    known = arguments()
    A = known["A"].requires_grad_()
    y, dy = ilora.ilora_linear(**known), Case().tensors()["dy"]
    plain = torch.autograd.grad(y, A, dy, retain_graph=True)[0]
    batched = torch.autograd.grad(y, A, torch.stack([dy, 2 * dy]), is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched, torch.stack([plain, 2 * plain]))
    negated = torch.complex(torch.zeros_like(dy), -dy).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(torch.autograd.grad(y, A, negated, retain_graph=True)[0], plain)
    (again,) = torch.autograd.grad(y, A, dy, create_graph=True)
    assert torch.equal(again, plain)
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*ilora\.reference"):
        again.sum().backward()


@pytest.mark.parametrize("shape", [(20, 20), (6, 4, 20), (1, 24, 20), (20,)])
def test_refusals_are_those_of_python(shape, taken):
    with pytest.raises(ValueError, match=rf"gate: \[8, 4\] does not fit x \[{', '.join(map(str, shape))}\]"):
        ilora.ilora_linear(**arguments(x=torch.randn(shape)[..., :20], gate=torch.ones(8, 4)))
    assert taken == [None]


def test_a_library_for_another_torch_is_passed_over(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    call, reason = native._load_call()
    assert call is None
    assert "built for torch 2." in reason
    assert "this is torch 2.99.0" in reason


def test_every_row_is_its_own_whatever_the_batch(taken):
    case = replace(CASES["many rows"], M=40, N=40)
    t = case.tensors()
    low = (t["weight"], t["bias"], t["A"], t["B"])
    together = ilora.ilora_linear(t["x"], *low, t["gate"], 2.0)
    alone = [ilora.ilora_linear(t["x"][i : i + 1], *low, t["gate"][i : i + 1], 2.0) for i in range(40)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert len(taken) == 41
