"""torch.compile of an injected model: one graph, no recompilation for a new gate, the gradients of eager."""

import copy

import pytest
import torch
from cases import assert_same

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

import training_worker as worker  # noqa: E402

BACKEND = "aot_eager"  # the whole of tracing and differentiating, without a C++ compiler


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def injected(gate=ilora.SequenceGate, dropout=0.0, layers=1, **options):
    model = worker.tiny_llama(layers=layers)
    torch.manual_seed(1)
    options = {"z_dim": 6} | options if gate is ilora.SequenceGate else options
    config = ilora.ILoRAConfig(r=8, num_experts=4, lora_dropout=dropout)
    ilora.inject(model, config, gate=gate(**options) if gate else None)
    for layer in ilora.ilora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    if gate:
        torch.nn.init.normal_(model.ilora_gate.weight, std=1.0)
    return model.train()


def batch(seed=0, n=4, z=True):
    rows = worker.examples(n, seed=seed)
    names = ("input_ids", "labels", "ilora_z") if z else ("input_ids", "labels")
    return {name: torch.tensor([row[name] for row in rows]) for name in names}


def step(model, inputs, plain=None):
    """(loss, gradients of all that is trained)."""
    plain = model if plain is None else plain
    plain.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in plain.named_parameters() if p.requires_grad}


def assert_close(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_compiled_follows(model, make_batch=batch, compiled=None):
    """The compiled model equals the eager one on several batches, and traces the first only."""
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND) if compiled is None else compiled
    assert_close(step(compiled, make_batch(0), model), step(eager, make_batch(0)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (1, 2):
            assert_close(step(compiled, make_batch(seed), model), step(eager, make_batch(seed)))


PER_LAYER = {"kind": "topk", "balance": 0.1, "per_layer": True, "layers": 2}


@pytest.mark.parametrize("options", [{}, PER_LAYER], ids=["dense", "topk-balance-per-layer"])
def test_whole_model_with_a_sequence_gate(options):
    assert_compiled_follows(injected(**options))


def test_whole_model_with_a_prompt_gate():
    assert_compiled_follows(injected(ilora.PromptGate), lambda seed: batch(seed, z=False))


def gates(seed):
    return torch.rand(4, 4, generator=torch.Generator().manual_seed(seed))


def test_gated_around_a_compiled_model():
    model = injected(None).eval()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    for seed in range(3):
        gate = gates(seed).requires_grad_()
        with ilora.gated(model, gate):
            found, expected = (called(**batch(z=False)).logits for called in (compiled, model))
        assert_same(found, expected, [gate, next(iter(ilora.ilora_layers(model).values())).lora_A], tolerance=1e-5)


def test_given_gates_for_packed_rows():
    inputs = [{name: value.view(1, -1) for name, value in batch(seed, z=False).items()} for seed in range(3)]
    segments = [torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 8, 16, 24, 32], [0, 3, 9, 30, 32])]

    def packed(seed):
        return inputs[seed] | {"ilora_gate": gates(seed), "ilora_segments": segments[seed % 2]}

    assert_compiled_follows(injected(None), packed)


def test_packed_rows_without_segments_fail():
    model = injected(ilora.PromptGate)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    inputs = {name: value.view(1, -1) for name, value in batch(z=False).items()}
    step(compiled, inputs | {"position_ids": torch.arange(32)[None]}, model)
    with pytest.raises(RuntimeError, match="give ilora_segments"):
        compiled(**inputs, position_ids=torch.arange(32)[None] % 8, use_cache=False)


def test_layer_by_layer():
    model = injected(layers=2)
    eager = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=BACKEND)
    assert_close(step(model, batch(0)), step(eager, batch(0)))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(step(model, batch(1)), step(eager, batch(1)))


def test_whole_model_with_gradient_checkpointing():
    model = injected(dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # its hook is no part of a graph; this kind of checkpoint needs none
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    plain = injected(dropout=0.1)
    torch.manual_seed(3)
    expected = step(plain, batch())
    torch.manual_seed(3)
    assert_close(step(compiled, batch(), model), expected)


def test_layers_compiled_under_eager_checkpointing():
    model = injected()
    eager = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.compile(backend=BACKEND)
    for seed in range(2):
        assert_close(step(model, batch(seed)), step(eager, batch(seed)))


def test_training_through_the_compiled_model():
    model = injected()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    losses = []
    for called, plain in ((compiled, model), (eager, eager)):
        optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(10):
            losses[-1].append(step(called, batch(), plain)[0].item())
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < 0.7 * losses[0][0]


def test_trainer_compiles(tmp_path):
    import transformers as hf

    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    results = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": BACKEND}):
        model = injected()
        args = worker.arguments(tmp_path, optim="sgd", max_steps=3, save_strategy="steps", save_steps=3, **options)
        hf.Trainer(model, args, train_dataset=datasets.Dataset.from_list(worker.examples())).train()
        results.append(worker.trainable(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-5)
    model = injected()
    ilora.load_adapter(model, tmp_path / "checkpoint-3")
    assert all(torch.equal(p, results[1][name]) for name, p in worker.trainable(model).items())


def test_a_compiled_model_is_not_injected():
    with pytest.raises(ValueError, match=r"OptimizedModule wraps a LlamaForCausalLM: give that one, model\._orig_mod"):
        ilora.inject(torch.compile(worker.tiny_llama()), ilora.ILoRAConfig())


def test_symbolic_sizes():
    model = injected(gate=None).eval()
    model.compile(dynamic=True, backend="eager")
    for B, L in ((4, 9), (3, 12)):
        ids, gate = torch.randint(2, 30, (B, L)), gates(L)[:B]
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "ilora_gate": gate.requires_grad_()}
        found = model(**inputs).logits
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-5, atol=1e-5)
