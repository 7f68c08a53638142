"""The defects of the published code that other tests do not name, by their number; each fails if its defect comes back.

Of the rest, 2 to 8, 10, 11 and 14 are in test_recommender.py by name; 9, 16 and 17 for every architecture in
test_models.py, test_delivery.py and test_quantised.py.
"""

import pytest
import torch
from recommenders import EXAMPLES, PROMPTS, collated, recommender
from sequential_recommendation import sequence_models
from sequential_recommendation.experiments import Experiment
from sequential_recommendation.metrics import match_title
from sequential_recommendation.recommender import GATES, Recommender, RecommenderConfig
from sequential_recommendation.scoring import STANDARD, gates, generate, score
from sequential_recommendation.tiny_model import tiny_lm

import ilora


def windows_folder(folder):
    """A data set as LastFM's is laid out."""
    names = "\n".join(f"{item}\tartist {item}" for item in range(60))
    (folder / "items.tsv").write_text(names + "\n")
    for step, name in enumerate(("train", "val", "test"), 1):  # no window is in two files
        lines = "".join(f"{u},{u + 1},{u + 2}\t{u + 2 + step}\n" for u in range(50))
        (folder / f"{name}.tsv").write_text(lines)
    return folder


def test_defect_1_candidates_of_lastfm_hold_the_target_and_nineteen_others(tmp_path):
    experiment = Experiment(tmp_path, data="lastfm", root=windows_folder(tmp_path), protocol="paper")
    dataset = experiment.dataset()
    assert dataset.name == "LastFM"
    for part in experiment.parts(dataset)[1:]:
        assert len(part) == 50
        for example in part:
            assert example.candidates.count(example.target) == 1
            assert len({dataset.titles[item] for item in example.candidates}) == 20
            assert not {*example.candidates} & {*example.history}


def test_defect_9_merging_follows_the_gate():
    model = recommender()
    batch = collated(answers=False)
    inputs = {"inputs_embeds": model.embed(batch)[:1]}
    inputs["attention_mask"] = batch["attention_mask"][:1]
    gate = model.gate(batch)[:1].detach()
    with torch.no_grad():
        gated = model.lm(**inputs, ilora_gate=gate).logits
        uniform = model.lm(**inputs, ilora_gate=torch.full_like(gate, 0.25)).logits
        merged = ilora.merge(model.lm, gate)(**inputs).logits
    torch.testing.assert_close(merged, gated, rtol=1e-4, atol=1e-4)
    assert (merged - uniform).abs().max() > 1e-2


@pytest.mark.parametrize("gate", GATES)
def test_defect_12_all_that_is_trained_takes_part(gate):
    model = recommender(gate).train()
    model(**collated()).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    idle = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert len(trained) > 28
    assert idle == []


def test_defect_13_the_defaults_run():
    model = Recommender(tiny_lm(PROMPTS.tokenizer, 32, 2, 2), sequence_models.build("sasrec", 10)).train()
    assert model(**collated()).loss.isfinite()
    assert score(model, PROMPTS, EXAMPLES)[0].isfinite().all()


def test_defect_15_nothing_kept_grows_with_the_experts():
    kept = {}
    batch = collated()
    for E in (1, 8):
        lm = tiny_lm(PROMPTS.tokenizer, 32, 2, 2)
        model = Recommender(lm, sequence_models.build("sasrec", 10), RecommenderConfig(num_experts=E)).train()
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch)
        kept[E] = sum(sizes)
    assert kept[8] - kept[1] < 0.02 * kept[1]  # gates and their network


def test_defect_16_beams_and_interleaved_models_each_have_their_own_gate():
    one, two = recommender(), recommender(seed=1, lm=tiny_lm(PROMPTS.tokenizer, 32, 2, 2, seed=4))
    together = {model: generate(model, PROMPTS, EXAMPLES, STANDARD, num_beams=3) for model in (one, two, one)}
    for model in (one, two):
        alone = [generate(model, PROMPTS, [example], STANDARD, num_beams=3)[0] for example in EXAMPLES]
        assert together[model] == alone
    assert not torch.equal(gates(one, PROMPTS, EXAMPLES, STANDARD), gates(two, PROMPTS, EXAMPLES, STANDARD))


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser"])
def test_defect_18_every_sequence_model_can_guide(kind):
    model = Recommender(tiny_lm(PROMPTS.tokenizer, 32, 2, 2), sequence_models.build(kind, 10)).train()
    model(**collated()).loss.backward()
    moved = gates(model, PROMPTS, EXAMPLES, STANDARD)
    assert not torch.equal(moved[0], moved[1])


def test_defect_21_nothing_saved_is_a_pickle(tmp_path):
    folder = recommender().save(tmp_path / "saved")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    for path in files:
        assert not path.read_bytes().startswith((b"PK", b"\x80"))  # torch's archives and bare pickles


def test_defect_23_a_title_within_another_is_no_answer():
    titles = ["Toy Story", "Toy Story 2", "Alien"]
    assert match_title("Toy Story 2\n", titles) == 1
    assert match_title("I would say Toy Story", titles) is None
