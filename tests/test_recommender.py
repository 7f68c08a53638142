"""The recommender: prompts, scores, gates, files. A "defect" is one of the published code's, by its number."""

import json

import pytest
import torch
from recommenders import DATASET, EXAMPLES, PROMPTS, TITLES, collated, differing, prompts_of, recommender
from sequential_recommendation import sequence_models
from sequential_recommendation.data import Example
from sequential_recommendation.metrics import ranks, text_ratios
from sequential_recommendation.prompts import NO_LABEL, TEMPLATES, Choice, Prompts, user_number
from sequential_recommendation.recommender import GATES, load
from sequential_recommendation.scoring import STANDARD, candidate_likelihoods, gates, generate, score, write
from sequential_recommendation.sequence_models import pad_histories
from sequential_recommendation.tastes import tastes
from sequential_recommendation.tiny_model import pretrain, tiny_lm, tiny_tokenizer
from sequential_recommendation.training import TrainingSettings, train
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn

import ilora

CHOICES = [Choice(0, True), Choice(1, False), Choice(2, True)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: recommender("oracle"), "unknown gate"),
        (lambda: recommender().encoder.standardise([(1, 2, 3)]), "two histories"),
        (lambda: prompts_of(DATASET, "movies").collate([], []), "one example"),
        (lambda: Prompts(PROMPTS.tokenizer, DATASET, "books"), "unknown prompts"),
        (lambda: candidate_likelihoods(recommender().train(), PROMPTS, EXAMPLES, STANDARD), r"model\.eval"),
        (lambda: generate(recommender().train(), PROMPTS, EXAMPLES, STANDARD), r"model\.eval"),
        (lambda: TrainingSettings(precision="int8"), "precision"),
        (lambda: TrainingSettings(batch_size=3), "multiple"),
        (lambda: train(recommender(), PROMPTS, [], TrainingSettings(), "unused"), "no window"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_tiny_model_learns_to_read_prompts():
    prompts = prompts_of(tastes(users=40))
    losses = pretrain(tiny_lm(prompts.tokenizer, 32, 1, 2), prompts, steps=40, batch_size=8)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_a_prompt_by_hand():
    example = Example("a", (0, 1), 3, (4, 3))
    ids, items = PROMPTS.prompt(example, Choice(2, True))
    words = PROMPTS.tokenizer.convert_ids_to_tokens(ids)
    history = "Watched so far : Heat <pad> , Toy Story <pad> . \n"
    assert words == f"{history} One of these comes next : Fargo <pad> , The Rock <pad> . \n It is".split(" ")
    assert [item for item in items if item >= 0] == [0, 1, 4, 3]
    assert [word for word, item in zip(words, items, strict=True) if item >= 0] == ["<pad>"] * 4
    assert [PROMPTS.tokenizer.convert_ids_to_tokens(t) for t in PROMPTS.answer(3)] == ["The", "Rock", "\n"]
    text, none = PROMPTS.prompt(example, Choice(2, False))
    assert text == [token for token, item in zip(ids, items, strict=True) if item < 0]
    assert set(none) == {-1}
    assert set(TEMPLATES) == {"movies", "artists", "games", "neutral"}
    assert all(len(set(templates)) >= 3 for templates in TEMPLATES.values())


def test_a_batch_is_padded_on_the_left_and_labels_are_the_answer():
    batch = PROMPTS.collate(EXAMPLES, CHOICES)
    B, L = batch["input_ids"].shape
    assert batch["attention_mask"].shape == batch["item_ids"].shape == (B, L)
    assert batch["history"].shape == (3, 10)
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()  # zeros, then ones
    assert batch["attention_mask"].sum(1).max() == L
    for ids, label, example in zip(batch["input_ids"], batch["labels"], EXAMPLES, strict=True):
        answer = PROMPTS.answer(example.target)
        assert label[label != NO_LABEL].tolist() == answer
        assert ids[-len(answer) :].tolist() == answer
    assert batch["users"].tolist() == [user_number(e.user) for e in EXAMPLES]


def test_a_start_token_stands_there_once_and_newlines_are_needed():
    tokenizer = tiny_tokenizer(DATASET, "movies")
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    assert Prompts(tokenizer, DATASET, "movies").start == []  # it has one, and does not put it there
    processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    tokenizer.backend_tokenizer.post_processor = processor
    started = Prompts(tokenizer, DATASET, "movies")
    assert started.start == [1]
    assert started.prompt(EXAMPLES[0], STANDARD)[0].count(1) == 1
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    with pytest.raises(ValueError, match="makes nothing of a newline"):
        Prompts(tokenizer, DATASET, "movies")


def test_an_answer_is_valid_as_the_tokenizer_writes_it():
    written = PROMPTS.written()
    assert written[9] != TITLES[9]
    texts = [PROMPTS.tokenizer.decode(PROMPTS.answer(item)) for item in range(10)]
    examples = [Example("a", (1, 2), item, tuple(range(10))) for item in range(10)]
    assert [ratio.hits for ratio in text_ratios(texts, examples, written)] == [10, 10]


def test_defect_6_no_vocabulary_is_added():
    model, batch = recommender(), collated()
    embedding = model.lm.get_input_embeddings()
    ids, items = batch["input_ids"], batch["item_ids"]
    assert embedding.num_embeddings == len(PROMPTS.tokenizer)
    assert ids.max() < embedding.num_embeddings
    assert (ids[items >= 0] == PROMPTS.pad).all()
    embeddings = model.embed(batch)
    torch.testing.assert_close(embeddings[items >= 0], model.projector(model.items[items[items >= 0]]))
    torch.testing.assert_close(embeddings[items < 0], embedding(ids)[items < 0])


@pytest.mark.parametrize("gate", GATES)
def test_loss_scores_and_text_do_not_depend_on_the_batch(gate):
    model = recommender(gate)
    together = candidate_likelihoods(model, PROMPTS, EXAMPLES, STANDARD)
    with torch.no_grad():
        whole = model(**PROMPTS.collate(EXAMPLES, CHOICES))
        pairs = zip(EXAMPLES, CHOICES, strict=True)
        losses = torch.stack([model(**PROMPTS.collate([e], [choice])).loss for e, choice in pairs])
        for row, e in zip(together, EXAMPLES, strict=True):  # a likelihood is what a forward of that answer says
            answers = [collated([e._replace(target=item)]) for item in e.candidates]
            expected = torch.stack([-model(**batch, num_items_in_batch=1).loss for batch in answers])
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)
    tokens = torch.tensor([len(PROMPTS.answer(e.target)) for e in EXAMPLES])
    torch.testing.assert_close(whole.loss, (losses * tokens).sum() / tokens.sum(), rtol=1e-5, atol=1e-5)
    apart = torch.cat([candidate_likelihoods(model, PROMPTS, [e], STANDARD) for e in EXAMPLES])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    for size in (1, 2, 3):  # with 2 the last batch is smaller, and counts too
        scores, rank = score(model, PROMPTS, EXAMPLES, size=size)
        given, _ = score(model, PROMPTS, EXAMPLES, size=size, gate=gates(model, PROMPTS, EXAMPLES, STANDARD))
        torch.testing.assert_close(scores, together, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given, together, rtol=1e-5, atol=1e-5)
        assert rank.tolist() == ranks(together, torch.tensor([1, 0, 2])).tolist()
    texts = generate(model, PROMPTS, EXAMPLES, STANDARD)
    assert texts == [generate(model, PROMPTS, [e], STANDARD)[0] for e in EXAMPLES]
    assert texts == write(model, PROMPTS, EXAMPLES, size=2)
    assert len(generate(model, PROMPTS, EXAMPLES, STANDARD, num_beams=3)) == 3


def test_defect_8_an_error_in_a_layer_is_an_error():
    def fail(*_):
        raise RuntimeError("a layer failed")

    model = recommender()
    next(iter(ilora.ilora_layers(model.lm).values())).register_forward_hook(fail)
    for call in (lambda: model(**collated()), lambda: score(model, PROMPTS, EXAMPLES)):
        with pytest.raises(RuntimeError, match="a layer failed"):
            call()


@pytest.mark.parametrize("gate", ["sequence", "random", "prompt"])
def test_defects_5_and_10_no_dropout_and_no_other_instance_reaches_a_gate_even_in_training(gate):
    model, batch = recommender(gate).train(), collated()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert not any(module.training for module in model.encoder.modules())
    assert torch.equal(model.encoder(batch["history"]), model.encoder(batch["history"]))
    torch.testing.assert_close(model.gate(batch)[:1], model.gate(collated(EXAMPLES[:1])))


def test_the_gate_of_a_prompt_is_the_same_with_and_without_its_answer():
    model = recommender("prompt")
    told = model.gate(collated())
    torch.testing.assert_close(model.gate(collated(answers=False)), told)
    # of the words alone: item embeddings do not move it
    torch.testing.assert_close(model.gate(collated(choice=Choice(0, False))), told)


@pytest.mark.parametrize(("experts", "dim"), [(2, 64), (8, 12)])
def test_defect_11_any_number_of_experts_and_width(experts, dim):
    model = recommender(sequence_model=sequence_models.build("gru4rec", 10, dim=dim), num_experts=experts)
    assert gates(model, PROMPTS, EXAMPLES, STANDARD).shape == (3, experts)
    assert score(model, PROMPTS, EXAMPLES)[0].shape == (3, 3)


def test_a_random_gate_knows_a_user_again():
    model, again = recommender("random"), [EXAMPLES[0]._replace(history=(5, 6, 7)), *EXAMPLES[1:]]
    one, two = (gates(model, PROMPTS, some, STANDARD) for some in (EXAMPLES, again))
    assert torch.equal(one, two)
    assert not torch.allclose(one[0], one[1])


def test_the_sequence_gate_reaches_the_answer():
    batch, other = (collated([example], Choice(0, False)) for example in EXAMPLES[:2])
    moved = dict(batch, history=other["history"])  # the words are the same: only the gate knows of the other history
    model = recommender()
    assert not torch.allclose(model(**batch).loss, model(**moved).loss)
    model = recommender("uniform")
    assert torch.equal(model(**batch).loss, model(**moved).loss)


@pytest.mark.parametrize("gate", GATES)
def test_defects_2_3_14_everything_comes_back_bit_for_bit(tmp_path, gate):
    model = recommender(gate)
    with torch.no_grad():
        model.projector[0].bias.normal_()
    model.save(tmp_path / "saved")
    lm = tiny_lm(PROMPTS.tokenizer, 32, 2, 2, seed=9)
    lm.load_state_dict(tiny_lm(PROMPTS.tokenizer, 32, 2, 2).state_dict())
    other = load(tmp_path / "saved", lm)
    assert differing(model, other) == []
    assert not other.training
    assert torch.equal(model.items, other.items)
    assert torch.equal(*(candidate_likelihoods(m, PROMPTS, EXAMPLES, STANDARD) for m in (model, other)))
    assert torch.equal(*(gates(m, PROMPTS, EXAMPLES, STANDARD) for m in (model, other)))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_saving_again_and_what_cannot_be_loaded(tmp_path):
    model, saved, lm = recommender(), tmp_path / "saved", tiny_lm(PROMPTS.tokenizer, 32, 2, 2)
    model.save(saved)
    with torch.no_grad():
        model.projector[2].bias.fill_(3.0)
    model.save(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    other = recommender(seed=3)
    assert not torch.equal(other.items, model.items)
    assert (other.restore(saved).projector[2].bias == 3.0).all()
    assert torch.equal(other.items, model.items)

    def refused(error, words, call):
        with pytest.raises(error, match=words):
            call()

    refused(ValueError, "this recommender is", lambda: recommender("prompt").restore(saved))
    refused(ValueError, "does not fit", lambda: load(saved, tiny_lm(PROMPTS.tokenizer, 16, 2, 2)))
    settings = saved / "recommender.json"
    settings.write_text(json.dumps({"gate": "sequence", "colour": 1}))
    refused(ValueError, "recommender.json", lambda: load(saved, lm))
    settings.unlink()
    refused(FileNotFoundError, "recommender.json", lambda: load(saved, lm))


def test_z_is_standardised_by_fixed_figures_that_are_kept(tmp_path):
    model, histories = recommender(), [items[:3] for items in DATASET.users.values()]
    rows = pad_histories(histories, DATASET.num_items)
    before = model.encoder(rows)
    model.encoder.standardise(histories, batch_size=7)
    z = model.encoder(rows)
    torch.testing.assert_close(z, (before - before.mean(0)) / before.std(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.encoder(rows[:1]), z[:1])
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", tiny_lm(PROMPTS.tokenizer, 32, 2, 2))
    assert torch.equal(again.encoder.mean, model.encoder.mean)
    assert torch.equal(again.encoder.deviation, model.encoder.deviation)


def test_a_shuffled_gate_sees_its_own_user_only_outside_of_training():
    model, own = recommender("shuffled"), recommender("sequence")
    own.load_state_dict(model.state_dict())
    batch = collated()
    assert torch.equal(model.gate(batch), own.gate(batch))
    exchanged = own.gate(batch | {"history": batch["history"].roll(1, 0)})
    assert torch.equal(model.train().gate(batch), exchanged)
    assert not torch.allclose(exchanged, own.gate(batch), atol=1e-3)
    with pytest.raises(ValueError, match="two examples at once or more in training, got 1"):
        model.gate(collated(EXAMPLES[:1]))
