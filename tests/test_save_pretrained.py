"""transformers' own way of saving, by which its Trainer writes its checkpoints."""

import os

import pytest
import torch
from saved_cases import FILES, NormedGate, adapted, assert_same_state, llama
from torch import nn

import ilora
from ilora import AdapterError, SequenceGate

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")


def test_save_pretrained_writes_what_a_trainer_resumes_from(tmp_path):
    model = adapted(llama(), NormedGate(), modules_to_save=("lm_head",))
    model.save_pretrained(tmp_path / "a", is_main_process=True, max_shard_size="5GB")
    assert sorted(os.listdir(tmp_path / "a")) == sorted([*FILES, "README.md", "model.safetensors"])
    values = safetensors.load_file(tmp_path / "a" / "model.safetensors")
    assert not any("base_layer" in key or "embed" in key for key in values)
    again = adapted(llama(), NormedGate(), modules_to_save=("lm_head",), std=0.5)
    result = again.load_state_dict(values, strict=False)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same_state(again.state_dict(), model.state_dict())


def test_save_pretrained_takes_the_tensors_it_is_given(tmp_path):
    model = adapted(llama(layers=1), SequenceGate(6, 4))
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", state_dict={f"_fsdp_wrapped_module.{key}": state[key] for key in state})
    again = ilora.load_adapter(llama(layers=1), tmp_path / "a").state_dict()
    trained = [key for key in state if "lora" in key]
    assert len(trained) == 15
    assert all(torch.equal(again[key], state[key]) for key in trained)
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    del state["ilora_gate.weight"]
    for error, words, options in (
        (AdapterError, r"state_dict: tensor 'ilora_gate\.weight' is missing", {"state_dict": state}),
        (TypeError, "unexpected arguments safe", {"safe": True}),
        (ValueError, "pickle", {"safe_serialization": False}),
    ):
        with pytest.raises(error, match=words):
            model.save_pretrained(tmp_path / "b", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_extra_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state): ...

    with pytest.raises(TypeError, match="not a tensor"):
        ilora.save_adapter(adapted(llama(layers=1), Odd(6, 4)), tmp_path / "a")
    assert not list(tmp_path.iterdir())
