"""`ilora.share_inputs` in models: the results of separate layers, whatever the model does with its projections."""

import copy
import filecmp
import pickle

import pytest
import torch
import transformers as hf
from models import DECODERS, ENCODER_DECODERS, MODELS, E, gates, injected, llama, prompts, randomised
from torch import nn

import ilora
from ilora import shared as siblings

EXACT = {"rtol": 1e-5, "atol": 1e-5}
GROUPS = {"llama": 4, "qwen3": 4, "gemma": 4, "mixtral": 2, "opt": 2, "gpt2": 0, "t5": 6, "bart": 6, "bert": 2}


def gated_t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    tokens = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **tokens, feed_forward_proj="gated-gelu"))


@pytest.fixture
def passes(monkeypatch):
    """The inputs of which a shared product has been taken, one an entry."""
    seen, begin = [], siblings.SharedInput

    def counted(x, *args):
        seen.append(x)
        return begin(x, *args)

    monkeypatch.setattr(siblings, "SharedInput", counted)
    return seen


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", [*MODELS, "gated t5"])
def test_a_model_computes_the_same_in_fewer_passes(name, passes):
    model = injected(gated_t5 if name == "gated t5" else MODELS[name]).train()
    if "t5" in name:  # its unscaled attention makes rounding errors large
        model.double()
    ids, mask = prompts((7, 4, 9), left=False)
    decoder = {"decoder_input_ids": prompts((5, 5, 5), seed=1)[0]} if name in (*ENCODER_DECODERS, "gated t5") else {}

    def run():
        g = gates(3).requires_grad_()
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, ilora_gate=g, **decoder).logits
        logits.square().mean().backward()
        assert model.ilora.state.shared is None
        return {"logits": logits.detach(), "gate": g.grad, **gradients(model)}

    expected = run()
    assert not passes
    groups = ilora.share_inputs(model)
    assert len(groups) == GROUPS.get(name, 10)
    assert_equal(run(), expected)
    crossed = sum("EncDecAttention" in group[0] or "encoder_attn" in group[0] for group in groups)
    assert len(passes) == len(groups) + crossed  # there q sees the decoder's states, k and v the encoder's
    assert ilora.share_inputs(model, False) == ()
    assert_equal(run(), expected)
    assert len(passes) == len(groups) + crossed


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_backend_multiplies_by_the_first_factors_once_a_group(backend, monkeypatch):
    if (reason := ilora.op.backends.why_not(backend, "cpu")) is not None:
        pytest.skip(reason)
    model, module = injected(backend=backend).train(), ilora.op.backends.select(backend, "cpu", torch.float32)
    ranks = {"shrink_x": [], "backward_x": []}
    for name, where in (("shrink_x", 1), ("backward_x", 2)):
        original = getattr(module, name)

        def counted(*args, name=name, where=where, original=original):
            ranks[name].append(len(args[where]))
            return original(*args)

        monkeypatch.setattr(module, name, counted)
    ilora.share_inputs(model)
    model(input_ids=prompts((6, 6))[0], ilora_gate=gates(2)).logits.sum().backward()
    whole = [r for r in ranks["shrink_x"] if r != 8], [r for r in ranks["backward_x"] if r != 8]
    assert whole == ([24, 16] * 2, [16, 24] * 2)  # q, k, v and gate, up of two blocks


def interleaved(name, reentrant):
    """Gradients after forward 1, forward 2, backward 1, backward 2, with dropout."""
    model = injected(MODELS[name], lora_dropout=0.2).train()
    ilora.share_inputs(model)
    if name == "t5":
        model.double()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses, leaves = [], []
    for i in range(2):
        torch.manual_seed(10 + i)
        ids, mask = prompts((7, 4, 9), seed=i, left=False)
        leaves.append(gates(3, seed=i).requires_grad_())
        labels = torch.tensor([0, 2, 1]) if name == "bert" else ids
        losses.append(model(input_ids=ids, attention_mask=mask, labels=labels, ilora_gate=leaves[-1]).loss)
    for loss in losses:
        loss.backward()
    assert model.ilora.state.shared is None
    return {**gradients(model), **{f"gate {i}": leaf.grad for i, leaf in enumerate(leaves)}}


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "bart"])
def test_interleaved_forwards_under_checkpointing(name, passes):
    expected = interleaved(name, None)
    forwards = len(passes)
    for reentrant in (False, True):
        passes.clear()
        assert_equal(interleaved(name, reentrant), expected)
        assert len(passes) > forwards  # the recomputation shares too


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generation(name, passes):
    model, g = injected(MODELS[name]), gates(3)
    ids, mask = prompts((27, 24, 22), left=name in DECODERS)
    options = {"attention_mask": mask, "ilora_gate": g, "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    expected = model.generate(ids, **options)
    groups = ilora.share_inputs(model)
    assert torch.equal(model.generate(ids, **options), expected)
    assert bool(passes) == bool(groups)
    assert all(x.shape[:-1].numel() > siblings.FEW_ROWS for x in passes)  # the prompts; not a step of six rows


class Projections(nn.Module):
    """q, k and v in whatever order and of whatever inputs `body` says."""

    def __init__(self, body=None):
        super().__init__()
        for name, width in (("q_proj", 8), ("k_proj", 6), ("v_proj", 10)):
            setattr(self, name, nn.Linear(12, width))
        self.body = body

    def forward(self, x):
        return torch.cat(self.body(self.q_proj, self.k_proj, self.v_proj, x), -1)


def changed(x):
    """x, of another value."""
    with torch.no_grad():
        x.mul_(2)
    return x


def alternating(q, k, v, x):
    other = x + 1
    return [q(x), q(other), k(x), k(other), v(x), v(other)]


BODIES = {
    "as usual": (lambda q, k, v, x: [q(x), k(x), v(x)], 1),
    "another order": (lambda q, k, v, x: [v(x), q(x), k(x)], 1),
    "one alone": (lambda q, k, v, x: [k(x)], 1),
    "one left out": (lambda q, k, v, x: [q(x), v(x)], 1),
    "one twice": (lambda q, k, v, x: [q(x), q(x), k(x), v(x)], 2),
    "an equal copy": (lambda q, k, v, x: [q(x), k(x.clone()), v(x)], 3),
    "keys of another": (lambda q, k, v, x: [q(x), *(f(y) for y in (x + 1,) for f in (k, v))], 2),
    "alternating": (alternating, 6),
    "one used twice": (lambda q, k, v, x: [y := q(x), y, k(x), v(x)], 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_any_order_and_any_input(name, passes):
    body, count = BODIES[name]
    model, x = randomised(ilora.inject(Projections(body), share_inputs=True)), torch.randn(3, 5, 12)

    def run():
        leaves = [x.clone().requires_grad_(), gates(3).requires_grad_()]
        model.zero_grad()
        y = model(leaves[0], ilora_gate=leaves[1])
        y.square().sum().backward()
        return {"y": y.detach(), "x": leaves[0].grad, "gate": leaves[1].grad, **gradients(model)}

    found = run()
    assert len(passes) == count
    ilora.share_inputs(model, False)
    expected = run()
    assert_equal(found, expected)


def changes(model):
    """What may change between two projections of one x, none of which may be overlooked."""
    layer = model.k_proj
    return {
        "x": changed,
        "A": lambda x: changed(layer.lora_A) is None or x,
        "B": lambda x: changed(layer.lora_B) is None or x,
        "the parameter": lambda x: setattr(layer, "lora_A", nn.Parameter(layer.lora_A * 3)) or x,
        "the gate": lambda x: changed(model.ilora.state.current.gate) is None or x,
        "the base": lambda x: changed(layer.base_layer.weight) is None or x,
        "the mode": lambda x: model.k_proj.eval() is None or x,
        "scaling": lambda x: setattr(layer, "scaling", 7.0) or x,
        "a hook": lambda x: layer.base_layer.register_forward_hook(lambda m, a, y: y * 2) is None or x,
        "the current gate": lambda x: (
            model.ilora.state.set_current(ilora.current_gate.CurrentGate(gates(3, seed=9))) or x
        ),
    }


CHANGES = ["x", "A", "B", "the parameter", "the gate", "the base", "the mode", "scaling", "a hook", "the current gate"]


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_stale_is_handed_out(what, grad):
    results = []
    for share in (False, True):
        torch.manual_seed(0)
        model = randomised(ilora.inject(Projections(), share_inputs=share)).train()
        model.body = lambda q, k, v, x: [q(x), k(changes(model)[what](x)), v(x)]  # noqa: B023
        with torch.set_grad_enabled(grad):
            results.append(model(torch.randn(3, 40, 12), ilora_gate=gates(3)).detach())
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_modes_of_torch_between_two_projections(passes):
    def body(q, k, v, x):
        with torch.no_grad():
            first = q(x)
        with torch.autocast("cpu", torch.bfloat16):
            second = k(x).float()
        return [first, second, v(x)]

    model, x = randomised(ilora.inject(Projections(body), share_inputs=True)).train(), torch.randn(3, 40, 12)
    found = model(x, ilora_gate=gates(3))
    found.sum().backward()
    assert len(passes) == 3
    assert model.q_proj.lora_A.grad is None
    ilora.share_inputs(model, False)
    parts = (y.split([8, 6, 10], -1) for y in (found, model(x, ilora_gate=gates(3))))
    for got, want, exact in zip(*parts, (True, False, True), strict=True):
        torch.testing.assert_close(got, want, **EXACT if exact else {"rtol": 0.02, "atol": 0.02})


def test_a_backward_between_two_projections():
    def body(q, k, v, x):
        first = q(x)
        first.sum().backward()
        return [first.detach(), k(x), v(x)]

    model = randomised(ilora.inject(Projections(body), share_inputs=True)).train()
    model(torch.randn(3, 4, 12), ilora_gate=gates(3)).sum().backward()
    assert all(layer.lora_A.grad is not None for layer in ilora.ilora_layers(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_by_hand_whose_border_runs_through_a_group(reentrant):
    from torch.utils.checkpoint import checkpoint

    def body(q, k, v, x):
        return [q(x), checkpoint(lambda x: k(x).sin() * v(x)[..., :6], x, use_reentrant=reentrant)]

    def run(share):
        torch.manual_seed(0)
        model = randomised(ilora.inject(Projections(body), share_inputs=share)).train()
        x = torch.randn(3, 4, 12, requires_grad=True)
        with ilora.gated(model, gates(3)):
            y = model.body(model.q_proj, model.k_proj, model.v_proj, x)
            sum(t.square().sum() for t in y).backward()
        return {"x": x.grad, **gradients(model)}

    assert_equal(run(True), run(False))


def test_an_exception_leaves_nothing_behind():
    model, g = injected(), gates(2)
    model.train()
    ilora.share_inputs(model)
    ids, _ = prompts((5, 5))
    expected = model(input_ids=ids, ilora_gate=g).logits
    layer = model.model.layers[1].self_attn.v_proj
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("broken")))
    with pytest.raises(KeyError, match="broken"):
        model(input_ids=ids, ilora_gate=g.flip(0))
    handle.remove()
    assert model.ilora.state.shared is None
    assert torch.equal(model(input_ids=ids, ilora_gate=g).logits, expected)
    with ilora.gated(model, g):
        model.model.layers[0].self_attn.q_proj(torch.randn(2, 5, 32))
        assert model.ilora.state.shared is not None
    assert model.ilora.state.shared is None


def test_dropout_has_one_mask_a_group():
    model = randomised(ilora.inject(Projections(BODIES["as usual"][0]), ilora.ILoRAConfig(lora_dropout=0.5)))
    ilora.share_inputs(model)
    x, g = torch.randn(3, 5, 12), gates(3)
    torch.manual_seed(4)
    found = model.train()(x, ilora_gate=g)
    torch.manual_seed(4)
    seed = int(ilora.op.reference.as_seed(None, x.device))
    want = [
        ilora.reference.ilora_linear(x, m.weight, m.bias, m.lora_A, m.lora_B, g, m.scaling, None, 0.5, seed)
        for m in ilora.ilora_layers(model).values()
    ]
    torch.testing.assert_close(found, torch.cat(want, -1), **EXACT)


LEFT_OUT = {
    "rank": ({"rank_pattern": {"k_proj": 4}}, {"q_proj", "v_proj"}),
    "experts": ({"expert_pattern": {"k_proj": 2}}, {"q_proj", "v_proj"}),
    "scaling": ({"alpha_pattern": {"v_proj": 5}}, {"q_proj", "k_proj"}),
    "not adapted": ({"exclude_modules": ["q_proj"]}, {"k_proj", "v_proj"}),
    "alone": ({"target_modules": ["q_proj"]}, set()),
    "the largest rank": ({"r": 128}, {"q_proj", "k_proj"}),
    "beyond it": ({"r": 256}, set()),
}


@pytest.mark.parametrize("why", LEFT_OUT)
def test_layers_that_are_left_out(why):
    options, names = LEFT_OUT[why]
    model = ilora.inject(Projections(BODIES["as usual"][0]), ilora.ILoRAConfig(**options))
    randomised(model)
    x, g = torch.randn(3, 5, 12), gates(3)
    expected = model(x, ilora_gate=g)
    assert {name for group in ilora.share_inputs(model) for name in group} == names
    torch.testing.assert_close(model(x, ilora_gate=g), expected, **EXACT)


def test_opaque_bases_are_left_out():
    model = Projections(BODIES["as usual"][0])
    model.q_proj.register_forward_hook(lambda m, a, y: y + 1)
    ilora.inject(model)
    assert ilora.share_inputs(model) == (("k_proj", "v_proj"),)


def test_autocast():
    model, g, ids = injected().train(), gates(2), prompts((6, 6))[0]

    def run(share, enabled):
        ilora.share_inputs(model, share)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(input_ids=ids, ilora_gate=g).logits
        logits.float().square().mean().backward()
        return {"logits": logits.detach().float(), **gradients(model)}

    exact, separate, shared = run(False, False), run(False, True), run(True, True)
    for key, want in exact.items():
        assert (shared[key] - want).norm() <= 1.5 * (separate[key] - want).norm()


def test_adapters_merging_disabling_copies_and_ejection(passes):
    model, ids, g = injected(), prompts((40, 40))[0], gates(2)
    base = copy.deepcopy(model)

    def logits(model, **more):
        return model(input_ids=ids, **more).logits

    expected = logits(model, ilora_gate=g)
    ilora.share_inputs(model)
    for clone in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        passes.clear()
        torch.testing.assert_close(logits(clone, ilora_gate=g), expected, **EXACT)
        assert len(passes) == 4
        attention = clone.model.layers[0].self_attn
        assert attention.q_proj.input_group.layers == (attention.q_proj, attention.k_proj, attention.v_proj)
    ilora.add_adapter(model, "other", ilora.ILoRAConfig(r=4, num_experts=E, target_modules=["k_proj", "v_proj"]))
    randomised(model, 3)
    passes.clear()
    other = logits(model, ilora_gate=g)
    assert len(passes) == 2
    ilora.set_adapter(model, "default")
    torch.testing.assert_close(logits(model, ilora_gate=g), expected, **EXACT)
    ilora.set_adapter(model, "other")
    torch.testing.assert_close(logits(model, ilora_gate=g), other, **EXACT)
    ilora.set_adapter(model, "default")
    ilora.merge(model, g[0])
    torch.testing.assert_close(logits(model)[0], expected[0], rtol=1e-4, atol=1e-4)
    ilora.unmerge(model)
    torch.testing.assert_close(logits(model, ilora_gate=g), expected, **EXACT)
    with ilora.disable_adapter(model), ilora.disable_adapter(base):
        assert torch.equal(logits(model), logits(base))
    assert type(ilora.eject(model)) is hf.LlamaForCausalLM
    with pytest.raises(ValueError, match="has no iLoRA in it"):
        ilora.share_inputs(model)


def test_it_is_not_saved(tmp_path, passes):
    model, ids, g = injected(), prompts((40, 40))[0], gates(2)
    ilora.save_adapter(model, tmp_path / "separate")
    ilora.share_inputs(model)
    ilora.save_adapter(model, tmp_path / "shared")
    files = [path.name for path in (tmp_path / "separate").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "separate", tmp_path / "shared", files, shallow=False)[0] == files
    torch.manual_seed(0)
    loaded = ilora.load_adapter(llama().eval(), tmp_path / "shared")
    expected = loaded(input_ids=ids, ilora_gate=g).logits
    assert not passes
    ilora.share_inputs(loaded)
    torch.testing.assert_close(loaded(input_ids=ids, ilora_gate=g).logits, expected, **EXACT)
    assert len(passes) == 4


def test_a_compiled_model_computes_every_layer_by_itself(passes):
    torch.compiler.reset()
    model, x, g = Projections(BODIES["as usual"][0]), torch.randn(3, 5, 12), gates(3)
    randomised(ilora.inject(model, share_inputs=True)).train()
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        passes.clear()
        model.zero_grad()
        run(x, ilora_gate=g).square().mean().backward()
        results.append(gradients(model))
    torch.compiler.reset()
    assert not passes
    assert_equal(*results)


def test_inference_mode_computes_every_layer_by_itself(passes):
    model, ids, g = injected(), prompts((40, 40))[0], gates(2)
    expected = model(input_ids=ids, ilora_gate=g).logits
    ilora.share_inputs(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids, ilora_gate=g).logits, expected, **EXACT)
        frozen = g.clone()
    assert not passes
    with torch.no_grad():  # what was made there may be used elsewhere
        torch.testing.assert_close(model(input_ids=ids, ilora_gate=frozen).logits, expected, **EXACT)
    assert len(passes) == 4
