"""Tiny recommenders whose adapters and gates do something though nothing was trained, and what they are asked."""

import torch
from sequential_recommendation import sequence_models
from sequential_recommendation.data import Dataset, Example
from sequential_recommendation.prompts import Prompts
from sequential_recommendation.recommender import Recommender, RecommenderConfig
from sequential_recommendation.scoring import STANDARD
from sequential_recommendation.tiny_model import tiny_lm, tiny_tokenizer

# Titles of several lengths; one contains another, and the tokenizer writes spaces around a slash.
TITLES = ["Heat", "Toy Story", "Toy Story 2", "The Rock", "Fargo", "Big", "The Thin Red Line", "Alien", "Jaws", "AC/DC"]
DATASET = Dataset("films", TITLES, {f"u{n}": [(n + k) % 10 for k in range(4)] for n in range(10)})
PROMPTS = Prompts(tiny_tokenizer(DATASET, "movies"), DATASET, "movies")
EXAMPLES = [Example("a", (0, 1, 2), 3, (4, 3, 5)), Example("b", (3, 4, 5, 6, 7), 0, (0, 1, 2))]
EXAMPLES += [Example("c", (6, 1, 2, 3), 7, (5, 4, 7))]


def prompts_of(dataset, kind="neutral"):
    return Prompts(tiny_tokenizer(dataset, kind), dataset, kind)


def collated(examples=EXAMPLES, choice=STANDARD, prompts=PROMPTS, **options):
    return prompts.collate(examples, [choice] * len(examples), **options)


def recommender(gate="sequence", prompts=PROMPTS, seed=0, lm=None, sequence_model=None, std=(0.1, 1.0), **settings):
    """In eval mode. std: of the adapters' B and of the gate network."""
    torch.manual_seed(seed)
    settings = {"num_experts": 1 if gate == "uniform" else 4, **settings}
    if sequence_model is None:
        sizes = {"dim": 8, "blocks": 1, "dropout": 0.5}
        sequence_model = sequence_models.build("sasrec", prompts.dataset.num_items, seed, **sizes)
    lm = tiny_lm(prompts.tokenizer, 32, 2, 2) if lm is None else lm
    model = Recommender(lm, sequence_model, RecommenderConfig(gate=gate, **settings))
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std[0])
            if "ilora_gate" in name:
                parameter.normal_(std=std[1])
    return model.eval()


def differing(model, other):
    """The names of the tensors of which two models hold different values; their names have to be the same."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]
