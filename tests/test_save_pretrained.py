"""transformers' own way of saving: its Trainer writes checkpoints with it, resumes from them and reads the best."""

import os

import pytest
import torch
from saved_cases import FILES, NormedGate, adapted, assert_same_state, ids, llama
from torch import nn

import ilora
from ilora import AdapterError, PromptGate, SequenceGate

pytest.importorskip("safetensors")
pytest.importorskip("transformers")


@pytest.mark.parametrize("given", [False, True])
def test_save_pretrained_is_what_a_trainer_resumes_from(tmp_path, given):
    from safetensors.torch import load_file

    model = adapted(llama(), NormedGate(), modules_to_save=("lm_head",))
    state = {"_fsdp_wrapped_module." + key: value for key, value in model.state_dict().items()} if given else None
    model.save_pretrained(tmp_path / "a", state_dict=state, is_main_process=True, max_shard_size="5GB")
    assert sorted(os.listdir(tmp_path / "a")) == sorted([*FILES, "README.md", "model.safetensors"])
    values = load_file(tmp_path / "a" / "model.safetensors")
    assert not any("base_layer" in key or "embed" in key for key in values)
    again = adapted(llama(), NormedGate(), modules_to_save=("lm_head",), std=0.5)
    result = again.load_state_dict(values, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(again.state_dict(), model.state_dict())
    again = ilora.load_adapter(llama(), tmp_path / "a", gate=NormedGate())
    assert_same_state(again.state_dict(), model.state_dict())


def test_save_pretrained_takes_the_tensors_it_is_given(tmp_path):
    model = adapted(llama(layers=1), SequenceGate(6, 4))
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", state_dict=state)
    again = ilora.load_adapter(llama(layers=1), tmp_path / "a")
    assert torch.equal(again.ilora_gate.weight, state["ilora_gate.weight"])
    path = ilora.targets(model)[0]
    assert torch.equal(again.get_parameter(f"{path}.lora_B"), state[f"{path}.lora_B"])
    del state["ilora_gate.weight"]
    with pytest.raises(AdapterError, match=r"state_dict: tensor 'ilora_gate\.weight' is missing"):
        model.save_pretrained(tmp_path / "b", state_dict=state)
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    with pytest.raises(TypeError, match="unexpected arguments safe"):
        model.save_pretrained(tmp_path / "d", safe=True)
    with pytest.raises(ValueError, match="pickle"):
        model.save_pretrained(tmp_path / "d", safe_serialization=False)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_trainer_saves_resumes_and_reads_the_best(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def trainer(model, steps):
        options = {"max_steps": steps, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "logging_steps": 1}
        arguments = transformers.TrainingArguments(
            str(tmp_path), **options, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True,
            load_best_model_at_end=True, learning_rate=1e-2, seed=3,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids(6)]
        return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])

    whole = adapted(llama(layers=1), PromptGate(4)).train()
    trainer(whole, 4).train()
    resumed = adapted(llama(layers=1), PromptGate(4), std=0.7).train()
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(resumed.state_dict(), whole.state_dict())
    assert (tmp_path / "checkpoint-4" / "ilora_config.json").exists()
    assert_same_state(ilora.load_adapter(llama(layers=1), tmp_path / "checkpoint-4").state_dict(), whole.state_dict())


def test_extra_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state): ...

    with pytest.raises(TypeError, match="not a tensor"):
        ilora.save_adapter(adapted(llama(layers=1), Odd(6, 4)), tmp_path / "a")
    assert not list(tmp_path.iterdir())
