"""A save that fails leaves what was there, or nothing; one cut short between two files is noticed."""

import os

import pytest
from saved_cases import (
    adapted,
    assert_same_state,
    assert_untouched,
    bits,
    llama,
    randomise,
)

import ilora
from ilora import AdapterError, SequenceGate

pytest.importorskip("safetensors")
pytest.importorskip("transformers")


def failing(monkeypatch, function, after):
    """os.<function> or safetensors' save_file fails as on a full disk at its n-th call."""
    import safetensors.torch

    owner = safetensors.torch if function == "save_file" else os
    real, calls = getattr(owner, function), []

    def fake(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            if function == "save_file":
                with open(args[1], "wb") as file:
                    file.write(b"half")
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, function, fake)


@pytest.mark.parametrize(("function", "after"), [("save_file", 0), ("save_file", 1), ("fsync", 3), ("rename", 0)])
def test_a_failed_save_leaves_no_new_directory(tmp_path, monkeypatch, function, after):
    model = adapted(llama(layers=1), SequenceGate(6, 4))
    failing(monkeypatch, function, after)
    with pytest.raises(OSError, match="No space left"):
        ilora.save_adapter(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("function", "after"), [("save_file", 0), ("save_file", 1), ("fsync", 3), ("replace", 0)])
def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch, function, after):
    model = adapted(llama(layers=1), SequenceGate(6, 4))
    path = ilora.save_adapter(model, tmp_path / "a")
    (path / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    randomise(model, std=0.2)
    with monkeypatch.context() as patch:
        failing(patch, function, after)
        with pytest.raises(OSError, match="No space left"):
            ilora.save_adapter(model, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    ilora.save_adapter(model, path)
    assert_same_state(ilora.load_adapter(llama(layers=1), path).state_dict(), model.state_dict())
    assert (path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_save_cut_short_between_two_files_is_noticed(tmp_path, monkeypatch, after):
    model = adapted(llama(layers=1), SequenceGate(6, 4))
    path = ilora.save_adapter(model, tmp_path / "a")
    ilora.eject(model)
    adapted(model, SequenceGate(6, 4), std=0.3, lora_alpha=8)
    with monkeypatch.context() as patch:
        failing(patch, "replace", after)
        with pytest.raises(OSError, match="No space left"):
            ilora.save_adapter(model, path)
    assert not [file for file in path.iterdir() if file.name.startswith(".")]
    fresh = llama(layers=1)
    before = bits(fresh)
    with pytest.raises(AdapterError, match=r"adapter_config\.json: damaged, or not of this save"):
        ilora.load_adapter(fresh, path)
    assert_untouched(fresh, before)
