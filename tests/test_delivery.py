"""A gate never reaches the wrong rows: checkpointing, exceptions, packing, threads, copies, and what is refused."""

import copy
import pickle
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers as hf
from models import MODELS, VOCABULARY, E, bert, gates, gpt2, injected, llama, prompts, t5

import ilora

Z = 6


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def interleaved(name, gate, reentrant):
    """Gradients after forward 1, forward 2, backward 1, backward 2, each with other inputs and gates."""
    torch.manual_seed(0)
    network = ilora.SequenceGate(Z, E) if gate == "network" else None
    network = ilora.PromptGate(E) if gate == "prompt" else network
    model = injected(MODELS[name], gate=network, lora_dropout=0.1).train()
    if name in ("t5", "bart"):  # gradients whose float32 sums depend on their order: of t5, its attention is unscaled
        model.double()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses, leaves = [], []
    for i in range(2):
        torch.manual_seed(10 + i)
        ids, mask = prompts((7, 4, 9), seed=i, left=False)
        if gate == "tensor":
            leaves.append(gates(3, seed=i).requires_grad_())
            more = {"ilora_gate": leaves[-1]}
        else:
            more = {"ilora_z": torch.randn(3, Z)} if gate == "network" else {}
        labels = torch.where((mask == 1) & (torch.arange(9) > 2), ids, -100)
        if name == "bert":
            labels = torch.tensor([0, 2, 1])
        losses.append(model(input_ids=ids, attention_mask=mask, labels=labels, **more).loss)
    assert model.ilora.state.current.gate is None
    for loss in losses:
        loss.backward()
    found = gradients(model)
    assert any(key.startswith("ilora_gate") for key in found) == (gate != "tensor")
    return {**found, **{f"gate {i}": leaf.grad for i, leaf in enumerate(leaves)}}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gate", ["tensor", "network", "prompt"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5", "bart"])
def test_interleaved_forwards_under_checkpointing(name, gate, reentrant):
    expected, found = interleaved(name, gate, None), interleaved(name, gate, reentrant)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert max(value.abs().max() for value in expected.values()) > 1e-3


def test_checkpointing_is_exact_but_for_the_order_of_a_shared_gates_sums():
    expected, plain, reentrant = (interleaved("llama", "network", kind) for kind in (None, False, True))
    for key, value in expected.items():
        assert torch.equal(plain[key], value), key
        assert torch.equal(reentrant[key], value) or key.startswith("ilora_gate"), key


def test_checkpoint_wrapper_of_torch():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def run(wrap):
        model = injected().train()
        for i, layer in enumerate(model.model.layers if wrap else []):
            model.model.layers[i] = checkpoint_wrapper(layer)
        ids, _ = prompts((5, 5))
        losses = [model(input_ids=ids, labels=ids, ilora_gate=gates(2, seed=s)).loss for s in range(2)]
        for loss in losses:
            loss.backward()
        return [
            value
            for _, value in sorted(
                (k.replace("_checkpoint_wrapped_module.", ""), v) for k, v in gradients(model).items()
            )
        ]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_checkpointing_switched_on_before_injection_and_after_copying():
    torch.manual_seed(0)
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ilora.inject(model, ilora.ILoRAConfig())
    ids, _ = prompts((5, 5))
    model(input_ids=ids, ilora_gate=gates(2)).logits.sum().backward()
    clone = copy.deepcopy(model)
    clone(input_ids=ids, ilora_gate=gates(2)).logits.sum().backward()
    ilora.eject(model)
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert any(functions)
    assert not any(isinstance(f, ilora.current_gate.CapturingCheckpoint) for f in functions)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_exception_leaves_no_gate_behind(checkpointed):
    model, g = injected().train(), gates(2)
    if checkpointed:
        model.gradient_checkpointing_enable()
    ids, _ = prompts((5, 5))
    expected = model(input_ids=ids, ilora_gate=g).logits
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("broken")))
    with pytest.raises(KeyError, match="broken"):
        model(input_ids=ids, ilora_gate=g.flip(0))
    with pytest.raises(KeyError, match="broken"):
        model.generate(ids, ilora_gate=g.flip(0), max_new_tokens=2)
    handle.remove()
    assert model.ilora.state.current == ilora.current_gate.CurrentGate()
    with pytest.raises(ValueError, match="needs ilora_gate"):
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids, ilora_gate=g).logits, expected)


def packed_batch(lengths):
    ids = torch.cat([prompts((n,), seed=i)[0] for i, n in enumerate(lengths)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return ids, positions, segments


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "mixtral", "opt", "gpt2"])
@pytest.mark.parametrize("source", ["gate", "network", "prompt"])
def test_packed_with_segments_equals_unpacked(name, source):
    network = {"gate": None, "network": ilora.SequenceGate(Z, E), "prompt": ilora.PromptGate(E)}[source]
    if network is not None and source == "network":
        torch.nn.init.normal_(network.weight)
    model, lengths = injected(MODELS[name], gate=network), (5, 3, 8)
    ids, positions, segments = packed_batch(lengths)
    z = torch.randn(3, Z)
    given = {"gate": {"ilora_gate": gates(3)}, "network": {"ilora_z": z}, "prompt": {}}[source]
    block = torch.full((16, 16), float("-inf"))
    for start, end in zip(segments[:-1], segments[1:], strict=True):
        block[start:end, start:end] = torch.triu(torch.full((end - start, end - start), float("-inf")), 1)
    more = {"attention_mask": block[None, None], "position_ids": positions}
    if source == "prompt":
        more["ilora_prompt_mask"] = torch.ones_like(ids, dtype=torch.bool)
    logits = model(input_ids=ids, ilora_segments=segments, **more, **given).logits[0]
    for i, (start, end) in enumerate(zip(segments[:-1], segments[1:], strict=True)):
        own = {key: value[i : i + 1] for key, value in given.items()}
        alone = model(input_ids=ids[:, start:end], **own).logits[0]
        torch.testing.assert_close(logits[start:end], alone, rtol=1e-5, atol=1e-5)


def test_packed_without_segments_is_refused():
    model, g = injected(), gates(3)
    ids, positions, segments = packed_batch((5, 3, 8))
    with pytest.raises(ValueError, match="3 rows for a batch of 1 sequences.*ilora_segments"):
        model(input_ids=ids, ilora_gate=g)
    with pytest.raises(ValueError, match="position_ids says that a row holds several.*ilora_segments"):
        model(input_ids=ids, position_ids=positions, ilora_gate=g)
    with pytest.raises(ValueError, match="cu_seq_lens_q says that a row holds several"):
        model(input_ids=ids, cu_seq_lens_q=segments, ilora_gate=g)
    with pytest.raises(ValueError, match="position_ids says"):
        injected(gate=ilora.PromptGate(E))(input_ids=ids, position_ids=positions)
    with pytest.raises(ValueError, match="position_ids says"):  # one instance's z is not everybody's
        injected(gate=ilora.SequenceGate(Z, E))(input_ids=ids, position_ids=positions, ilora_z=torch.randn(1, Z))
    with pytest.raises(ValueError, match="3 rows for a batch of 1"), ilora.gated(model, g):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"expected offsets rising from 0 to M=16"):
        model(input_ids=ids, ilora_gate=gates(2), ilora_segments=torch.tensor([0, 4, 15], dtype=torch.int32))


@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens_q", "seq_idx", "two packed rows"])
def test_one_gate_for_everybody_needs_no_segments(packing):
    ids, positions, segments = packed_batch((5, 3, 8))
    given = {
        "position_ids": {"position_ids": positions, "use_cache": False},
        "cu_seq_lens_q": {"cu_seq_lens_q": segments},
    }
    given["seq_idx"] = {"seq_idx": torch.tensor([[0] * 5 + [1] * 3 + [2] * 8])}
    given["two packed rows"] = {"position_ids": positions.repeat(2, 1)}
    ids = ids.repeat(2, 1) if packing == "two packed rows" else ids
    model, one, uniform = injected(), gates(1), torch.full((1, E), 1 / E)
    with ilora.gated(model, one):
        inherited = model(input_ids=ids, **given[packing]).logits
    with ilora.disable_adapter(model):
        frozen = model(input_ids=ids, **given[packing]).logits
    expected = model(input_ids=ids, ilora_gate=one, **given[packing]).logits
    assert torch.equal(inherited, expected)
    assert (expected - frozen).abs().max() > 1e-2
    found = injected(gate=ilora.UniformGate(E))(input_ids=ids, **given[packing]).logits
    torch.testing.assert_close(found, model(input_ids=ids, ilora_gate=uniform, **given[packing]).logits)
    if packing == "position_ids":  # each as if alone
        for i in range(2):
            alone = model(input_ids=ids[:, segments[i] : segments[i + 1]], ilora_gate=one).logits
            torch.testing.assert_close(expected[:, segments[i] : segments[i + 1]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(hf.GenerationMixin, "generate_batch"), reason="transformers batches no requests")
def test_continuous_batching_under_one_gate():
    settings = hf.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    asked, small = [[5, 6, 7, 8], [3, 4]], hf.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)

    def answers(model):
        results = model.generate_batch(asked, settings, small, warmup=False)
        return [results[key].error or results[key].generated_tokens for key in sorted(results)]

    one = gates(1)
    for model in (injected(), injected(gate=ilora.UniformGate(E))):
        gate = one if model.ilora_gate is None else None
        with ilora.gated(model, one) if gate is not None else nullcontext():
            found = answers(model)
        for ids, tokens in zip(asked, found, strict=True):
            more = {} if gate is None else {"ilora_gate": gate}
            alone = model.generate(torch.tensor([ids]), generation_config=settings, **more)[0, len(ids) :]
            assert tokens == alone.tolist()


def test_left_padded_positions_are_not_taken_for_packing():
    model, (ids, mask) = injected(), prompts((4, 7))
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, ilora_gate=gates(2))


def test_rows_that_cannot_be_mapped_are_refused_by_name():
    class Folded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.across = torch.nn.Linear(4, 4)

        def forward(self, input_ids, x):
            return self.across(x.transpose(0, 1))

    model = ilora.inject(Folded(), ilora.ILoRAConfig())
    with pytest.raises(ValueError, match=r"across: its input \[6, 2, 4\] is not the batch of 2 sequences"):
        model(torch.ones(2, 6, dtype=torch.long), torch.randn(2, 6, 4), ilora_gate=gates(2))


REFUSED = {
    "no gate": ({}, ValueError, r"needs ilora_gate \[N, 4\]"),
    "two sources": ({"ilora_gate": gates(2), "ilora_z": gates(2)}, ValueError, "both given"),
    "z without a network": ({"ilora_z": gates(2)}, ValueError, "without a gate network"),
    "too many": ({"ilora_gate": gates(4)}, ValueError, "4 rows for a batch of 2 sequences"),
    "experts": ({"ilora_gate": torch.ones(2, 3)}, ValueError, r"expected \[N, 4\].*got \[2, 3\]"),
    "integers": ({"ilora_gate": torch.ones(2, 4, dtype=torch.long)}, TypeError, "expected a float tensor"),
    "blocks": ({"ilora_gate": torch.ones(3, 2, 4)}, ValueError, r"\[2, N, 4\].*got \[3, 2, 4\]"),
    "prompt mask": ({"ilora_gate": gates(2), "ilora_prompt_mask": torch.ones(2, 5)}, ValueError, "PromptGate"),
    "segments": (
        {"ilora_gate": gates(2), "ilora_segments": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        r"\[N\+1=3\].*got \[2\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_refused_gates(case, call):
    given, error, words = REFUSED[case]
    if call == "generate" and "ilora_segments" in given:
        pytest.skip("generate takes no segments: prompts are padded there")
    model, (ids, mask) = injected(), prompts((5, 5))
    run = model if call == "forward" else partial(model.generate, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(error, match=words):
        run(input_ids=ids, **given)
    assert model.ilora.state.current == ilora.current_gate.CurrentGate()


def test_networks_ask_for_what_they_need():
    ids, _ = prompts((5, 5))
    with pytest.raises(ValueError, match="needs ilora_z for its SequenceGate"):
        injected(gate=ilora.SequenceGate(Z, E))(input_ids=ids)
    model = injected(gate=ilora.PromptGate(E))
    with pytest.raises(ValueError, match="PromptGate takes none"):
        model(input_ids=ids, ilora_z=torch.randn(2, Z))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds tokens that PromptGate does not see"):
        model(input_ids=ids[:, -1:], past_key_values=cache)


def test_data_parallel_replicas_are_refused():
    model = injected()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(input_ids=prompts((5, 5))[0], ilora_gate=gates(2))


def test_two_threads_with_two_models_do_not_meet():
    models = [injected(seed=i) for i in range(2)]
    ids, _ = prompts((6, 6))
    wanted = [[m(input_ids=ids, ilora_gate=gates(2, seed=s)).logits for s in range(8)] for m in models]
    wrong, start = [], threading.Barrier(2)

    def work(k):
        start.wait()
        for _ in range(4):
            for s in range(8):
                if not torch.equal(models[k](input_ids=ids, ilora_gate=gates(2, seed=s)).logits, wanted[k][s]):
                    wrong.append((k, s))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("make", [llama, bert, gpt2, t5])
def test_copies_and_pickles(make):
    model, g = injected(make, gate=ilora.UniformGate(E)), gates(2)
    ids, _ = prompts((5, 5))
    more = {"decoder_input_ids": ids} if make is t5 else {}
    expected = model(input_ids=ids, ilora_gate=g, **more).logits
    with ilora.gated(model, g):  # a live gate does not travel
        clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for clone in clones:
        assert type(clone) is type(model)
        assert clone.ilora.state is not model.ilora.state
        assert torch.equal(clone(input_ids=ids, ilora_gate=g, **more).logits, expected)
        states = {id(layer.gate_state) for layer in ilora.ilora_layers(clone).values()}
        assert states == {id(clone.ilora.state)}
        ilora.eject(clone)


def test_prompt_gate_is_asked_once_in_a_generation_and_sees_no_padding():
    model = injected(gate=ilora.PromptGate(E))
    torch.nn.init.normal_(model.ilora_gate.weight)
    asked = []
    model.ilora_gate.register_forward_hook(lambda module, args, gate: asked.append(gate))
    ids, mask = prompts((7, 4))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2, "do_sample": False}
    batched = model.generate(ids, attention_mask=mask, **options)
    assert len(asked) == 1
    inferred = model.generate(ids, **options)  # transformers takes the pad token for padding, and so does the gate
    assert torch.equal(inferred, batched)
    torch.testing.assert_close(asked[0], asked[1])
    for i, length in enumerate((7, 4)):
        alone = model.generate(ids[i : i + 1, -length:], **options)
        assert torch.equal(batched[i, -6:], alone[0, -6:])
        torch.testing.assert_close(asked[0][i], asked[2 + i][0])


def test_a_loop_of_ones_own_with_gate_of():
    model = injected(gate=ilora.PromptGate(E))
    torch.nn.init.normal_(model.ilora_gate.weight)
    ids, mask = prompts((6, 6))
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    sequence, cache, step = ids, None, ids
    with torch.no_grad(), ilora.gated(model, ilora.gate_of(model, input_ids=ids, attention_mask=mask)):
        for _ in range(3):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            scores, cache = output.logits[:, -1].clone(), output.past_key_values
            scores[:, 2] = -torch.inf
            step = scores.argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, step], 1)
    assert torch.equal(sequence, expected)


def test_balance_loss_is_added_with_the_weight_of_the_batch():
    torch.manual_seed(0)
    network = ilora.SequenceGate(Z, E, balance=0.5)
    torch.nn.init.normal_(network.weight)
    model = injected(gate=network).train()
    ids, z = prompts((5, 5))[0], torch.randn(2, Z)
    given = {"input_ids": ids, "labels": ids, "ilora_z": z}
    with_it = model(**given).loss
    term = 0.5 * ilora.balance_loss(network(z))
    half = model(**given, num_items_in_batch=20).loss
    network.balance = 0.0
    torch.testing.assert_close(with_it, model(**given).loss + term)
    torch.testing.assert_close(half, model(**given, num_items_in_batch=20).loss + term / 2)
    assert term > 0


def test_statistics_after_a_forward():
    model, g = injected(), gates(3)
    model(input_ids=prompts((5, 5, 5))[0], ilora_gate=g.requires_grad_())
    assert torch.equal(model.ilora.state.last, g)
    assert not model.ilora.state.last.requires_grad
    stats = ilora.gate_stats(model.ilora.state.last)
    torch.testing.assert_close(torch.as_tensor(stats.usage), g.detach().mean(0))
    assert VOCABULARY > stats.instances == 3
