"""Training a recommender: a lost loss, adapters beside a bfloat16 model, titles as a tokenizer writes them."""

import math
from copy import deepcopy

import pytest
import torch
from sequential_recommendation import sequence_models
from sequential_recommendation.data import Dataset, Example, split
from sequential_recommendation.metrics import text_ratios
from sequential_recommendation.prompts import Prompts
from sequential_recommendation.recommender import Recommender, load
from sequential_recommendation.settings import RecommenderConfig, TrainingSettings
from sequential_recommendation.tiny_model import tiny_lm, tiny_tokenizer
from sequential_recommendation.training import train
from tokenizers.pre_tokenizers import Whitespace

import ilora

TITLES = ["AC/DC", "Toy Story (1995)", *(f"Film {n}" for n in range(38))]


@pytest.fixture
def parts():
    dataset = Dataset("films", TITLES, {f"u{n}": [(n + step) % 40 for step in range(6)] for n in range(10)})
    prompts = Prompts(tiny_tokenizer(dataset, "movies"), dataset, "movies")
    torch.manual_seed(0)
    lm = tiny_lm(prompts.tokenizer, 32, 1, 2)
    return lm, sequence_models.build("sasrec", 40, dim=8, blocks=1), prompts, split(dataset, 0).train


def settings(**options):
    return TrainingSettings(batch_size=2, effective_batch=2, progress=False, logging_steps=1, **options)


def test_a_loss_that_is_lost_ends_the_training(parts, tmp_path):
    lm, sequence_model, prompts, windows = parts
    model = Recommender(lm, sequence_model, RecommenderConfig())
    with pytest.raises(FloatingPointError, match="training loss is nan"):
        train(model, prompts, windows, settings(lr=math.nan, steps=50), tmp_path)


def test_adapters_of_a_bfloat16_model_learn_at_small_rates(parts, tmp_path):
    lm, sequence_model, prompts, windows = parts
    model = Recommender(lm.to(torch.bfloat16), sequence_model, RecommenderConfig())
    assert model.lm.get_input_embeddings().weight.dtype == torch.bfloat16
    adapters = {name: p for name, p in model.lm.named_parameters() if "lora_A" in name}
    before = {name: p.detach().clone() for name, p in adapters.items()}
    train(model, prompts, windows, settings(lr=5e-6, steps=4), tmp_path)
    changed = torch.cat([(p != before[name]).flatten() for name, p in adapters.items()])
    assert changed.float().mean() > 0.9


def test_an_answer_is_valid_as_the_tokenizer_writes_it(parts):
    *_, prompts, windows = parts
    written = prompts.written()
    assert written[0] != TITLES[0]  # this one puts spaces around a slash
    texts = [prompts.tokenizer.decode(prompts.answer(item)) for item in range(8)]
    examples = [Example("a", (1, 2), item, tuple(range(8))) for item in range(8)]
    assert [ratio.hits for ratio in text_ratios(texts, examples, written)] == [8, 8]


def test_a_tokenizer_without_a_newline_is_refused(parts):
    *_, prompts, _ = parts
    tokenizer = tiny_tokenizer(prompts.dataset, "movies")
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    with pytest.raises(ValueError, match="makes nothing of a newline"):
        Prompts(tokenizer, prompts.dataset, "movies")


def test_restoring_brings_the_item_embeddings_too(parts, tmp_path):
    lm, sequence_model, *_ = parts
    plain = deepcopy(lm)
    kept = Recommender(lm, sequence_model, RecommenderConfig()).save(tmp_path / "kept")
    other = Recommender(plain, sequence_models.build("sasrec", 40, seed=7, dim=8, blocks=1), RecommenderConfig())
    before = other.items.clone()
    other.restore(kept)
    assert not torch.equal(other.items, before)
    assert torch.equal(other.items, load(kept, ilora.eject(lm)).items)
