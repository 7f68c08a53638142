"""A save that fails leaves what was there, or nothing; one cut short between two files is noticed."""

import os
from contextlib import contextmanager

import pytest
from saved_cases import adapted, assert_same_state, assert_untouched, bits, llama, randomise

import ilora
from ilora import AdapterError, SequenceGate

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")


@contextmanager
def failing(monkeypatch, function, after):
    """In this block os.<function> or safetensors' save_file fails as on a full disk, after so many calls."""
    owner = safetensors if function == "save_file" else os
    real, calls = getattr(owner, function), []

    def fake(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            if function == "save_file":
                with open(args[1], "wb") as file:
                    file.write(b"half")
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fake)
        with pytest.raises(OSError, match="No space left"):
            yield


@pytest.fixture
def model():
    return adapted(llama(layers=1), SequenceGate(6, 4))


FAILURES = [("save_file", 0), ("save_file", 1), ("fsync", 3)]


@pytest.mark.parametrize("failure", [*FAILURES, ("rename", 0)])
def test_a_failed_save_leaves_no_new_directory(tmp_path, monkeypatch, model, failure):
    with failing(monkeypatch, *failure):
        ilora.save_adapter(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [*FAILURES, ("replace", 0)])
def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch, model, failure):
    path = ilora.save_adapter(model, tmp_path / "a")
    (path / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    randomise(model, std=0.2)
    with failing(monkeypatch, *failure):
        ilora.save_adapter(model, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    ilora.save_adapter(model, path)
    assert_same_state(ilora.load_adapter(llama(layers=1), path).state_dict(), model.state_dict())
    assert (path / "README.md").read_text() == "mine"


def test_a_directory_that_appears_meanwhile_is_written_into(tmp_path, monkeypatch, model):
    real = os.rename

    def late(source, target):  # another process saves to the same name
        ilora.save_adapter(adapted(llama(layers=1)), tmp_path / "other")
        real(tmp_path / "other", target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *names: late(*names) if names[1] == tmp_path / "a" else real(*names))
        path = ilora.save_adapter(model, tmp_path / "a")
    assert_same_state(ilora.load_adapter(llama(layers=1), path).state_dict(), model.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_what_an_earlier_save_left_is_removed_and_nothing_else(tmp_path, model):
    path = tmp_path / "a"
    model.save_pretrained(path)
    (path / "trainer_state.json").write_text("{}")
    ilora.eject(model)
    ilora.save_adapter(adapted(model), path)
    kept = {"README.md", "adapter_config.json", "adapter_model.safetensors", "ilora_config.json", "trainer_state.json"}
    assert {file.name for file in path.iterdir()} == kept
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text("the base")  # a base model's own directory
    ilora.save_adapter(model, path)
    assert (path / "model.safetensors").read_text() == "the base"


def test_fragments_are_refused(tmp_path):
    model = adapted(llama(layers=1), SequenceGate(6, 4), modules_to_save=("lm_head",))
    state = model.state_dict()
    last = list(ilora.ilora_layers(model).values())[-1]
    part = last.lora_B.detach().flatten()[:5]  # as FSDP1 leaves a process
    for name in (f"{last.name}.lora_B", "ilora_gate.weight", "lm_head.weight"):
        with pytest.raises(AdapterError, match=rf"{name}: expected shape \[.*, got \[5\]: a fragment"):
            model.save_pretrained(tmp_path / "a", state_dict={**state, name: part})
    last.lora_B.data, model.lm_head.weight.data = part, part
    with pytest.raises(AdapterError, match=r"lora_B: expected shape \[16, 8\], got \[5\]: a fragment"):
        ilora.save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "a", state_dict=state)
    loaded = ilora.load_adapter(llama(layers=1), tmp_path / "a")
    assert_same_state(loaded.state_dict(), state)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_save_cut_short_between_two_files_is_noticed(tmp_path, monkeypatch, model, after):
    path = ilora.save_adapter(model, tmp_path / "a")
    ilora.eject(model)
    adapted(model, SequenceGate(6, 4), std=0.3, lora_alpha=8)
    with failing(monkeypatch, "replace", after):
        ilora.save_adapter(model, path)
    assert not [file for file in path.iterdir() if file.name.startswith(".")]
    fresh = llama(layers=1)
    before = bits(fresh)
    with pytest.raises(AdapterError, match=r"adapter_config\.json: damaged, or not of this save"):
        ilora.load_adapter(fresh, path)
    assert_untouched(fresh, before)
