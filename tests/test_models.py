"""Batched equals one at a time: every instance gets its own gate through real models, forward and generate."""

import pytest
import torch
from models import DECODERS, ENCODER_DECODERS, MODELS, E, bart, gates, gpt2, injected, llama, prompts

import ilora

LENGTHS = (7, 4, 9)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


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
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **SETTINGS[settings]}
    options |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    batched = model.generate(ids, attention_mask=mask, ilora_gate=g, **options)
    count, width = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    per = max(count, width)
    for i in range(3):
        own_ids, own_mask = one(ids, mask, i, left)
        alone = model.generate(own_ids, attention_mask=own_mask, ilora_gate=g[i : i + 1], **options)
        same = batched.sequences[i * count : (i + 1) * count, -6:]
        assert torch.equal(same, alone.sequences[:, -6:])
        for step, own_step in zip(batched.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[i * per : (i + 1) * per], own_step, **EXACT)
        if width > 1:
            torch.testing.assert_close(
                batched.sequences_scores[i * count : (i + 1) * count], alone.sequences_scores, **EXACT
            )


def test_beams_from_the_generation_config():
    model, g = injected(), gates(3)
    ids, mask = prompts(LENGTHS)
    options = {"attention_mask": mask, "ilora_gate": g, "max_new_tokens": 5}
    expected = model.generate(ids, num_beams=3, do_sample=False, **options)
    model.generation_config.num_beams = 3
    assert torch.equal(model.generate(ids, do_sample=False, **options), expected)


@pytest.mark.parametrize("make", [llama, gpt2, bart])  # transformers' own guidance does not work with T5
def test_guidance_uses_the_gate_in_its_second_forward(make):
    model, g = injected(make), gates(2)
    ids, mask = prompts((5, 5))
    options = {"guidance_scale": 1.5, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    batched = model.generate(ids, attention_mask=mask, ilora_gate=g, **options)
    for i in range(2):
        alone = model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], ilora_gate=g[i : i + 1], **options)
        assert torch.equal(batched[i : i + 1], alone)


def test_gated_gives_the_same_as_the_argument():
    model, g = injected(), gates(3)
    ids, mask = prompts(LENGTHS)
    with ilora.gated(model, g):
        logits = model(input_ids=ids, attention_mask=mask).logits
        sequences = model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=4, do_sample=False)
    assert torch.equal(logits, model(input_ids=ids, attention_mask=mask, ilora_gate=g).logits)
    again = model.generate(ids, attention_mask=mask, ilora_gate=g, num_beams=2, max_new_tokens=4, do_sample=False)
    assert torch.equal(sequences, again)


def test_decoding_by_hand_with_a_cache():
    model, g = injected(), gates(2)
    ids, _ = prompts((6, 6))
    whole = model(input_ids=ids, ilora_gate=g).logits
    first = model(input_ids=ids[:, :5], ilora_gate=g, use_cache=True)
    last = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, ilora_gate=g).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1], **EXACT)


def test_one_gate_serves_the_whole_batch():
    model, g = injected(), gates(1)
    ids, _ = prompts((6, 6, 6))
    expected = model(input_ids=ids, ilora_gate=g.expand(3, -1)).logits
    torch.testing.assert_close(model(input_ids=ids, ilora_gate=g).logits, expected, **EXACT)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_gate_for_each_block(name):
    model = injected(MODELS[name])
    blocks = len(model.ilora.adapter.blocks)
    assert blocks == {"llama": 2, "bart": 4}[name]
    ids, _ = prompts((6, 6))
    same = gates(2).expand(blocks, -1, -1)
    expected = model(input_ids=ids, ilora_gate=gates(2)).logits
    assert torch.equal(model(input_ids=ids, ilora_gate=same).logits, expected)
    different = torch.stack([gates(2, seed=s) for s in range(blocks)])
    swapped = different.flip(0)
    first, second = (model(input_ids=ids, ilora_gate=g).logits for g in (different, swapped))
    assert (first - second).abs().max() > 1e-3
    with ilora.gated(model, different):
        sequences = model.generate(ids, num_beams=2, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        sequences, model.generate(ids, ilora_gate=different, num_beams=2, max_new_tokens=4, do_sample=False)
    )


def test_multiple_choice_rows_belong_to_their_instance():
    import transformers as hf

    def make():
        config = hf.BertConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
        return hf.BertForMultipleChoice(config)

    model, g = injected(make), gates(2)
    ids = torch.randint(3, 61, (2, 3, 5))
    logits = model(input_ids=ids, ilora_gate=g).logits
    for i in range(2):
        alone = model(input_ids=ids[i : i + 1], ilora_gate=g[i : i + 1]).logits
        torch.testing.assert_close(logits[i : i + 1], alone, **EXACT)


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 2}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_other_ways_to_decode_give_the_same(options):
    model = injected(gate=ilora.PromptGate(E))
    torch.nn.init.normal_(model.ilora_gate.weight)
    ids, mask = prompts((7, 4))
    common = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **common)
    assert torch.equal(model.generate(ids, **common, **options), expected)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **common), expected[:, ids.shape[1] :])


def test_an_assistant_does_not_change_the_answer():
    model, assistant = injected(), llama().eval()
    ids, _ = prompts((6,))
    common = {"ilora_gate": gates(1), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=assistant, **common), model.generate(ids, **common))
