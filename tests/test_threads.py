"""One model, several threads: they take turns, and each has its own gate."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")

import training_worker as worker  # noqa: E402

IDS = torch.arange(3, 13)[None]


@pytest.fixture
def model():
    model = ilora.inject(worker.tiny_llama().eval(), ilora.ILoRAConfig(r=8, num_experts=4))
    for layer in ilora.ilora_layers(model).values():
        layer.lora_B.data.normal_(std=0.5)
    return model


@torch.no_grad()
def test_each_thread_has_its_own_gate(model):
    gates = list(torch.eye(4)[:, None])
    alone = [model(IDS, ilora_gate=gate).logits for gate in gates]
    texts = [model.generate(IDS, ilora_gate=gate, max_new_tokens=4, do_sample=False) for gate in gates]
    assert len({tuple(text[0].tolist()) for text in texts}) > 1

    def ask(n):
        with torch.no_grad():
            logits = model(IDS, ilora_gate=gates[n % 4]).logits
            return logits, model.generate(IDS, ilora_gate=gates[n % 4], max_new_tokens=4, do_sample=False)

    with ThreadPoolExecutor(4) as pool:
        for n, (logits, text) in enumerate(pool.map(ask, range(24))):
            assert torch.equal(logits, alone[n % 4])
            assert torch.equal(text, texts[n % 4])
    assert model.ilora.state.current.gate is None


@torch.no_grad()
def test_a_block_holds_in_a_thread_that_it_starts(model):
    gate, found = torch.eye(4)[:1], []
    wanted = model(IDS, ilora_gate=gate).logits
    with ilora.gated(model, gate):
        thread = threading.Thread(target=lambda: found.append(model(IDS).logits))
        thread.start()
        thread.join(60)
    assert torch.equal(found[0], wanted)


@torch.no_grad()
def test_a_block_does_not_reach_into_another_thread_s_forward(model):
    first, second = torch.eye(4)[:1], torch.eye(4)[1:2]
    wanted = model(IDS, ilora_gate=first).logits
    inside, go, found = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        go.wait(60)

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(model(IDS, ilora_gate=first).logits))
    thread.start()
    inside.wait(60)
    handle.remove()
    threading.Timer(0.2, go.set).start()
    with ilora.gated(model, second):  # waits for the forward that is under way
        assert go.is_set()
    thread.join(60)
    assert torch.equal(found[0], wanted)
