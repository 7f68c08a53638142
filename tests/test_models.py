"""Batched equals one at a time: every instance gets its own gate through real models, forward and generate."""

import pytest
import torch
from models import DECODERS, ENCODER_DECODERS, MODELS, E, bart, gates, gpt2, injected, llama, prompts

import ilora

LENGTHS = (7, 4, 9)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def tokens(n):
    """Options of generate for exactly n new tokens."""
    return {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}


def one(ids, mask, i, left):
    """Instance i without its padding."""
    length = int(mask[i].sum())
    where = slice(ids.shape[1] - length, None) if left else slice(0, length)
    return ids[i : i + 1, where], mask[i : i + 1, where]


@pytest.mark.parametrize("name", MODELS)
def test_forward_batched_equals_one_at_a_time(name):
    model, g = injected(MODELS[name]), gates(3)
    left = name in DECODERS
    ids, mask = prompts(LENGTHS, left=left)
    more = {"decoder_input_ids": prompts((5, 5, 5), seed=1)[0]} if name in ENCODER_DECODERS else {}
    if left and name != "opt":  # OPT derives its own from the mask
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, ilora_gate=g, **more).logits
    for i in range(3):
        own_ids, own_mask = one(ids, mask, i, left)
        own = {k: one(v, mask, i, left)[0] if k == "position_ids" else v[i : i + 1] for k, v in more.items()}
        alone = model(input_ids=own_ids, attention_mask=own_mask, ilora_gate=g[i : i + 1], **own).logits[0]
        batched = logits[i] if name in ("bert", *ENCODER_DECODERS) else logits[i, -own_ids.shape[1] :]
        torch.testing.assert_close(batched, alone, **EXACT)
        other = model(input_ids=own_ids, attention_mask=own_mask, ilora_gate=g[[(i + 1) % 3]], **own).logits[0]
        assert (other - alone).abs().max() > 1e-4, "the gate decides nothing: the test would not see a wrong one"


SETTINGS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two-of-three-beams": {"num_beams": 3, "num_return_sequences": 2},
    "two-samples": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generate_batched_equals_one_at_a_time(name, settings):
    model, g = injected(MODELS[name]), gates(3)
    left = name in DECODERS
    ids, mask = prompts(LENGTHS, left=left)
    options = {**tokens(6), "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    options |= SETTINGS[settings]
    batched = model.generate(ids, attention_mask=mask, ilora_gate=g, **options)
    count, width = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    per = max(count, width)
    for i in range(3):
        own_ids, own_mask = one(ids, mask, i, left)
        alone = model.generate(own_ids, attention_mask=own_mask, ilora_gate=g[i : i + 1], **options)
        mine = slice(i * count, (i + 1) * count)
        assert torch.equal(batched.sequences[mine, -6:], alone.sequences[:, -6:])
        for step, own_step in zip(batched.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[i * per : (i + 1) * per], own_step, **EXACT)
        if width > 1:
            torch.testing.assert_close(batched.sequences_scores[mine], alone.sequences_scores, **EXACT)


def test_beams_from_the_generation_config():
    model, (ids, mask) = injected(), prompts(LENGTHS)
    options = {"attention_mask": mask, "ilora_gate": gates(3), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, num_beams=3, **options)
    model.generation_config.num_beams = 3
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("make", [llama, gpt2, bart])  # transformers' own guidance does not work with T5
def test_guidance_uses_the_gate_in_its_second_forward(make):
    model, g, (ids, mask) = injected(make), gates(2), prompts((5, 5))
    options = {"guidance_scale": 1.5, **tokens(4)}
    batched = model.generate(ids, attention_mask=mask, ilora_gate=g, **options)
    for i in range(2):
        alone = model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], ilora_gate=g[i : i + 1], **options)
        assert torch.equal(batched[i : i + 1], alone)


def test_gated_gives_the_same_as_the_argument():
    model, g, (ids, mask) = injected(), gates(3), prompts(LENGTHS)
    options = {"attention_mask": mask, "num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    with ilora.gated(model, g):
        logits, sequences = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids, **options)
    assert torch.equal(logits, model(input_ids=ids, attention_mask=mask, ilora_gate=g).logits)
    assert torch.equal(sequences, model.generate(ids, ilora_gate=g, **options))


def test_decoding_by_hand_with_a_cache():
    model, g, (ids, _) = injected(), gates(2), prompts((6, 6))
    whole = model(input_ids=ids, ilora_gate=g).logits
    first = model(input_ids=ids[:, :5], ilora_gate=g, use_cache=True)
    last = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, ilora_gate=g).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1], **EXACT)


def test_one_gate_serves_the_whole_batch():
    model, g, (ids, _) = injected(), gates(1), prompts((6, 6, 6))
    expected = model(input_ids=ids, ilora_gate=g.expand(3, -1)).logits
    torch.testing.assert_close(model(input_ids=ids, ilora_gate=g).logits, expected, **EXACT)


@pytest.mark.parametrize(("name", "blocks"), [("llama", 2), ("bart", 4)])
def test_a_gate_for_each_block(name, blocks):
    model, (ids, _) = injected(MODELS[name]), prompts((6, 6))
    assert len(model.ilora.adapter.blocks) == blocks
    same = gates(2).expand(blocks, -1, -1)
    assert torch.equal(model(input_ids=ids, ilora_gate=same).logits, model(input_ids=ids, ilora_gate=gates(2)).logits)
    different = torch.stack([gates(2, seed=s) for s in range(blocks)])
    first, second = (model(input_ids=ids, ilora_gate=g).logits for g in (different, different.flip(0)))
    assert (first - second).abs().max() > 1e-3
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    with ilora.gated(model, different):
        sequences = model.generate(ids, **options)
    assert torch.equal(sequences, model.generate(ids, ilora_gate=different, **options))


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 2}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_other_ways_to_decode_give_the_same(options):
    model, (ids, mask) = injected(gate=ilora.PromptGate(E)), prompts((7, 4))
    torch.nn.init.normal_(model.ilora_gate.weight)
    common = {"attention_mask": mask, **tokens(4)}
    expected = model.generate(ids, **common)
    assert torch.equal(model.generate(ids, **common, **options), expected)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **common), expected[:, ids.shape[1] :])


def test_an_assistant_does_not_change_the_answer():
    model, assistant, (ids, _) = injected(), llama().eval(), prompts((6,))
    common = {"ilora_gate": gates(1), **tokens(5)}
    assert torch.equal(model.generate(ids, assistant_model=assistant, **common), model.generate(ids, **common))
