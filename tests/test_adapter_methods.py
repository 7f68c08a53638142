"""The methods that transformers and diffusers give a model for PEFT's adapters, on a model with ilora's."""

import copy

import pytest
import torch
from models import gates, injected, prompts, randomised
from test_weight_reads import unet

import ilora
from ilora import ILoRAConfig

hf = pytest.importorskip("transformers")
MIXIN = pytest.importorskip("transformers.integrations.peft").PeftAdapterMixin
OTHER = ILoRAConfig(r=4, num_experts=2, target_modules=["q_proj"])
REFUSED = {  # name: (arguments, what to use)
    "disable_adapters": ((), r"with ilora\.disable_adapter\(model\)"),
    "enable_adapters": ((), r"with ilora\.disable_adapter\(model\)"),
    "load_adapter": (("folder",), r"ilora\.load_adapter\(model, path, name=\.\.\.\)"),
    "get_adapter_state_dict": ((), r"ilora\.save_adapter\(model, path\)"),
    "enable_peft_hotswap": ((), r"ilora\.eject\(model\)"),
}


def logits(model, **options):
    return model(prompts([5, 5])[0], **options).logits


def test_adapters_are_added_chosen_and_deleted():
    model = injected()
    want = logits(model, ilora_gate=gates(2))
    model.add_adapter(OTHER, "other")
    assert model.active_adapters() == ["other"]
    assert set(ilora.targets(model)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    randomised(model)
    other = logits(model, ilora_gate=torch.eye(2))
    model.set_adapter("default")
    assert model.active_adapters() == ["default"]
    assert torch.equal(logits(model, ilora_gate=gates(2)), want)
    assert torch.equal(logits(copy.deepcopy(model), ilora_gate=gates(2)), want)
    model.set_adapter(["other"])
    assert torch.equal(logits(model, ilora_gate=torch.eye(2)), other)
    model.delete_adapter(["default"])
    assert ilora.adapters(model) == ("other",)


@pytest.mark.parametrize(
    "name", sorted(name for name in vars(MIXIN) if not name.startswith("_") and callable(vars(MIXIN)[name]))
)
def test_no_method_of_peft_is_left(name):
    model = injected()
    assert getattr(type(model), name) is not getattr(MIXIN, name)
    if name in REFUSED:
        arguments, words = REFUSED[name]
        with pytest.raises(ValueError, match=rf"{name} is for PEFT's adapters, and this model has ilora's; .*{words}"):
            getattr(model, name)(*arguments)
    assert getattr(type(ilora.eject(model)), name) is getattr(MIXIN, name)


def test_what_cannot_be_delegated_is_refused():
    model = injected()
    with pytest.raises(ValueError, match=r"one adapter is active at a time, got \['a', 'b'\]"):
        model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="there is no adapter 'a'"):
        model.set_adapter("a")
    with pytest.raises(ValueError, match="'default' is the active one"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        model.add_adapter(OTHER)
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match="config: expected an ILoRAConfig, got LoraConfig"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "more")


def test_a_method_of_the_models_own_stays():
    """Wav2Vec2's load_adapter changes the language, and is no method for PEFT's adapters."""
    assert type(injected()).load_adapter is not MIXIN.load_adapter
    from test_without_embeddings import wav2vec2

    model = ilora.inject(wav2vec2()[0], ILoRAConfig(target_modules=["q_proj"]))
    assert type(model).load_adapter is hf.Wav2Vec2ForCTC.load_adapter
    with pytest.raises(ValueError, match="disable_adapters is for PEFT's"):
        model.disable_adapters()


def test_plain_modules_have_no_such_methods():
    net = ilora.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), ILoRAConfig(r=4, num_experts=2))
    assert not hasattr(net, "set_adapter")
    assert not hasattr(net, "load_adapter")


def test_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = ilora.inject(unet(diffusers), ILoRAConfig(r=4, num_experts=2, target_modules=["to_q"]))
    for name in ("disable_lora", "fuse_lora", "load_lora_adapter", "set_adapters", "save_lora_adapter"):
        with pytest.raises(ValueError, match=f"{name} is for PEFT's adapters"):
            getattr(model, name)()
    assert model.active_adapters() == ["default"]
