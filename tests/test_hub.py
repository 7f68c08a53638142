"""Pushing to and loading from the Hub, by a client with the real one's signatures and a dict behind it."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saved_cases import FILES, adapted, assert_same_state, assert_untouched, bits, llama, logits, randomise, uniform

import ilora
from ilora import AdapterError, PromptGate, SequenceGate

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """repos: {"owner/name": {file: bytes}}; calls: {method: its arguments by name}; tokens of the clients."""
    server = SimpleNamespace(repos={}, calls={}, tokens=[])

    real = hub.HfApi

    class Client:
        def __init__(self, endpoint=None, token=None):
            server.tokens.append(token)

        def __getattr__(self, name):
            signature = inspect.signature(getattr(real, name))

            def call(*args, **kwargs):
                given = server.calls[name] = signature.bind(self, *args, **kwargs).arguments
                return globals()[name](server, tmp_path, **{k: v for k, v in given.items() if k != "self"})

            return call

    monkeypatch.setattr(hub, "HfApi", Client)
    return server


def create_repo(server, folder, repo_id, private=None, exist_ok=False):
    repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
    assert exist_ok or repo_id not in server.repos
    server.repos.setdefault(repo_id, {})
    return SimpleNamespace(repo_id=repo_id)


def file_exists(server, folder, repo_id, filename):
    return filename in server.repos[repo_id]


def upload_folder(server, folder, repo_id, folder_path, commit_message, allow_patterns):
    files = [file for file in Path(folder_path).iterdir() if file.name in allow_patterns]
    server.repos[repo_id] |= {file.name: file.read_bytes() for file in files}
    return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{len(files)}")


def snapshot_download(server, folder, repo_id, revision, allow_patterns):
    if repo_id not in server.repos:
        raise LookupError("Repository not found")
    (folder / "cache").mkdir(exist_ok=True)
    for name, content in server.repos[repo_id].items():
        if name in allow_patterns:
            (folder / "cache" / name).write_bytes(content)
    return str(folder / "cache")


def test_an_adapter_goes_to_the_hub_and_comes_back(server):
    model = adapted(llama(), SequenceGate(6, 4))
    address = ilora.push_adapter(model, "someone/their-adapter", private=True, token="hf_secret")
    assert server.calls["create_repo"]["private"] is True
    assert address == "https://hub/someone/their-adapter/commit/5"
    assert sorted(server.repos["someone/their-adapter"]) == sorted([*FILES, "README.md"])
    server.repos["someone/their-adapter"]["optimizer.pt"] = b"not ours"
    again = ilora.load_adapter(llama(), "someone/their-adapter", revision="v1", token=False)
    assert server.calls["snapshot_download"]["revision"] == "v1"
    assert "optimizer.pt" not in server.calls["snapshot_download"]["allow_patterns"]
    assert server.tokens == ["hf_secret", False]
    assert_same_state(again.state_dict(), model.state_dict())
    plain = ilora.from_peft("someone/their-adapter", 4, model=llama())
    assert torch.equal(logits(plain, ilora_gate=uniform()), logits(model, ilora_gate=uniform()))


def test_save_pretrained_pushes(server, tmp_path):
    model = adapted(llama(layers=1), PromptGate(4))
    model.save_pretrained(tmp_path / "a", push_to_hub=True, token="hf_secret", commit_message="first")
    assert server.calls["upload_folder"]["commit_message"] == "first"
    assert sorted(server.repos["me/a"]) == sorted([*FILES, "README.md"])
    assert_same_state(ilora.load_adapter(llama(layers=1), "me/a").state_dict(), model.state_dict())


def test_a_card_written_on_the_hub_is_kept(server):
    model = adapted(llama(layers=1), PromptGate(4))
    ilora.push_adapter(model, "me/b")
    assert b"iLoRA" in server.repos["me/b"]["README.md"]
    server.repos["me/b"]["README.md"] = b"my own card"
    ilora.push_adapter(randomise(model, std=0.3), "me/b")
    assert server.repos["me/b"]["README.md"] == b"my own card"
    assert_same_state(ilora.load_adapter(llama(layers=1), "me/b").state_dict(), model.state_dict())


def test_what_the_hub_lacks_or_damaged(server):
    model = llama(layers=1)
    before = bits(model)
    # whatever the client raises, of a connection that is cut too
    with pytest.raises(AdapterError, match=r"nobody/nothing: .* not on the Hub either: Repository not found"):
        ilora.load_adapter(model, "nobody/nothing")
    ilora.push_adapter(adapted(llama(layers=1), PromptGate(4)), "me/b")
    del server.repos["me/b"]["ilora_gate.safetensors"]
    with pytest.raises(AdapterError, match=r"ilora_gate\.safetensors: is missing"):
        ilora.load_adapter(model, "me/b")
    assert_untouched(model, before)
