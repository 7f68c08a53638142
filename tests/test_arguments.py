"""Arguments and settings of a wrong kind are refused by us, by name, wherever they come in."""

import numpy as np
import pytest
import torch
from models import E, gates, injected, llama, prompts
from torch import nn

import ilora
from ilora import ILoRAConfig, ILoRALinear

SETTINGS = [
    ({"r": "8"}, TypeError, "r: expected an int, got '8'"),
    ({"r": 8.0}, TypeError, r"r: expected an int, got 8\.0"),
    ({"r": 512}, ValueError, "r: must be at most 256, got 512"),
    ({"lora_alpha": "32"}, TypeError, "lora_alpha: expected a number, got '32'"),
    ({"lora_alpha": float("nan")}, ValueError, "lora_alpha: must be finite, got nan"),
    ({"lora_dropout": None}, TypeError, "lora_dropout: expected a number, got None"),
    ({"backend": "cuda"}, ValueError, "backend: must be None or one of .*, got 'cuda'"),
    ({"adapter_dtype": torch.int8}, ValueError, r"adapter_dtype: must be one of .*, got torch\.int8"),
    ({"adapter_dtype": "int8"}, ValueError, "adapter_dtype: must be one of .*, got 'int8'"),
]


@pytest.mark.parametrize("kind", [ILoRAConfig, lambda **options: ILoRALinear(nn.Linear(4, 4), **options)])
@pytest.mark.parametrize(("options", "error", "words"), SETTINGS)
def test_settings_of_a_layer_and_of_a_config(kind, options, error, words):
    with pytest.raises(error, match=words):
        kind(**options)


def test_a_refused_layer_leaves_its_base_trainable():
    base = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="adapter_dtype"):
        ILoRALinear(base, adapter_dtype="int8")
    assert base.weight.requires_grad


def test_a_rank_from_a_pattern_has_the_same_limit():
    with pytest.raises(ValueError, match=r"rank_pattern: must hold ranks of at most 256, got \{'q_proj': 512\}"):
        ILoRAConfig(rank_pattern={"q_proj": 512})
    assert ILoRAConfig(r=256, rank_pattern={"q_proj": 256}).r == 256


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_adapter_dtype_is_a_name_or_a_dtype(dtype):
    config = ILoRAConfig(adapter_dtype=dtype)
    assert config.adapter_dtype == config.to_dict()["adapter_dtype"] == "bfloat16"
    assert ILoRALinear(nn.Linear(4, 4), adapter_dtype=dtype).lora_A.dtype == torch.bfloat16
    model = ilora.inject(nn.Sequential(nn.Linear(4, 4)), config)
    assert model[0].lora_B.dtype == torch.bfloat16


def test_a_wrong_x_is_not_blamed_on_the_adapter():
    x, gate = torch.randn(4, 6, 15), torch.rand(4, 4)
    layer = ILoRALinear(nn.Linear(16, 24))
    with pytest.raises(ValueError, match=r"^ILoRALinear: x: expected \[\.\.\., 16\].*, got \[4, 6, 15\]"):
        layer(x, gate=gate)
    with pytest.raises(ValueError, match=r"^x: expected \[\.\.\., 16\].*, got \[4, 6, 15\]"):
        ilora.ilora_linear(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, gate, 1.0)
    model = injected(llama)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj: x: expected \[\.\.\., 32\]"):
        model.model.layers[0].mlp.up_proj(x, gate=gate)


@pytest.mark.parametrize("gate", [[[0.25] * 4] * 2, None, np.ones((2, 4), "f"), torch.tensor(1.0), torch.ones(2, 3)])
def test_a_gate_that_is_none(gate):
    layer = ILoRALinear(nn.Linear(10, 6))
    kind = RuntimeError if gate is None else ValueError if isinstance(gate, torch.Tensor) else TypeError
    with pytest.raises(kind, match="no gate" if gate is None else "gate: expected"):
        layer(torch.randn(2, 10), gate=gate)
    if not isinstance(gate, torch.Tensor):
        with pytest.raises(TypeError, match="gate: expected a float tensor"), ilora.gated(layer, gate):
            pass
        with pytest.raises(TypeError, match="gate: expected a float tensor"):
            ilora.gate_stats(gate)
    with pytest.raises(TypeError, match="segments: expected int32"), ilora.gated(layer, torch.rand(1, 4), [0, 2]):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scaling": None}, "scaling: expected a number, got None"),
        ({"scaling": "1"}, "scaling: expected a number, got '1'"),
        ({"dropout_p": None}, "dropout_p: expected a number, got None"),
        ({"dropout_p": "a"}, "dropout_p: expected a number, got 'a'"),
        ({"weight": None}, "weight: expected a torch.Tensor, got None; ilora_update"),
    ],
)
def test_numbers_and_weights_of_the_function(options, words):
    layer = ILoRALinear(nn.Linear(10, 6))
    x, parts = torch.randn(2, 10), {"A": layer.lora_A, "B": layer.lora_B, "gate": torch.rand(2, 4)}
    given = {"weight": layer.weight, "bias": layer.bias, **parts, "scaling": 1.0}
    for number in (1, np.float32(1), torch.tensor(1.0)):
        assert torch.equal(ilora.ilora_linear(x, **{**given, "scaling": number}), ilora.ilora_linear(x, **given))
    with pytest.raises(TypeError, match=words):
        ilora.ilora_linear(x, **{**given, **options})


IDS = prompts((5, 5))[0]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ilora_z": [[1.0] * 6] * 2}, TypeError, r"z: expected a float tensor \[N, z_dim=6\], got list"),
        ({"ilora_z": np.ones((2, 6), "f")}, TypeError, "z: expected a float tensor .* got ndarray"),
        ({"ilora_z": torch.ones(2, 6, device="meta")}, ValueError, "z: expected it on the gate network's device cpu"),
        ({"ilora_gate": [[1.0] * 4] * 2}, TypeError, "gate: expected a float tensor, .*, got list"),
        (
            {"ilora_gate": gates(2), "ilora_segments": [0, 5, 10]},
            TypeError,
            "ilora_segments: expected int32.* got list",
        ),
        ({"ilora_gate": [[1.0]], "ilora_segments": torch.tensor([0, 5])}, TypeError, "gate: expected a float tensor"),
        (
            {"ilora_gate": gates(2), "ilora_segments": torch.tensor([0, 5.5, 10])},
            TypeError,
            "ilora_segments: .*float32",
        ),
        ({"ilora_prompt_mask": [[1] * 5] * 2}, TypeError, "ilora_prompt_mask: expected a bool tensor, got list"),
    ],
)
def test_arguments_of_a_model(options, error, words):
    model = injected(gate=ilora.PromptGate(E) if "ilora_prompt_mask" in options else ilora.SequenceGate(6, E))
    with pytest.raises(error, match=words):
        model(input_ids=IDS, **options)
    if "ilora_gate" not in options:
        with pytest.raises(error, match=words):
            ilora.gate_of(model, input_ids=IDS, **options)


def test_gate_of_takes_its_inputs_by_name():
    model = injected(gate=ilora.PromptGate(E))
    with pytest.raises(TypeError, match="positional argument"):
        ilora.gate_of(model, IDS)
    assert ilora.gate_of(model, input_ids=IDS).shape == (2, E)
    with pytest.raises(TypeError, match="ilora_segments: expected int32"):
        ilora.gate_of(model, input_ids=IDS, ilora_segments=[0, 10])
