"""docs/recipes.md runs, and each recipe computes its paper's formula: forward and gradients against plain torch."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ilora

pytest.importorskip("transformers")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
D_IN, D_OUT, ALPHA, r, E, B, L = 10, 7, 6.0, 3, 4, 3, 5


@pytest.fixture(scope="module")
def page():
    """What the page's blocks define, run one after another."""
    scope = {"__name__": "recipes"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, block.splitlines()[0], "exec"), scope)
    return scope


def mixture(x, A, B, weights, scale):
    """scale · Σ_e weights[..., e] B_e A_e x, an expert at a time; A [E, r, d_in], B [E, d_out, r]."""
    return sum(weights[..., e, None] * scale * (x @ A[e].T @ B[e].T) for e in range(len(A)))


def factors(layer):
    """A [E, r, d_in] and B [E, d_out, r] of an ILoRALinear."""
    E = layer.num_experts
    return layer.lora_A.unflatten(0, (E, -1)), torch.stack(layer.lora_B.chunk(E, 1))


def loramoe(page):
    module = page["RoutedLinear"](nn.Linear(D_IN, D_OUT), E, r, ALPHA)

    def published(x):
        weights = (x @ module.router.weight.T).softmax(-1)
        return module.layer.base_layer(x) + mixture(x, *factors(module.layer), weights, ALPHA / r)

    return module, published, torch.randn(B, L, D_IN)


def hydralora(page):
    module, _, x = loramoe(page)
    page["parametrize"].register_parametrization(module.layer, "lora_A", page["SharedA"](E))
    A = module.layer.parametrizations.lora_A.original
    assert A.shape == (r, D_IN)

    def published(x):
        weights = (x @ module.router.weight.T).softmax(-1)
        return module.layer.base_layer(x) + mixture(x, [A] * E, factors(module.layer)[1], weights, ALPHA / r)

    return module, published, x


def mixlora(page):
    mlp = copy.deepcopy(page["tiny"]().model.layers[0].mlp)
    module = page["MixLoRA"](mlp, E, r, ALPHA)

    def expert(e, x):
        def linear(name, x):
            return getattr(mlp, name)(x) + ALPHA / r * (x @ module.A[name][e].T @ module.B[name][e].T)

        return linear("down_proj", F.silu(linear("gate_proj", x)) * linear("up_proj", x))

    def published(x):
        rows = []
        for token in x.flatten(0, 1):
            probabilities = (module.router.weight @ token).softmax(-1)
            best = probabilities.argsort(descending=True)[:2].tolist()
            total = sum(probabilities[e] for e in best)
            rows.append(sum(probabilities[e] / total * expert(e, token) for e in best))
        return torch.stack(rows).view_as(x)

    return module, published, torch.randn(B, L, 32)


def mole(page):
    module = page["MoLELinear"](nn.Linear(D_IN, D_OUT), E, r, L)
    for e in range(E):
        page["put_expert"](module.layer, e, torch.randn(r, D_IN), torch.randn(D_OUT, r), ALPHA / r)

    def published(x):
        outputs = [x @ A.T @ B.T for A, B in zip(*factors(module.layer), strict=True)]
        joined = torch.stack([F.layer_norm(y, y.shape[-1:]) for y in outputs], 1).flatten(1)
        weights = (joined @ module.e / module.temperature).softmax(-1)
        return module.layer.base_layer(x) + sum(w[:, None, None] * y for w, y in zip(weights.T, outputs, strict=True))

    return module, published, torch.randn(B, L, D_IN)


def with_updates(model, layers, weights, scale):
    """The frozen model with plain mixtures beside its linear layers; weights: a function of the layer's place."""
    plain = copy.deepcopy(model).double()
    for i, (path, layer) in enumerate(layers.items()):

        def add(_, args, y, i=i, layer=layer):
            return y + mixture(args[0], *factors(layer), weights(i), scale)

        plain.get_submodule(path).register_forward_hook(add)
    return plain


def moelora(page):
    config = ilora.ILoRAConfig(r=E * r, num_experts=E, lora_alpha=ALPHA / E, target_modules=["q_proj", "up_proj"])
    gate, tasks = page["TaskGate"](tasks=3, num_experts=E, width=6), torch.tensor([2, 0, 2])
    frozen, module = page["tiny"](), ilora.inject(page["tiny"](), config, gate=gate)

    def weights(_):
        return (gate.embedding.weight[tasks] @ gate.gate.weight.T).softmax(-1)[:, None]

    plain = with_updates(frozen, ilora.ilora_layers(module), weights, ALPHA / (E * r))  # of the total rank
    ids = torch.randint(2, 61, (B, L))
    ours = nn.ModuleDict({"model": module})
    ours.forward = lambda x: module(ids, ilora_z=tasks).logits * x
    return ours, lambda x: plain(ids).logits * x, torch.ones(())


def xlora(page):
    config = ilora.ILoRAConfig(r=E * r, num_experts=E, target_modules=["q_proj", "up_proj"])
    frozen, model = page["tiny"](), ilora.inject(page["tiny"](), config, gate=ilora.UniformGate(E))
    module, ids = page["XLoRA"](model, 32, E), torch.randint(2, 61, (B, L))
    layers, scalings = ilora.ilora_layers(model), []
    plain = with_updates(frozen, layers, scalings.__getitem__, config.lora_alpha / r)

    def published(x):
        with torch.no_grad():
            hidden = copy.deepcopy(frozen).double()(ids, output_hidden_states=True).hidden_states[-1]
        logits = hidden @ module.classifier.weight.T + module.classifier.bias
        scalings[:] = logits.view(B, L, len(layers), E).softmax(-1).unbind(2)
        return plain(ids).logits * x

    forward = module.forward
    module.forward = lambda x: forward(ids).logits * x
    return module, published, torch.ones(())


@pytest.mark.parametrize("recipe", [loramoe, hydralora, mixlora, moelora, xlora, mole], ids=lambda f: f.__name__)
def test_a_recipe_computes_its_papers_formula(page, recipe):
    module, published, x = recipe(page)
    module, x = module.double(), x.double().requires_grad_()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad or "lora_" in name}
    for parameter in trained.values():
        parameter.requires_grad_().data.normal_(1.0 if parameter.dim() == 0 else 0.0, 0.3)
    y, expected = module(x), published(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    inputs = [x, *trained.values()]
    for name, a, b in zip(
        ["x", *trained], torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        assert a.abs().sum() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda message, name=name: f"{name}: {message}")


def test_a_finished_lora_of_a_smaller_rank_becomes_an_expert(page):
    layer = ilora.ILoRALinear(nn.Linear(D_IN, D_OUT), r=2 * r, num_experts=2)
    nn.init.normal_(layer.lora_B)
    x, A, B = torch.randn(2, D_IN), torch.randn(r - 1, D_IN), torch.randn(D_OUT, r - 1)
    page["put_expert"](layer, 1, A, B, 0.7)
    y = layer(x, gate=torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(y, layer.base_layer(x) + 0.7 * x @ A.T @ B.T)


def test_the_balance_terms(page):
    """LoRAMoE's of its published code, MixLoRA's of its paper."""
    gate, importance = torch.rand(B, L, E), torch.rand(B, E)
    z = torch.stack([gate[b, :, e].sum() * importance[b, e] for b in range(B) for e in range(E)])
    torch.testing.assert_close(page["localized_balance"](gate, importance), z.var() / z.mean() ** 2)

    module, _, x = mixlora(page)
    module(x)
    p = module.probabilities
    first = [(p.argmax(-1) == e).float().mean() for e in range(E)]
    expected = E * sum(first[e] * p[:, e].mean() for e in range(E))
    torch.testing.assert_close(module.balance(), expected)
