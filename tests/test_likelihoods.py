"""Likelihoods of candidates in language models of all kinds: those of plain forwards of one unpadded row each."""

import sys

import pytest
import torch
import transformers as T
from sequential_recommendation import sequence_models
from sequential_recommendation.data import Dataset, Example
from sequential_recommendation.likelihoods import candidate_likelihoods
from sequential_recommendation.prompts import Choice, Prompts
from sequential_recommendation.recommender import Recommender
from sequential_recommendation.scoring import STANDARD
from sequential_recommendation.settings import RecommenderConfig
from sequential_recommendation.tiny_model import tiny_tokenizer

import ilora

WORDS = ["Heat", "Toy Story", "The Rock", "Fargo", "Big", "The Thin Red Line", "Alien", "Jaws", "Contact", "Twister"]
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MODELS = {  # (class, settings, the longest row that candidates may share, by the settings)
    "llama": ("Llama", {**COMMON, "num_key_value_heads": 2}, sys.maxsize),
    "gptneox": ("GPTNeoX", COMMON, sys.maxsize),
    "mixtral": ("Mixtral", {**COMMON, "num_key_value_heads": 2, "num_local_experts": 4}, sys.maxsize),
    "qwen2-moe, no window": (
        "Qwen2Moe",
        {**COMMON, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16, "sliding_window": 32, "use_sliding_window": False},
        sys.maxsize,
    ),
    "gemma2, the other window": ("Gemma2", {**COMMON, **HEADS, "sliding_window": 16}, 16),
    "bert, the head adapted": ("Bert", {**COMMON, "is_decoder": True}, sys.maxsize),
    "gemma3": ("Gemma3", {**COMMON, **HEADS, "sliding_window": 512}, 512),
    "gemma3, a short window": ("Gemma3", {**COMMON, **HEADS, "sliding_window": 16}, 16),
    "gemma3, a window as long as the short row": ("Gemma3", {**COMMON, **HEADS, "sliding_window": 50}, 50),
    "mistral, a short window": ("Mistral", {**COMMON, **HEADS, "sliding_window": 16}, 16),
    "gptneo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16, "attention_types": [[["local"], 2]]},
        16,
    ),
    "lfm2": ("Lfm2", {**COMMON, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, 0),
    "mamba2": (
        "Mamba2",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
        0,
    ),
    "qwen3-next": (
        "Qwen3Next",
        {**COMMON, **HEADS, **LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
        0,
    ),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, 0),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, 0),
    "falcon": ("Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}, 0),
}  # fmt: skip


RAISING = {"bert, the head adapted"}  # cuts the row before its head, one of whose layers is adapted
REFUSING = {"mamba2", "mpt", "bloom", "falcon"}  # no positions, or masks of two dimensions only


@pytest.fixture(scope="module")
def prompts():
    films = Dataset("films", WORDS, {f"u{n}": [(n + k) % 10 for k in range(4)] for n in range(10)})
    return Prompts(tiny_tokenizer(films, "movies"), films, "movies")


EXAMPLES = [
    Example("a", (0, 1, 2), 3, (4, 3, 5, 9, 8)),
    Example("b", (3, 4, 5, 6, 7, 8), 0, (0, 1, 2, 5, 9)),
    Example("c", (6, 1, 2, 3), 7, (5, 4, 7, 0, 8)),
]


def recommender(prompts, name, dtype=torch.float32):
    """A recommender on a random model of that family, whose adapters do something."""
    torch.manual_seed(0)
    kind, settings, _ = MODELS[name]
    lm_class = getattr(T, f"{kind}LMHeadModel" if kind == "Bert" else f"{kind}ForCausalLM")
    config = lm_class.config_class(
        vocab_size=len(prompts.tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=2, **settings
    )
    lm = lm_class(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in lm.parameters():  # as given, tiny models say the same whatever they read
            if parameter.ndim > 1:
                parameter.mul_(4)
    sequence_model = sequence_models.build("sasrec", prompts.dataset.num_items, dim=8, blocks=1)
    model = Recommender(lm, sequence_model, RecommenderConfig(gate="sequence", num_experts=4))
    with torch.no_grad():
        for part, parameter in model.lm.named_parameters():
            if "lora_B" in part or "ilora_gate" in part:
                parameter.normal_(std=0.1)
    return model.eval()


@torch.no_grad()
def plainly(model, prompts, example, gate):
    """One forward of [prompt, title, newline] for each candidate, with nothing of `Recommender.logits` in it."""
    found = []
    for item in example.candidates:
        ids, items = prompts.prompt(example, STANDARD)
        answer = prompts.answer(item)
        embeddings = model.embed(
            {"input_ids": torch.tensor([ids + answer]), "item_ids": torch.tensor([items + [-1] * len(answer)])}
        )
        with ilora.gated(model.lm, gate):
            logits = model.lm(inputs_embeds=embeddings, use_cache=False).logits[0]
        predicted = logits[len(ids) - 1 : -1].float().log_softmax(-1)
        found.append(predicted[torch.arange(len(answer)), torch.tensor(answer)].sum())
    return torch.stack(found)


def agrees(model, prompts, examples):
    gate = torch.rand(len(examples), 4).softmax(-1)
    found = candidate_likelihoods(model, prompts, examples, STANDARD, gate)
    expected = torch.stack([plainly(model, prompts, e, gate[i : i + 1]) for i, e in enumerate(examples)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_candidates_are_as_likely_as_by_themselves(prompts, name):
    model = recommender(prompts, name)
    assert model.reach == MODELS[name][2]
    agrees(model, prompts, EXAMPLES)
    assert (model.tried > 0) == (MODELS[name][2] > 100 and name not in RAISING)


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row[2] < 100 and name not in REFUSING])
def test_what_settings_do_not_tell_shows_at_the_first_row(prompts, name):
    model = recommender(prompts, name)
    model.reach = sys.maxsize
    agrees(model, prompts, EXAMPLES)
    assert (model.reach, model.tried) == (0, 0)


def test_a_longer_row_is_tried_again(prompts):
    model = recommender(prompts, "gemma3, a window as long as the short row")
    short, long = Example("a", (0, 4, 6), 4, (4, 6)), EXAMPLES[1]
    model.reach = sys.maxsize
    agrees(model, prompts, [short])
    assert model.tried > 0
    agrees(model, prompts, [long])
    assert model.reach == 0
    agrees(model, prompts, [short])


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_rounding_in_bfloat16_is_not_taken_for_a_difference(prompts, name):
    model = recommender(prompts, name, torch.bfloat16)
    candidate_likelihoods(model, prompts, EXAMPLES, Choice(1, 0))
    assert model.tried > 0


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row[2] < 100])
def test_settings_decide_in_bfloat16_too(prompts, name):
    model = recommender(prompts, name, torch.bfloat16)
    candidate_likelihoods(model, prompts, EXAMPLES, Choice(1, False))
    assert (model.reach, model.tried) == (MODELS[name][2], 0)


def test_gates_of_blocks_reach_rows_of_their_own(prompts):
    model = recommender(prompts, "llama")
    gate = torch.rand(2, 3, 4).mul(5).softmax(-1)
    together = candidate_likelihoods(model, prompts, EXAMPLES, STANDARD, gate)
    assert model.tried > 0
    model.reach = 0
    torch.testing.assert_close(candidate_likelihoods(model, prompts, EXAMPLES, STANDARD, gate), together)


@pytest.mark.parametrize("name", ["lfm2", "gptneo", "qwen3-next"])
def test_a_difference_shows_in_bfloat16(prompts, name):
    model = recommender(prompts, name, torch.bfloat16)
    model.reach = sys.maxsize
    candidate_likelihoods(model, prompts, EXAMPLES, Choice(1, 0))
    assert model.reach == 0
