"""Pushing and loading through the Hub's protocol, against a server on this machine that speaks enough of it."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from saved_cases import FILES, adapted, assert_same_state, assert_untouched, bits, llama, logits, randomise, uniform

import ilora
from ilora import AdapterError, PromptGate, SequenceGate

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")


class FakeHub(ThreadingHTTPServer):
    """repos: {"owner/name": {file: bytes}}, one commit each, whose name is the SHA-1 of its files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.asked, self.private, self.tokens = {}, [], {}, set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def sha(self, repo):
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args): ...

    def answer(self, value, status=200, headers=()):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in (("Content-Length", str(len(body))), ("Content-Type", "application/json"), *headers):
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, hub = urlsplit(self.path).path, self.server
        hub.asked.append(("POST", path))
        hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            hub.private[repo] = wanted.get("private") or wanted.get("visibility") == "private"  # older clients, newer
            hub.repos.setdefault(repo, {})
            return self.answer({"url": f"{hub.url}/{repo}", "name": repo, "id": repo})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        repo, _, rest = path.removeprefix("/api/models/").partition("/commit/")
        if rest:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            sha = hub.sha(repo)
            return self.answer({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"})
        return self.answer({"error": "Not Found"}, 404)

    def do_GET(self):
        path, hub = unquote(urlsplit(self.path).path), self.server
        hub.asked.append((self.command, path))
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            if repo not in hub.repos:
                return self.answer({"error": "Repository not found"}, 404, [("X-Error-Code", "RepoNotFound")])
            files = hub.repos[repo]
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for f, b in files.items()
                ]
                return self.answer(tree)
            return self.answer({"id": repo, "sha": hub.sha(repo), "siblings": [{"rfilename": f} for f in files]})
        owner, name, resolve, revision, file = path.strip("/").split("/", 4)
        repo = f"{owner}/{name}"
        if resolve != "resolve" or file not in hub.repos.get(repo, {}):
            return self.answer({"error": "Entry not found"}, 404, [("X-Error-Code", "EntryNotFound")])
        content = hub.repos[repo][file]
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(content, headers=[("ETag", f'"{etag}"'), ("X-Repo-Commit", hub.sha(repo))])

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"  # nothing may ask the real one
    monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    hub.utils.disable_progress_bars()
    yield server
    server.shutdown()
    server.server_close()


def test_an_adapter_goes_to_the_hub_and_comes_back(server):
    model = adapted(llama(), SequenceGate(6, 4))
    address = ilora.push_adapter(model, "someone/their-adapter", private=True, token="hf_secret")
    assert server.private == {"someone/their-adapter": True}
    assert address == f"{server.url}/someone/their-adapter/commit/{server.sha('someone/their-adapter')}"
    assert sorted(server.repos["someone/their-adapter"]) == sorted([*FILES, "README.md"])
    assert server.tokens == {"Bearer hf_secret"}
    server.repos["someone/their-adapter"]["optimizer.pt"] = b"not ours"
    again = ilora.load_adapter(llama(), "someone/their-adapter", token=False)
    assert_same_state(again.state_dict(), model.state_dict())
    assert not [path for _, path in server.asked if path.endswith("optimizer.pt")]
    plain = ilora.from_peft("someone/their-adapter", 4, model=llama())
    assert torch.equal(logits(plain, ilora_gate=uniform()), logits(model, ilora_gate=uniform()))


def test_save_pretrained_pushes(server, tmp_path):
    model = adapted(llama(layers=1), PromptGate(4))
    model.save_pretrained(tmp_path / "a", push_to_hub=True, repo_id="me/b", token="hf_secret", commit_message="first")
    assert sorted(server.repos["me/b"]) == sorted([*FILES, "README.md"])
    assert_same_state(ilora.load_adapter(llama(layers=1), "me/b", token=False).state_dict(), model.state_dict())


def test_a_card_written_on_the_hub_is_kept(server):
    model = adapted(llama(layers=1), PromptGate(4))
    ilora.push_adapter(model, "me/b", token="hf_secret")
    assert b"iLoRA" in server.repos["me/b"]["README.md"]
    server.repos["me/b"]["README.md"] = b"my own card"
    ilora.push_adapter(randomise(model, std=0.3), "me/b", token="hf_secret")
    assert server.repos["me/b"]["README.md"] == b"my own card"
    assert_same_state(ilora.load_adapter(llama(layers=1), "me/b", token=False).state_dict(), model.state_dict())


def test_a_connection_that_is_cut_is_named(monkeypatch):
    class RemoteProtocolError(Exception):
        """Of an HTTP client: no OSError."""

    def cut(*args, **kwargs):
        raise RemoteProtocolError("peer closed connection")

    monkeypatch.setattr(hub.HfApi, "snapshot_download", cut)
    with pytest.raises(AdapterError, match=r"me/b: .*peer closed connection"):
        ilora.load_adapter(llama(layers=1), "me/b", token=False)


def test_what_the_hub_lacks_or_damaged(server):
    model = llama(layers=1)
    before = bits(model)
    with pytest.raises(AdapterError, match=r"nobody/nothing: there is no such directory, and not on the Hub either"):
        ilora.load_adapter(model, "nobody/nothing", token=False)
    ilora.push_adapter(adapted(llama(layers=1), PromptGate(4)), "me/b", token="hf_secret")
    del server.repos["me/b"]["ilora_gate.safetensors"]
    with pytest.raises(AdapterError, match=r"ilora_gate\.safetensors: is missing"):
        ilora.load_adapter(model, "me/b", token=False)
    assert_untouched(model, before)
