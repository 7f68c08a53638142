"""Likelihoods of candidates in language models of all kinds: those of plain forwards of one unpadded row each."""

import sys

import pytest
import torch
import transformers as hf
from models import GROUPED, HEADS, SMALL
from recommenders import PROMPTS, recommender
from sequential_recommendation.data import Example
from sequential_recommendation.likelihoods import candidate_likelihoods
from sequential_recommendation.prompts import Choice
from sequential_recommendation.scoring import STANDARD

import ilora

ANY = sys.maxsize
EXPERTS = {f"{kind}_intermediate_size": 16 for kind in ("moe", "shared_expert")}
EXPERTS |= {"num_experts": 4, "num_experts_per_tok": 2}
UNUSED = {"sliding_window": 32, "use_sliding_window": False}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
LOCAL = {"num_layers": 2, "num_heads": 4, "window_size": 16, "attention_types": [[["local"], 2]]}
ALIBI = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
MODELS = {  # (class, settings, the longest row that candidates may share, by the settings)
    "llama": ("Llama", GROUPED, ANY),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}, ANY),
    "qwen3": ("Qwen3", HEADS, ANY),
    "gptneox": ("GPTNeoX", SMALL, ANY),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4}, ANY),
    "qwen2-moe, no window": ("Qwen2Moe", {**GROUPED, **EXPERTS, **UNUSED}, ANY),
    "gemma2, the other window": ("Gemma2", {**HEADS, "sliding_window": 16}, 16),
    "bert, the head adapted": ("Bert", {**SMALL, "is_decoder": True}, ANY),
    "gemma3": ("Gemma3", {**HEADS, "sliding_window": 512}, 512),
    "gemma3, a short window": ("Gemma3", {**HEADS, "sliding_window": 16}, 16),
    "gemma3, a window as long as the short row": ("Gemma3", {**HEADS, "sliding_window": 50}, 50),
    "mistral, a short window": ("Mistral", {**HEADS, "sliding_window": 16}, 16),
    "gptneo": ("GPTNeo", {"hidden_size": 32, **LOCAL}, 16),
    "lfm2": ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, 0),
    "mamba2": ("Mamba2", STATES, 0),
    "qwen3-next": ("Qwen3Next", {**HEADS, **LINEAR, **EXPERTS, **MIXED}, 0),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, 0),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, 0),
    "falcon": ("Falcon", ALIBI, 0),
}
RAISING = {"bert, the head adapted"}  # cuts the row before its head, one of whose layers is adapted
REFUSING = {"mamba2", "mpt", "bloom", "falcon"}  # no positions, or masks of two dimensions only
BOUNDED = [name for name, (*_, reach) in MODELS.items() if reach < 100]
IN_BFLOAT16 = [(name, None, (MODELS[name][2], True)) for name in ("llama", "gemma3", "mixtral")]
IN_BFLOAT16 += [(name, None, (MODELS[name][2], False)) for name in BOUNDED]  # the settings decide
IN_BFLOAT16 += [(name, ANY, (0, False)) for name in ("lfm2", "gptneo", "qwen3-next")]
EXAMPLES = [
    Example("a", (0, 1, 2), 3, (4, 3, 5, 9, 8)),
    Example("b", (3, 4, 5, 6, 7, 8), 0, (0, 1, 2, 5, 9)),
    Example("c", (6, 1, 2, 3), 7, (5, 4, 7, 0, 8)),
]


def family(name, dtype=torch.float32, reach=None):
    """A recommender on a random model of that family. reach: instead of what it takes from the settings."""
    torch.manual_seed(0)
    kind, settings, _ = MODELS[name]
    lm_class = getattr(hf, f"{kind}LMHeadModel" if kind in ("Bert", "GPT2") else f"{kind}ForCausalLM")
    tokens = {"vocab_size": len(PROMPTS.tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    lm = lm_class(lm_class.config_class(**tokens, **settings)).to(dtype).eval()
    with torch.no_grad():
        for parameter in lm.parameters():  # as given, tiny models say the same whatever they read
            if parameter.ndim > 1:
                parameter.mul_(4)
    model = recommender(lm=lm, std=(0.1, 0.1))
    model.reach = model.reach if reach is None else reach
    return model


@torch.no_grad()
def plainly(model, example, gate):
    """One forward of [prompt, title, newline] for each candidate, with nothing of `Recommender.logits` in it."""
    found = []
    for item in example.candidates:
        ids, items = PROMPTS.prompt(example, STANDARD)
        answer = PROMPTS.answer(item)
        batch = {"input_ids": torch.tensor([ids + answer]), "item_ids": torch.tensor([items + [-1] * len(answer)])}
        embeddings = model.embed(batch)
        with ilora.gated(model.lm, gate):
            logits = model.lm(inputs_embeds=embeddings, use_cache=False).logits[0]
        predicted = logits[len(ids) - 1 : -1].float().log_softmax(-1)
        found.append(predicted[torch.arange(len(answer)), torch.tensor(answer)].sum())
    return torch.stack(found)


def agrees(model, examples=EXAMPLES):
    gate = torch.rand(len(examples), 4).softmax(-1)
    found = candidate_likelihoods(model, PROMPTS, examples, STANDARD, gate)
    expected = torch.stack([plainly(model, e, gate[i : i + 1]) for i, e in enumerate(examples)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_candidates_are_as_likely_as_by_themselves(name):
    model, reach = family(name), MODELS[name][2]
    assert model.reach == reach
    agrees(model)
    assert (model.tried > 0) == (reach > 100 and name not in RAISING)


@pytest.mark.parametrize("name", [name for name in BOUNDED if name not in REFUSING])
def test_what_settings_do_not_tell_shows_at_the_first_row(name):
    model = family(name, reach=ANY)
    agrees(model)
    assert (model.reach, model.tried) == (0, 0)


def test_a_longer_row_is_tried_again():
    model = family("gemma3, a window as long as the short row", reach=ANY)
    short = Example("a", (0, 4, 5), 4, (4, 5))
    agrees(model, [short])
    assert model.tried > 0
    agrees(model, EXAMPLES[1:2])
    assert model.reach == 0
    agrees(model, [short])


@pytest.mark.parametrize(("name", "reach", "expected"), IN_BFLOAT16)
def test_rounding_in_bfloat16_is_not_taken_for_a_difference_nor_a_difference_for_rounding(name, reach, expected):
    model = family(name, torch.bfloat16, reach)
    candidate_likelihoods(model, PROMPTS, EXAMPLES, Choice(1, False))
    assert (model.reach, model.tried > 0) == expected


def test_gates_of_blocks_reach_rows_of_their_own():
    model = family("llama")
    gate = torch.rand(2, 3, 4).mul(5).softmax(-1)
    together = candidate_likelihoods(model, PROMPTS, EXAMPLES, STANDARD, gate)
    assert model.tried > 0
    model.reach = 0
    torch.testing.assert_close(candidate_likelihoods(model, PROMPTS, EXAMPLES, STANDARD, gate), together)
