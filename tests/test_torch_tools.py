"""Tools of torch that must understand the op: autograd, torch.func, export, pipelines, FLOP counting, recomputation."""

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.multiprocessing
from cases import F64, LAZY, Case
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ilora
from ilora import ILoRALinear

NAMES = ("x", "weight", "bias", "A", "B", "gate")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def problem(**changes):
    """Known tensors by name, with gradients asked for where they are float64."""
    t = Case(dtype=F64, **changes).tensors()
    return {name: t[name].requires_grad_() for name in NAMES}, t["segments"], t["dy"]


class Layers(nn.Module):
    """A trained layer before two adapted ones; the inputs are computed with, so that no stage gets one of another."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(20, 20)
        self.a = ILoRALinear(nn.Linear(20, 16), lora_dropout=dropout)
        self.b = ILoRALinear(nn.Linear(16, 12, bias=False), lora_dropout=dropout)
        for layer in (self.a, self.b):
            nn.init.normal_(layer.lora_B, std=0.1)
        self.double()

    def forward(self, x, gate):
        x, gate = self.first(x), gate * 1.0
        return self.b(torch.relu(self.a(x, gate=gate)), gate=gate)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lengths", [None, (3, 0, 5)])
def test_the_op_called_directly_has_right_gradients(lengths):
    leaves, segments, dy = problem(M=8, N=2, lengths=lengths)
    base, settings = torch.randn_like(dy).requires_grad_(), (segments, 2.0, 0.0, None, "")

    def linear(x, weight, bias, A, B, gate):
        return torch.ops.ilora.forward(x, weight, bias, None, A, B, gate, *settings)[0]

    def update(x, base, A, B, gate):
        return torch.ops.ilora.forward(x, None, None, base, A, B, gate, *settings)[0]

    assert torch.autograd.gradcheck(linear, list(leaves.values()))
    assert torch.autograd.gradcheck(update, [leaves["x"], base, *list(leaves.values())[3:]])
    x, weight, bias, *low = leaves.values()
    y, xa = torch.ops.ilora.forward(x, weight, bias, None, *low, *settings)
    assert y.requires_grad
    assert not xa.requires_grad
    grads = torch.ops.ilora.backward(dy, x, xa, weight, *low, segments, 2.0, 0.0, None, True, "")
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grads[0].sum().backward()


def test_no_function_is_entered_where_nothing_wants_a_gradient(monkeypatch):
    leaves, _, _ = problem()
    wanted = ilora.ilora_linear(*leaves.values(), 2.0).detach()
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    with torch.no_grad():
        assert torch.equal(ilora.ilora_linear(*leaves.values(), 2.0), wanted)
    y = ilora.ilora_linear(*(t.detach() for t in leaves.values()), 2.0)
    assert torch.equal(y, wanted)
    assert not y.requires_grad


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_one_op_each_way():
    leaves, _, dy = problem()
    with Seen() as seen:
        ilora.ilora_linear(*leaves.values(), 2.0).backward(dy)
    for op in (torch.ops.ilora.forward.default, torch.ops.ilora.backward.default):
        assert seen.ops.count(op) == 1


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("name", [*NAMES, "base", "dy"])
def test_a_tensor_whose_memory_does_not_hold_its_values(name, kind, target):
    backend, device = target
    t = Case(device=device).tensors()
    known = (
        {n: t[n] for n in NAMES} if name != "base" else {n: t[n] for n in ("x", "A", "B", "gate")} | {"base": t["dy"]}
    )
    others = {n: v.requires_grad_() for n, v in known.items() if n != name}

    def results(value):
        args = {**known, name: value} if name != "dy" else known
        f = ilora.ilora_update if name == "base" else ilora.ilora_linear
        y = f(**args, scaling=2.0, dropout_p=0.3, seed=7, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, list(others.values()), value if name == "dy" else t["dy"])]

    plain = t["dy"] if name == "dy" else known[name].detach()
    found, expected = results(LAZY[kind](plain)), results(torch.zeros_like(plain) if "zero" in kind else plain)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_a_bias_and_segments_with_strides_given_to_the_op(target):
    """As a lazy zero becomes one of stride 0 on its way through the dispatcher."""
    backend, device = target
    t = Case(lengths=(9, 0, 15), device=device).tensors()
    strided = lambda v: torch.stack([v, v + 1], 1)[:, 0]  # noqa: E731
    outputs = []
    for bias, segments in ((t["bias"], t["segments"]), (strided(t["bias"]), strided(t["segments"]))):
        settings = (segments, 2.0, 0.0, None)
        y, xa = torch.ops.ilora.forward(t["x"], t["weight"], bias, None, t["A"], t["B"], t["gate"], *settings, backend)
        low = (t["weight"], t["A"], t["B"], t["gate"])
        outputs.append([y, *torch.ops.ilora.backward(t["dy"], t["x"], xa, *low, *settings, True, backend)])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_batched_gradients(dropout_p, target):
    backend, device = target
    t = Case(device=device).tensors()
    leaves = [t[n].requires_grad_() for n in NAMES]
    y = ilora.ilora_linear(*leaves, 2.0, dropout_p=dropout_p, seed=3, backend=backend)
    grad = lambda dy, **options: torch.autograd.grad(y, leaves, dy, retain_graph=True, **options)  # noqa: E731
    batched = grad(torch.stack([t["dy"], -3 * t["dy"]]), is_grads_batched=True)
    for found, first, second in zip(batched, grad(t["dy"]), grad(-3 * t["dy"]), strict=True):
        torch.testing.assert_close(found, torch.stack([first, second]))


def test_torch_func_gets_right_values_or_a_refusal():
    args = [t.detach() for t in problem()[0].values()]
    xs = torch.stack([args[0], args[0] * 2, args[0] - 1])
    found = torch.vmap(lambda x: ilora.ilora_linear(x, *args[1:], 2.0))(xs)
    torch.testing.assert_close(found, torch.stack([ilora.ilora_linear(x, *args[1:], 2.0) for x in xs]))
    f = lambda x: ilora.ilora_linear(x, *args[1:], 2.0)  # noqa: E731
    with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
        torch.func.jvp(f, (args[0],), (args[0],))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match=r"forward-mode|jvp"):
        f(forward_ad.make_dual(args[0], args[0]))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: f(x).sum())(args[0])


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_trains(strict):
    model, x, gate = Layers(), torch.randn(6, 20, dtype=F64), torch.rand(3, 4)
    exported = torch.export.export(model, (x, gate), strict=strict).module()
    for each in (model, exported):
        each(x, gate).square().sum().backward()
    assert_same(gradients(exported), gradients(model))
    assert gradients(model).keys() == {"first.weight", "first.bias", "a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("base", ["Linear", "Conv1D", "no bias"])
def test_export_keeps_a_layer_in_one_op(base, strict):
    bases = {"Linear": lambda: nn.Linear(20, 12), "no bias": lambda: nn.Linear(20, 12, bias=False)}
    if base == "Conv1D":
        bases[base] = lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 20)
    layer, rows = ILoRALinear(bases[base]()), torch.export.Dim("rows", min=2)
    nn.init.normal_(layer.lora_B)
    x, gate = torch.randn(6, 5, 20), torch.rand(6, 4)
    exported = torch.export.export(layer, (x, gate), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    ops = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "ilora.forward.default" in ops
    assert not any("linear" in op or "mm" in op or "matmul" in op for op in ops)
    x, gate = torch.randn(7, 5, 20), torch.rand(7, 4)
    torch.testing.assert_close(exported.module()(x, gate), layer(x, gate))


def test_an_exported_model_draws_a_mask_of_its_own_each_time():
    model, x, gate = Layers(dropout=0.5), torch.randn(6, 20, dtype=F64), torch.rand(3, 4)
    exported = torch.export.export(model, (x, gate)).module()
    assert not torch.equal(exported(x, gate), exported(x, gate))


def run_stage(rank, address, x, gate, target, results):
    from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    pipe = pipeline(Layers(), (x[:3], gate[:3]), split_spec={"b": SplitPoint.BEGINNING})
    stage = pipe.build_stage(rank, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, lambda y, wanted: (y - wanted).square().sum(), scale_grads=False)
    schedule.step(x, gate) if rank == 0 else schedule.step(target=target)
    torch.save(gradients(stage.submod), f"{results}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_stages_of_a_pipeline_train(tmp_path):
    pytest.importorskip("torch.distributed.pipelining")
    x, gate, target = torch.randn(6, 20, dtype=F64), torch.rand(6, 4), torch.randn(6, 12, dtype=F64)
    address = f"file://{tmp_path / 'rendezvous'}"
    method = "spawn" if torch.cuda.is_available() else "fork"  # a fork has all imports done, and loses a GPU
    arguments = (address, x, gate, target, str(tmp_path))
    torch.multiprocessing.start_processes(run_stage, arguments, nprocs=2, start_method=method)
    found = torch.load(tmp_path / "0.pt") | torch.load(tmp_path / "1.pt")
    model = Layers()
    (model(x, gate) - target).square().sum().backward()
    assert_same(found, gradients(model))


@pytest.mark.parametrize("need_dx", [False, True])
def test_flops_are_counted(need_dx):
    from torch.utils.flop_counter import FlopCounterMode

    layer, M, d_in, d_out, R = ILoRALinear(nn.Linear(20, 12)), 6, 20, 12, 8
    x, gate = torch.randn(2, 3, d_in, requires_grad=need_dx), torch.rand(2, 4)
    with FlopCounterMode(display=False) as forward:
        y = layer(x, gate=gate)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * M * (d_in * d_out + R * (d_in + d_out))
    frozen = d_in * (d_out + R) if need_dx else 0
    assert backward.get_total_flops() == 2 * M * (R * (2 * d_out + d_in) + frozen)
    with FlopCounterMode(display=False) as quiet, torch.no_grad():
        ilora.ilora_update(x, None, layer.lora_A, layer.lora_B, gate, 1.0)
    assert quiet.get_total_flops() == 2 * M * R * (d_in + d_out)


@pytest.mark.parametrize("order", ["torch.utils.flop_counter, ilora", "ilora, torch.utils.flop_counter"])
def test_flops_are_counted_whatever_is_imported_first(order):
    code = f"""import torch, {order}
assert torch.ops.ilora.forward in torch.utils.flop_counter.flop_registry
assert torch.ops.ilora.backward in torch.utils.flop_counter.flop_registry"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.5])
def test_forward_and_backward_have_one_mask_under_a_memory_budget(budget):
    """Without a base and with A = B = 1, y is x times masks: dy/dx is y / x if the backward has the same ones."""
    import torch._functorch.config as config

    one, gate = torch.eye(16), torch.ones(1, 1)

    def f(x):
        for _ in range(4):
            x = ilora.ilora_update(x, None, one, one, gate, 1.0, dropout_p=0.2)
            x = torch.softmax(x, -1) * 0 + x
        return x

    x = torch.randn(32, 16, requires_grad=True)
    with config.patch(activation_memory_budget=budget):
        y = torch.compile(f, backend="aot_eager_decomp_partition", fullgraph=True)(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert 0.1 < (y == 0).float().mean() < 0.9
    torch.testing.assert_close(dx, (y / x).detach(), rtol=1e-4, atol=1e-4)


def test_calls_in_one_graph_and_calls_of_it_have_masks_of_their_own():
    one, gate, x = torch.eye(16), torch.ones(1, 1), torch.randn(32, 16)

    def f(x):
        return [ilora.ilora_update(x, None, one, one, gate, 1.0, dropout_p=0.5) for _ in range(2)]

    compiled = torch.compile(f, backend="aot_eager_decomp_partition", fullgraph=True)
    first, second, third, fourth = *compiled(x), *compiled(x)
    for a, b in ((first, second), (first, third), (third, fourth)):
        assert not torch.equal(a, b)
