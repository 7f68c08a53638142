"""Other libraries put a forward of theirs on the model, before or after inject: the gate is in force all the same."""

import copy

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

import training_worker as worker  # noqa: E402
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def injected(model=None, **options):
    model = worker.tiny_llama() if model is None else model
    torch.manual_seed(1)
    ilora.inject(model, ilora.ILoRAConfig(r=8, num_experts=4), gate=ilora.SequenceGate(6, 4, **options))
    torch.nn.init.normal_(model.ilora_gate.weight, std=2.0)
    for layer in ilora.ilora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


def batch():
    rows = worker.examples(3)
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def fuse(model):
    """As TRL's fused head: it calls the backbone, and the model's own forward only when it is not asked to fuse."""
    own = model.forward

    def forward(self, fused=False, labels=None, **kwargs):
        if not fused:
            return own(labels=labels, **kwargs)
        return self.lm_head(self.base_model(**kwargs).last_hidden_state)

    model.forward = forward.__get__(model)
    return model


def test_a_forward_that_never_calls_the_models_own():
    expected = injected()(**batch()).logits
    model = fuse(injected())
    assert torch.equal(model(**batch()).logits, expected)
    assert torch.equal(model(**batch(), fused=True), expected)
    assert torch.equal(model.ilora.state.last, model.ilora_gate(batch()["ilora_z"]))
    ids, z = batch()["input_ids"], batch()["ilora_z"]
    with torch.no_grad(), ilora.gated(model, model.ilora_gate(z)):
        assert torch.equal(model(input_ids=ids, fused=True), expected)
    for generated in (model, injected()):
        tokens = generated.generate(ids, ilora_z=z, max_new_tokens=3, do_sample=False)
        assert tokens.shape == (3, 11)
    with pytest.raises(ValueError, match="needs ilora_z"):
        model(input_ids=ids, fused=True)
    assert model.ilora.state.current.gate is None


def test_its_gradients_under_checkpointing():
    """Two forwards before two backwards, each with gates of its own."""
    gradients = []
    for reentrant in (None, False, True):
        model = fuse(injected()).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        inputs = [{**batch(), "ilora_z": scale * batch()["ilora_z"]} for scale in (1, -1)]
        outputs = [model(**i, fused=True, use_cache=False) for i in inputs]
        for output in outputs:
            output.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-6, atol=1e-6)


def test_balance_cannot_be_lost():
    model = fuse(injected(balance=0.1)).train()
    assert model(**batch()).loss > 0
    with pytest.raises(RuntimeError, match="balance"):
        model(**batch(), fused=True)


def test_hooks_from_before_and_after_inject():
    """As accelerate's device maps; the first is there again after eject."""
    expected = injected()(**batch()).logits
    before = injected(add_hook_to_module(worker.tiny_llama(), ModelHook()))
    assert torch.equal(before(**batch()).logits, expected)
    after = add_hook_to_module(injected(), ModelHook())
    assert torch.equal(after(**batch()).logits, expected)
    assert torch.equal(remove_hook_from_module(after)(**batch()).logits, expected)
    plain = worker.tiny_llama().eval()(batch()["input_ids"]).logits
    assert torch.equal(ilora.eject(before)(batch()["input_ids"]).logits, plain)
    assert torch.equal(remove_hook_from_module(before)(batch()["input_ids"]).logits, plain)
    assert torch.equal(ilora.eject(fuse(injected()))(input_ids=batch()["input_ids"]).logits, plain)


def test_a_copy_has_gates_of_its_own():
    model = add_hook_to_module(injected(), ModelHook())
    expected = model(**batch()).logits
    copied = copy.deepcopy(model)
    for layer in ilora.ilora_layers(model).values():
        layer.lora_B.data.zero_()
    assert torch.equal(copied(**batch()).logits, expected)


@pytest.mark.parametrize("keep", [True, False])
def test_accelerates_autocast_and_back(keep):
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(injected())
    expected = injected()(**batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = injected()(**batch()).logits.float()
    torch.testing.assert_close(model(**batch()).logits, rounded, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model(**batch()).logits, expected)
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=keep)
    torch.testing.assert_close(unwrapped(**batch()).logits, rounded if keep else expected, rtol=1e-5, atol=1e-5)
    if not keep:
        assert torch.equal(unwrapped(**batch()).logits, expected)
