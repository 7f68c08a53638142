"""The recommender: prompts, scores, training, files. A "defect" is one of the published code's, by its number."""

import copy
import json

import pytest
import torch
import transformers
from sequential_recommendation import sequence_models
from sequential_recommendation.data import Dataset, Example, split, with_candidates
from sequential_recommendation.prompts import (
    NO_LABEL,
    TEMPLATES,
    Choice,
    Prompts,
    choose,
    hybrid_share,
    user_number,
)
from sequential_recommendation.recommender import GATES, Recommender, load
from sequential_recommendation.scoring import STANDARD, candidate_likelihoods, gates, generate, score, write
from sequential_recommendation.sequence_models import pad_histories
from sequential_recommendation.settings import RecommenderConfig
from sequential_recommendation.synthetic import synthetic
from sequential_recommendation.tastes import tastes
from sequential_recommendation.tiny_model import pretrain, tiny_lm, tiny_tokenizer
from sequential_recommendation.training import (
    RecommenderTrainer,
    TrainingSettings,
    arguments,
    learning_rate_factor,
    parameter_groups,
    train,
)
from tokenizers.processors import TemplateProcessing
from torch import nn

import ilora

TITLES = ["Heat", "Toy Story", "Toy Story 2", "The Rock", "Fargo", "Big", "The Thin Red Line", "Alien"]


@pytest.fixture(scope="module")
def films():
    """Titles of several lengths, one of which contains another."""
    return Dataset("films", TITLES, {f"u{n}": [n, (n + 1) % 8, (n + 2) % 8, (n + 3) % 8] for n in range(8)})


@pytest.fixture(scope="module")
def prompts(films):
    return Prompts(tiny_tokenizer(films, "movies"), films, "movies")


@pytest.fixture(scope="module")
def examples():
    return [
        Example("a", (0, 1, 2), 3, (4, 3, 5)),
        Example("b", (3, 4, 5, 6, 7), 0, (0, 1, 2)),
        Example("c", (6, 1, 2, 3), 7, (5, 4, 7)),
    ]


def make(prompts, gate="sequence", seed=0, lm=None, **settings):
    """A recommender whose adapters and gate do something."""
    torch.manual_seed(seed)
    E = 1 if gate == "uniform" else 4
    sequence_model = sequence_models.build("sasrec", prompts.dataset.num_items, dim=8, blocks=1, dropout=0.5)
    lm = tiny_lm(prompts.tokenizer, 32, 2, 2) if lm is None else lm
    model = Recommender(lm, sequence_model, RecommenderConfig(gate=gate, num_experts=E, **settings))
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "ilora_gate" in name:
                parameter.normal_()
    return model.eval()


def test_a_prompt_by_hand(prompts):
    example = Example("a", (0, 1), 3, (4, 3))
    ids, items = prompts.prompt(example, Choice(2, True))
    words = prompts.tokenizer.convert_ids_to_tokens(ids)
    pad = "<pad>"
    assert words == [
        *("Watched", "so", "far", ":", "Heat", pad, ",", "Toy", "Story", pad, ".", "\n", "One", "of", "these", "comes"),
        *("next", ":", "Fargo", pad, ",", "The", "Rock", pad, ".", "\n", "It", "is"),
    ]
    assert [item for item in items if item >= 0] == [0, 1, 4, 3]
    assert [word for word, item in zip(words, items, strict=True) if item >= 0] == [pad] * 4
    assert [prompts.tokenizer.convert_ids_to_tokens(t) for t in prompts.answer(3)] == ["The", "Rock", "\n"]
    text, none = prompts.prompt(example, Choice(2, False))
    assert text == [token for token, item in zip(ids, items, strict=True) if item < 0]
    assert set(none) == {-1}
    assert "[item 4]" in prompts.text(example, Choice(2, True))


def test_every_kind_has_several_templates():
    assert set(TEMPLATES) == {"movies", "artists", "games", "neutral"}
    assert all(len(set(templates)) >= 3 for templates in TEMPLATES.values())


def test_a_collated_batch_is_padded_on_the_left_and_labels_are_the_answer(prompts, examples):
    batch = prompts.collate(examples, [Choice(0, True), Choice(1, False), Choice(2, True)])
    B, L = batch["input_ids"].shape
    assert batch["attention_mask"].shape == batch["item_ids"].shape == (B, L)
    assert batch["history"].shape == (3, 10)
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()  # zeros, then ones
    assert batch["attention_mask"].sum(1).max() == L
    for row, example in enumerate(examples):
        answer = prompts.answer(example.target)
        label = batch["labels"][row]
        assert label[label != NO_LABEL].tolist() == answer
        assert batch["input_ids"][row, -len(answer) :].tolist() == answer
    assert batch["users"].tolist() == [user_number(e.user) for e in examples]
    with pytest.raises(ValueError, match="one example"):
        prompts.collate([], [])


def test_a_tokenizer_with_a_start_token_starts_with_it_once(films, examples):
    tokenizer = tiny_tokenizer(films, "movies")
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    assert Prompts(tokenizer, films, "movies").start == []  # it has one, and does not put it there
    puts = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    tokenizer.backend_tokenizer.post_processor = puts
    started = Prompts(tokenizer, films, "movies")
    assert started.start == [1]
    assert started.prompt(examples[0], STANDARD)[0].count(1) == 1
    with pytest.raises(ValueError, match="unknown prompts"):
        Prompts(tokenizer, films, "books")


def test_defect_6_no_vocabulary_is_added(prompts, examples):
    model = make(prompts)
    rows = model.lm.get_input_embeddings().num_embeddings
    batch = prompts.collate(examples, [STANDARD] * 3)
    assert rows == len(prompts.tokenizer)
    assert batch["input_ids"].max() < rows
    assert (batch["input_ids"][batch["item_ids"] >= 0] == prompts.pad).all()
    embeddings = model.embed(batch)
    expected = model.projector(model.items[batch["item_ids"][0][batch["item_ids"][0] >= 0]])
    torch.testing.assert_close(embeddings[0][batch["item_ids"][0] >= 0], expected)
    words = batch["item_ids"] < 0
    torch.testing.assert_close(embeddings[words], model.lm.get_input_embeddings()(batch["input_ids"])[words])


@pytest.mark.parametrize("gate", GATES)
def test_loss_and_scores_do_not_depend_on_the_batch(prompts, examples, gate):
    model = make(prompts, gate)
    choices = [Choice(0, True), Choice(1, False), Choice(2, True)]
    with torch.no_grad():
        whole = model(**prompts.collate(examples, choices))
        single = [model(**prompts.collate([e], [c])) for e, c in zip(examples, choices, strict=True)]
    tokens = torch.tensor([len(prompts.answer(e.target)) for e in examples])
    losses = torch.stack([one.loss for one in single])
    torch.testing.assert_close(whole.loss, (losses * tokens).sum() / tokens.sum(), rtol=1e-5, atol=1e-5)
    together = candidate_likelihoods(model, prompts, examples, STANDARD)
    apart = torch.cat([candidate_likelihoods(model, prompts, [e], STANDARD) for e in examples])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def by_full_forwards(model, prompts, example, choice):
    """One forward for each candidate, nothing shared."""
    found = []
    for item in example.candidates:
        batch = prompts.collate([example._replace(target=item)], [choice])
        with torch.no_grad():
            output = model(**batch)
        labels = batch["labels"][0]
        found.append(output.logits[0].log_softmax(-1)[torch.arange(len(labels)), labels].sum())
    return torch.stack(found)


def gpt2(vocabulary):
    settings = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, bos_token_id=2, eos_token_id=2))


def qwen3(vocabulary):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen3Config(vocab_size=vocabulary, num_key_value_heads=2, head_dim=8, **sizes)
    return transformers.Qwen3ForCausalLM(config)


@pytest.mark.parametrize("kind", [None, gpt2, qwen3])
@pytest.mark.parametrize("gate", ["sequence", "prompt"])
def test_shared_prompts_score_as_full_forwards_do(prompts, examples, gate, kind):
    torch.manual_seed(1)
    model = make(prompts, gate, lm=kind(len(prompts.tokenizer)).eval() if kind else None)
    scores = candidate_likelihoods(model, prompts, examples, Choice(1, True))
    for row, example in zip(scores, examples, strict=True):
        torch.testing.assert_close(row, by_full_forwards(model, prompts, example, Choice(1, True)), rtol=0, atol=1e-4)


def test_scores_are_refused_while_dropout_is_on(prompts, examples):
    model = make(prompts).train()
    for ask in (candidate_likelihoods, generate):
        with pytest.raises(ValueError, match=r"model\.eval"):
            ask(model, prompts, examples, STANDARD)


@pytest.mark.parametrize("gate", GATES)
def test_generated_text_does_not_depend_on_the_batch(prompts, examples, gate):
    model = make(prompts, gate)
    together = generate(model, prompts, examples, STANDARD)
    assert together == [generate(model, prompts, [e], STANDARD)[0] for e in examples]
    assert together == write(model, prompts, examples, size=2)
    assert len(generate(model, prompts, examples, STANDARD, num_beams=3)) == 3


def test_predictions_are_the_same_for_every_batch_size_and_defect_7_no_example_is_dropped():
    dataset = synthetic(users=60)
    prompts = Prompts(tiny_tokenizer(dataset), dataset)
    test = with_candidates(split(dataset, protocol="leave-one-out").test[:23], dataset)
    model = make(prompts)
    scores, rank = score(model, prompts, test, size=23)
    for size in (1, 4, 16):
        other, other_rank = score(model, prompts, test, size=size)
        assert other.shape == (23, 20)
        torch.testing.assert_close(other, scores, rtol=1e-5, atol=1e-4)
        assert other_rank.tolist() == rank.tolist()
    settings = TrainingSettings(batch_size=5, effective_batch=5)
    assert not arguments(settings, "x").dataloader_drop_last


def test_defect_4_choices_depend_on_seed_example_and_step_alone(examples):
    choices = [choose("movies", examples[0], 0, step, 0.5) for step in range(200)]
    assert choices == [choose("movies", copy.deepcopy(examples[0]), 0, step, 0.5) for step in range(200)]
    assert {choice.template for choice in choices} == {0, 1, 2}
    assert 60 < sum(choice.hybrid for choice in choices) < 140
    assert choices != [choose("movies", examples[1], 0, step, 0.5) for step in range(200)]
    assert [hybrid_share(step, 100, 1.0) for step in (0, 50, 100)] == [0.0, 0.5, 1.0]
    assert hybrid_share(50, 100, 0.5) == hybrid_share(0, 100, 0) == 1.0


@pytest.fixture(scope="module")
def small():
    """(prompts, windows): enough for a few steps."""
    dataset = synthetic(users=40)
    prompts = Prompts(tiny_tokenizer(dataset), dataset)
    return prompts, split(dataset, protocol="leave-one-out").train[:26]


BRIEF = {"batch_size": 4, "effective_batch": 8, "progress": False, "lr": 1e-3, "epochs": 1}


class Watch(RecommenderTrainer):
    """Keeps what every step was made of."""

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        self.__dict__.setdefault("seen", []).append((batches, int(count)))
        return batches, count


def steps_seen(small, tmp_path, **settings):
    prompts, windows = small
    trainer = Watch(make(prompts), prompts, windows, TrainingSettings(**{**BRIEF, **settings}), tmp_path)
    trainer.train()
    return trainer


def test_defect_4_the_curriculum_progresses_alike_with_any_number_of_workers(small, tmp_path):
    alone = steps_seen(small, tmp_path, epochs=2)
    several = steps_seen(small, tmp_path, epochs=2, workers=2)
    assert len(alone.seen) == len(several.seen) == alone.state.max_steps == 8
    for (ours, count), (theirs, other) in zip(alone.seen, several.seen, strict=True):
        assert count == other == sum(int((batch["labels"] != NO_LABEL).sum()) for batch in ours)
        for one, two in zip(ours, theirs, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)
    shares = [torch.cat([(b["item_ids"] >= 0).any(1) for b in batches]).float().mean() for batches, _ in several.seen]
    assert shares[0] == 0
    assert torch.stack(shares[:4]).mean() < 0.4 < 0.5 < torch.stack(shares[4:]).mean()
    last = several.seen[3][0]
    assert [len(batch["users"]) for batch in last] == [2]  # 26 = 3 · 8 + 2: defect 7, the rest is not dropped
    for ours, theirs in zip(alone.model.parameters(), several.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def trained_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_ends_bit_equal(small, tmp_path, stop):
    prompts, windows = small
    settings = TrainingSettings(**{**BRIEF, "epochs": 2}, save_steps=stop)
    through = make(prompts)
    train(through, prompts, windows, settings, tmp_path)
    again = make(prompts, seed=5, lm=tiny_lm(prompts.tokenizer, 32, 2, 2))
    torch.manual_seed(77)
    train(again, prompts, windows, settings, tmp_path / "again", resume=tmp_path / f"checkpoint-{stop}")
    expected, got = trained_state(through), trained_state(again)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        train(again, prompts, windows, settings, tmp_path, resume=tmp_path / "nowhere")


def test_accumulated_micro_batches_are_one_batch(small):
    prompts, windows = small
    model = make(prompts, lora_dropout=0.0)
    test = with_candidates(windows[:6], prompts.dataset)
    gradients = []
    for size in (6, 4):
        model.zero_grad()
        tokens = sum(len(prompts.answer(e.target)) for e in test)
        for start in range(0, 6, size):
            part = test[start : start + size]
            model(**prompts.collate(part, [STANDARD] * len(part)), num_items_in_batch=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_what_is_trained_and_at_which_rate(small):
    prompts, _ = small
    model = make(prompts)
    adapters, projector, gate = parameter_groups(model, TrainingSettings(lr=1e-3))
    assert (adapters["lr"], gate["lr"]) == (1e-3, pytest.approx(3e-4))
    assert (adapters["weight_decay"], projector["weight_decay"], gate["weight_decay"]) == (0.0, 1e-5, 1e-5)
    grouped = {id(p) for group in (adapters, projector, gate) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert len(parameter_groups(make(prompts, "uniform"), TrainingSettings())) == 2
    factors = [learning_rate_factor(step, 100, 0.05) for step in range(101)]
    assert (factors[0], factors[5], factors[100]) == (0.01, 1.0, pytest.approx(0.01))
    assert max(factors) == 1.0


def test_plain_lora_has_the_same_size_but_for_the_gate(small):
    prompts, _ = small
    plain, gated = make(prompts, "uniform"), make(prompts)
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (plain, gated)]
    assert count[1] - count[0] == 4 * plain.encoder.dim


@pytest.mark.parametrize("gate", GATES)
def test_defects_2_3_14_everything_comes_back_bit_for_bit(prompts, examples, tmp_path, gate):
    model = make(prompts, gate)
    base = {name: t.clone() for name, t in tiny_lm(prompts.tokenizer, 32, 2, 2).state_dict().items()}
    with torch.no_grad():
        model.projector[0].bias.normal_()
    model.save(tmp_path / "saved")
    lm = tiny_lm(prompts.tokenizer, 32, 2, 2, seed=9)
    lm.load_state_dict(base)
    other = load(tmp_path / "saved", lm)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert not other.training
    assert torch.equal(model.items, other.items)
    scores = [candidate_likelihoods(m, prompts, examples, STANDARD) for m in (model, other)]
    assert torch.equal(*scores)
    assert torch.equal(*(gates(m, prompts, examples, STANDARD) for m in (model, other)))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_saving_again_and_what_cannot_be_loaded(prompts, tmp_path):
    model = make(prompts)
    model.save(tmp_path / "saved")
    with torch.no_grad():
        model.projector[2].bias.fill_(3.0)
    model.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    restored = make(prompts, seed=3).restore(tmp_path / "saved")
    assert (restored.projector[2].bias == 3.0).all()
    with pytest.raises(ValueError, match="this recommender is"):
        make(prompts, "prompt").restore(tmp_path / "saved")
    with pytest.raises(ValueError, match="does not fit"):
        load(tmp_path / "saved", tiny_lm(prompts.tokenizer, 16, 2, 2))
    settings = tmp_path / "saved" / "recommender.json"
    settings.write_text(json.dumps({"gate": "sequence", "colour": 1}))
    with pytest.raises(ValueError, match="recommender.json"):
        load(tmp_path / "saved", tiny_lm(prompts.tokenizer, 32, 2, 2))
    settings.unlink()
    with pytest.raises(FileNotFoundError, match="recommender.json"):
        load(tmp_path / "saved", tiny_lm(prompts.tokenizer, 32, 2, 2))


def test_z_is_standardised_by_fixed_figures_that_are_kept(small, tmp_path):
    prompts, windows = small
    model, histories = make(prompts), [window.history for window in windows]
    before = model.encoder(pad_histories(histories, prompts.dataset.num_items))
    model.encoder.standardise(histories, batch_size=7)
    z = model.encoder(pad_histories(histories, prompts.dataset.num_items))
    torch.testing.assert_close(z, (before - before.mean(0)) / before.std(0), rtol=1e-4, atol=1e-4)
    alone = model.encoder(pad_histories(histories[:1], prompts.dataset.num_items))
    torch.testing.assert_close(alone, z[:1])
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", tiny_lm(prompts.tokenizer, 32, 2, 2))
    assert torch.equal(again.encoder.mean, model.encoder.mean)
    assert torch.equal(again.encoder.deviation, model.encoder.deviation)
    with pytest.raises(ValueError, match="two histories"):
        model.encoder.standardise(histories[:1])


def test_defect_3_the_projector_is_saved_after_text_only_batches(small, tmp_path):
    prompts, windows = small
    model = make(prompts)
    train(model, prompts, windows, TrainingSettings(**BRIEF, save_steps=2, curriculum=None), tmp_path)
    assert all((path / "recommender" / "projector.safetensors").exists() for path in tmp_path.glob("checkpoint-*"))
    batch = prompts.collate(with_candidates(windows[:2], prompts.dataset), [Choice(0, False)] * 2)
    model(**batch).loss.backward()  # no parameter without a gradient: what several processes wait for
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_defect_5_the_sequence_model_never_drops_out(prompts, examples):
    model = make(prompts).train()
    history = prompts.collate(examples, [STANDARD] * 3)["history"]
    assert not model.encoder.training
    assert not any(module.training for module in model.encoder.modules())
    assert torch.equal(model.encoder(history), model.encoder(history))


def test_defect_8_an_error_in_a_layer_is_an_error(prompts, examples):
    model = make(prompts)

    def fail(*_):
        raise RuntimeError("a layer failed")

    next(m for m in model.modules() if isinstance(m, ilora.ILoRALinear)).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a layer failed"):
        model(**prompts.collate(examples, [STANDARD] * 3))
    with pytest.raises(RuntimeError, match="a layer failed"):
        score(model, prompts, examples)


@pytest.mark.parametrize("gate", ["sequence", "random", "prompt"])
def test_defect_10_no_instance_sees_another_even_in_training(prompts, examples, gate):
    model = make(prompts, gate).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    batch = prompts.collate(examples, [STANDARD] * 3)
    alone = prompts.collate(examples[:1], [STANDARD])
    torch.testing.assert_close(model.gate(batch)[:1], model.gate(alone))


@pytest.mark.parametrize(("experts", "dim"), [(2, 64), (8, 12)])
def test_defect_11_any_number_of_experts_and_width(prompts, examples, experts, dim):
    lm = tiny_lm(prompts.tokenizer, 32, 2, 2)
    sequence_model = sequence_models.build("gru4rec", prompts.dataset.num_items, dim=dim)
    model = Recommender(lm, sequence_model, RecommenderConfig(num_experts=experts)).eval()
    assert gates(model, prompts, examples, STANDARD).shape == (3, experts)
    assert score(model, prompts, examples)[0].shape == (3, 3)


def test_the_gate_of_a_prompt_is_the_same_with_and_without_its_answer(prompts, examples):
    model = make(prompts, "prompt")
    asked = model.gate(prompts.collate(examples, [STANDARD] * 3, answers=False))
    told = model.gate(prompts.collate(examples, [STANDARD] * 3))
    torch.testing.assert_close(asked, told)
    words = model.gate(prompts.collate(examples, [Choice(0, False)] * 3))
    torch.testing.assert_close(words, told)  # of the words alone: item embeddings do not move it


def test_a_random_gate_knows_a_user_again(prompts, examples):
    model = make(prompts, "random")
    again = [examples[0]._replace(history=(5, 6, 7)), *examples[1:]]
    one, two = (gates(model, prompts, some, STANDARD) for some in (examples, again))
    assert torch.equal(one, two)
    assert not torch.allclose(one[0], one[1])


def test_the_sequence_gate_reaches_the_answer(prompts, examples):
    model = make(prompts)
    choice = Choice(0, False)  # the words are the same: only the gate knows of the other history
    batch = prompts.collate(examples[:1], [choice])
    moved = dict(batch, history=prompts.collate(examples[1:2], [choice])["history"])
    assert not torch.allclose(model(**batch).loss, model(**moved).loss)
    model = make(prompts, "uniform")
    assert torch.equal(model(**batch).loss, model(**moved).loss)


def test_unknown_names_are_refused(prompts):
    with pytest.raises(ValueError, match="unknown gate"):
        make(prompts, "oracle")
    with pytest.raises(ValueError, match="precision"):
        TrainingSettings(precision="int8")
    with pytest.raises(ValueError, match="multiple"):
        TrainingSettings(batch_size=3)


def test_the_tiny_model_learns_to_read_prompts(films):
    dataset = synthetic(users=40)
    prompts = Prompts(tiny_tokenizer(dataset), dataset)
    losses = pretrain(tiny_lm(prompts.tokenizer, 32, 1, 2), prompts, steps=40, batch_size=8)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    with pytest.raises(ValueError, match="no window"):
        train(make(prompts), prompts, [], TrainingSettings(**BRIEF), "unused")


def test_tastes_have_conflicting_rules_that_titles_show():
    dataset = tastes(users=40)
    assert len(set(dataset.titles)) == dataset.num_items
    kinds = [title.split()[0] for title in dataset.titles]
    rules = {}
    for user, items in dataset.users.items():
        group = dataset.groups[user]
        met = [kinds[item] for place, item in enumerate(items) if place % 4]
        for last, following in zip(met, met[1:], strict=False):
            assert rules.setdefault((group, last), following) == following
    for (group, last), following in rules.items():
        assert all(rules.get((other, last)) != following for other in range(4) if other != group)
    assert dataset == tastes(users=40)
    assert dataset != tastes(users=40, seed=1)
    with pytest.raises(ValueError, match="tastes"):
        tastes(groups=23)
