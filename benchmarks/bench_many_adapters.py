"""Times many adapters in one batch, and adapted experts of sparse mixtures: `python benchmarks/bench_many_adapters.py`.

First a layer whose instances have an adapter each, beside one plain LoRA of the same rank on the same rows; PEFT takes
`adapter_names`. Then fused experts of Qwen3-MoE whose tokens choose four of X, evenly or so that a few experts have
most of the tokens, beside the frozen experts; PEFT takes `target_parameters`. `loop` is plain torch, adapter by adapter
or expert by expert. Before anything is timed, all that are to compute the same are compared, forward and backward.
Forward plus backward in float32; a factor (×) is taken within interleaved rounds. Two minutes or so on two CPU cores.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import arguments
import torch
import torch.nn.functional as F
from checking import WrongPeer
from machine import busy, heading, machine
from measure import interleave, summarise, time_once, training
from peers import Peer
from report import many_table, write_json
from torch import Tensor, nn

import ilora

CPU = torch.device("cpu")
ONE, FROZEN = "ilora, one adapter", "frozen"
K = 4  # experts of a token


def layer_peers(X: int, N: int, x: Tensor, d: int, R: int) -> tuple[dict[str, Peer], set[str]]:
    """Ways to compute a layer d→d whose N instances have X adapters of rank R in turn, and which of them are the same
    function."""
    linear = nn.Linear(d, d).requires_grad_(False)
    As, Bs = ([torch.randn(R, d) / d**0.5 for _ in range(X)], [torch.randn(d, R) / R**0.5 for _ in range(X)])
    numbers = torch.arange(N) * X // N
    names = [f"a{i}" for i in numbers]
    mixed = [names[i] for i in torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    config = ilora.ILoRAConfig(r=R, num_experts=1, lora_alpha=R)
    model, everyone, none = ilora.inject(nn.Sequential(linear), config, name="a0"), torch.ones(N, 1), torch.empty(0)
    for i in range(1, X):
        ilora.add_adapter(model, f"a{i}", config)
    factors = [tensor for i in range(X) for tensor in ilora.adapter_parameters(model, f"a{i}")]
    _fill(factors, [tensor for pair in zip(As, Bs, strict=True) for tensor in pair])

    def loop(x: Tensor) -> Tensor:
        y = F.linear(x, linear.weight, linear.bias)
        for i in range(X):
            rows = (numbers == i).nonzero().flatten()
            y = y.index_add(0, rows, x[rows] @ leaves[2 * i].T @ leaves[2 * i + 1].T)
        return y

    leaves = [factor.detach().clone().requires_grad_() for factor in factors]
    single = ilora.ILoRALinear(linear, r=R, num_experts=1, lora_alpha=R)
    _fill(single.factors, [As[0], Bs[0]])
    peers = {
        FROZEN: Peer(linear, none),
        ONE: Peer(lambda x: single(x, gate=everyone), none, {"": [*single.factors]}),
        "ilora": Peer(lambda x: model(x, ilora_adapters=names, ilora_gate=everyone), none, {"": [*factors]}),
        "ilora, rows in any order": Peer(
            lambda x: model(x, ilora_adapters=mixed, ilora_gate=everyone), none, {"": [*factors]}
        ),
        "loop": Peer(loop, none, {"": leaves}),
    }
    if X * R <= 256:
        wide = ilora.ILoRALinear(linear, r=X * R, num_experts=X, lora_alpha=R)
        _fill(wide.factors, [torch.cat(As), torch.cat(Bs, 1)])
        choice = F.one_hot(numbers, X).float()
        peers["ilora, one-hot gate"] = Peer(lambda x: wide(x, gate=choice), none, {"": list(wide.factors)})
    peers |= _peft_layer(linear, X, R, names, factors)
    return peers, set(peers) - {FROZEN, ONE, "ilora, rows in any order"}


def _peft_layer(linear: nn.Linear, X: int, R: int, names: list[str], factors: list[nn.Parameter]) -> dict[str, Peer]:
    try:
        import peft
    except ImportError:
        return {}
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config, adapter_name="a0")
    for i in range(1, X):
        model.add_adapter(f"a{i}", config)
    layer: Any = model.base_model.model[0].train()
    own = [each[f"a{i}"].weight.requires_grad_() for i in range(X) for each in (layer.lora_A, layer.lora_B)]
    _fill(own, factors)
    return {"peft, adapter_names": Peer(lambda x: layer(x, adapter_names=names), torch.empty(0), {"": own})}


class Mixture(nn.Module):
    """Fused experts as a model holds them."""

    def __init__(self, X: int, d_in: int, width: int) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        sizes = {"num_experts": X, "hidden_size": d_in, "moe_intermediate_size": width}
        torch.manual_seed(0)
        self.experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, experts_implementation="grouped_mm"))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5).requires_grad_(False)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def expert_peers(X: int, skewed: bool, M: int, d_in: int, width: int, R: int) -> tuple[dict[str, Peer], set[str]]:
    """Ways to compute X experts d_in→width→d_in for M tokens, and which of them are the same function."""
    share = torch.arange(1.0, X + 1) ** (-1.0 if skewed else 0.0)
    index = torch.multinomial(share.expand(M, X), K, generator=torch.Generator().manual_seed(0))
    weights, gate = torch.full((M, K), 1 / K), torch.ones(1, 1)
    frozen, model = Mixture(X, d_in, width), Mixture(X, d_in, width)
    ilora.inject(model, ilora.ILoRAConfig(r=R, num_experts=1, lora_alpha=R, target_modules=("experts",)))
    up_A, up_B, down_A, down_B = factors = ilora.adapter_parameters(model)
    _fill([up_B, down_B], [torch.randn_like(up_B) / R, torch.randn_like(down_B) / R])
    leaves = [factor.detach().clone().requires_grad_() for factor in factors]

    def loop(x: Tensor) -> Tensor:
        def adapted(rows: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return F.linear(rows, weight) + rows @ A.T @ B.T

        y = torch.zeros_like(x)
        base: Any = frozen.experts
        for s in range(X):
            tokens, place = (index == s).nonzero(as_tuple=True)
            a, b = adapted(x[tokens], base.gate_up_proj[s], leaves[0][s], leaves[1][s]).chunk(2, -1)
            out = adapted(F.silu(a) * b, base.down_proj[s], leaves[2][s], leaves[3][s])
            y = y.index_add(0, tokens, out * weights[tokens, place, None])
        return y

    none = torch.empty(0)
    peers = {
        FROZEN: Peer(lambda x: frozen(x, index, weights), none),
        "ilora": Peer(lambda x: model(x, index, weights, ilora_gate=gate), none, {"": list(factors)}),
        "loop": Peer(loop, none, {"": leaves}),
        **_peft_experts(Mixture(X, d_in, width), R, index, weights, factors),
    }
    return peers, set(peers) - {FROZEN}


def _peft_experts(model: nn.Module, R: int, index: Tensor, weights: Tensor, factors: list[Any]) -> dict[str, Peer]:
    try:
        import peft
    except ImportError:
        return {}
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=[], target_parameters=names)
    adapted: Any = peft.get_peft_model(model, config)
    own = dict(adapted.named_parameters())
    up, down = sorted({key.rsplit(".lora_", 1)[0] for key in own if ".lora_" in key}, key=len, reverse=True)
    trained = [own[f"{path}.lora_{factor}.default.weight"] for path in (up, down) for factor in "AB"]
    layouts = [each.flatten(0, 1) if i % 2 == 0 else each.permute(1, 2, 0).flatten(1) for i, each in enumerate(factors)]
    _fill(trained, layouts)
    return {"peft, target_parameters": Peer(lambda x: adapted(x, index, weights), torch.empty(0), {"": trained})}


@torch.no_grad()
def _fill(tensors: list[Any], values: list[Any]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def check(peers: dict[str, Peer], same: set[str], x: Tensor, dy: Tensor) -> None:
    """Raises WrongPeer where two that are to compute the same differ in y or dx by more than rounding."""
    found = {}
    for name in sorted(same):
        y = peers[name].call(x)
        found[name] = y.detach(), *torch.autograd.grad(y, x, dy)
    wanted = found["loop"]
    for name, both in found.items():
        for what, ours, theirs in zip(("y", "the gradient of x"), both, wanted, strict=True):
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            if not error <= 1e-4:
                raise WrongPeer(f"{name}: {what} differs from the loop's by {error:.2g} of its largest value")


def measure(
    case: str, build: Callable[[], tuple[dict[str, Peer], set[str]]], x: Tensor, baseline: str, options: Any
) -> list[dict[str, Any]]:
    """A row for each peer of a case, checked and timed."""
    dy = torch.randn_like(x)
    x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peers, same = build()
    check(peers, same, x, dy)
    data: Any = SimpleNamespace(x=x, dy=dy)
    programs = {name: training([peer], [data]) for name, peer in peers.items()}
    for program in programs.values():
        time_once(program, CPU)
    times = interleave(programs, CPU, options.seconds, options.repeats)
    rounds = {"rounds": len(times[baseline])}
    rows = [
        {"case": case, "peer": name, **rounds, **summarise(series, times[baseline])} for name, series in times.items()
    ]
    print(many_table(rows), flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=("adapters", "experts"), help="one of the two halves")
    add("--adapters", type=arguments.counts, default="16,64", help="numbers of adapters (default 16,64)")
    add("--experts", type=arguments.counts, default="8,64,128", help="numbers X of experts (default 8,64,128)")
    add("--width", type=arguments.count, default=2048, help="d_in and d_out of the layer (default 2048)")
    add("--instances", type=arguments.count, default=64, help="instances, and rows of each (default 64)")
    add("--tokens", type=arguments.count, default=2048, help="tokens of the experts, 512→256 (default 2048)")
    add("--rank", type=arguments.count, default=16, help="rank (default 16)")
    add("--seconds", type=arguments.number, default=3.0, help="how long to time each peer of a case (default 3)")
    add("--repeats", type=arguments.count, default=50, help="rounds at most (default 50)")
    add("--json", type=arguments.new_file, help="write machine, settings and rows to this file, after every case")
    o = parser.parse_args(argv)
    results: dict[str, Any] = {"machine": machine(CPU), "settings": {k: v for k, v in vars(o).items() if k != "json"}}
    print(heading(results["machine"]), busy(results["machine"]) or "", sep="\n")

    def keep(kind: str, rows: list[dict[str, Any]]) -> None:
        results.setdefault(kind, []).extend(rows)
        if o.json:
            write_json(results, o.json)

    N, d = o.instances, o.width
    for X in o.adapters if o.only != "experts" else ():
        x = torch.randn(N, N, d)
        build = partial(layer_peers, X, N, x, d, o.rank)
        keep("adapters", measure(f"{X} adapters", build, x, ONE, o))
    for X in o.experts if o.only != "adapters" else ():
        for skewed in (False, True):
            build = partial(expert_peers, X, skewed, o.tokens, 512, 256, o.rank)
            case = f"{X} experts, {'skewed' if skewed else 'even'}"
            keep("experts", measure(case, build, torch.randn(o.tokens, 512), FROZEN, o))


if __name__ == "__main__":
    main()
