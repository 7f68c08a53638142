"""Training a recommender: the same for any sizes and interruptions; rates, precision and a lost loss."""

import copy
import math
from pathlib import Path

import pytest
import torch
from recommenders import EXAMPLES, collated, differing, prompts_of, recommender
from sequential_recommendation.data import split, with_candidates
from sequential_recommendation.prompts import NO_LABEL, Choice, choose, hybrid_share
from sequential_recommendation.tastes import tastes
from sequential_recommendation.tiny_model import tiny_lm
from sequential_recommendation.training import (
    RecommenderTrainer,
    TrainingSettings,
    learning_rate_factor,
    parameter_groups,
    train,
)

SMALL = prompts_of(tastes(users=40, names=9))
WINDOWS = split(SMALL.dataset, protocol="leave-one-out").train[:26]  # 26 = 3 · 8 + 2: four steps an epoch


def brief(**settings):
    common = {"batch_size": 4, "effective_batch": 8, "lr": 1e-3, "epochs": 1}
    return TrainingSettings(**{**common, **settings})


class Watch(RecommenderTrainer):
    """Keeps what every step was made of."""

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        self.__dict__.setdefault("seen", []).append((batches, int(count)))
        return batches, count


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two epochs without an interruption, a checkpoint after every three steps."""
    settings, folder = brief(epochs=2, save_steps=3), tmp_path_factory.mktemp("whole")
    trainer = Watch(recommender(prompts=SMALL), SMALL, WINDOWS, settings, folder)
    trainer.train()
    return trainer


def test_defect_4_the_curriculum_progresses(whole):
    assert len(whole.seen) == whole.state.max_steps == 8
    for batches, count in whole.seen:
        assert count == sum(int((batch["labels"] != NO_LABEL).sum()) for batch in batches)
    shares = [torch.cat([(b["item_ids"] >= 0).any(1) for b in batches]).float().mean() for batches, _ in whole.seen]
    assert shares[0] == 0
    assert torch.stack(shares[:4]).mean() < 0.4 < 0.5 < torch.stack(shares[4:]).mean()
    assert [len(batch["users"]) for batch in whole.seen[3][0]] == [2]  # defect 7: the rest is not dropped
    assert not whole.args.dataloader_drop_last


@pytest.mark.parametrize("stop", [3, 6])
def test_a_resumed_run_ends_bit_equal(whole, tmp_path, stop):
    again = recommender(prompts=SMALL, seed=5)
    torch.manual_seed(77)
    checkpoint = Path(whole.args.output_dir, f"checkpoint-{stop}")
    train(again, SMALL, WINDOWS, whole.settings, tmp_path, resume=checkpoint)
    assert differing(whole.model, again) == []
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        train(again, SMALL, WINDOWS, whole.settings, tmp_path, resume=tmp_path / "nowhere")


def test_defect_4_choices_depend_on_seed_example_and_step_alone():
    choices = [choose("movies", EXAMPLES[0], 0, step, 0.5) for step in range(200)]
    assert choices == [choose("movies", copy.deepcopy(EXAMPLES[0]), 0, step, 0.5) for step in range(200)]
    assert {choice.template for choice in choices} == {0, 1, 2}
    assert 60 < sum(choice.hybrid for choice in choices) < 140
    assert choices != [choose("movies", EXAMPLES[1], 0, step, 0.5) for step in range(200)]
    assert [hybrid_share(step, 100, 1.0) for step in (0, 50, 100)] == [0.0, 0.5, 1.0]
    assert hybrid_share(50, 100, 0.5) == hybrid_share(0, 100, 0) == 1.0


def test_accumulated_micro_batches_are_one_batch():
    model = recommender(prompts=SMALL, lora_dropout=0.0)
    test = with_candidates(WINDOWS[:6], SMALL.dataset)
    tokens, gradients = sum(len(SMALL.answer(e.target)) for e in test), []
    for size in (6, 4):
        model.zero_grad()
        for start in range(0, 6, size):
            model(**collated(test[start : start + size], prompts=SMALL), num_items_in_batch=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_what_is_trained_and_at_which_rate():
    model = recommender()
    groups = adapters, projector, gate = parameter_groups(model, TrainingSettings(lr=1e-3))
    assert (adapters["lr"], gate["lr"]) == (1e-3, pytest.approx(3e-4))
    assert (adapters["weight_decay"], projector["weight_decay"], gate["weight_decay"]) == (0.0, 1e-5, 1e-5)
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in model.encoder.parameters())
    plain = parameter_groups(recommender("uniform"), TrainingSettings())
    assert len(plain) == 2
    small, large = (sum(p.numel() for group in each for p in group["params"]) for each in (plain, groups))
    assert large - small == 4 * model.encoder.dim  # plain LoRA has the same size but for the gate
    factors = [learning_rate_factor(step, 100, 0.05) for step in range(101)]
    assert (factors[0], factors[5], factors[100]) == (0.01, 1.0, pytest.approx(0.01))
    assert max(factors) == 1.0
    constant = [learning_rate_factor(step, 100, 0.05, falls=False) for step in range(101)]
    assert (constant[:6], set(constant[5:])) == (factors[:6], {1.0})


def test_defect_3_the_projector_is_saved_after_text_only_batches(tmp_path):
    model = recommender(prompts=SMALL)
    train(model, SMALL, WINDOWS, brief(save_steps=2, curriculum=None, steps=2), tmp_path)
    assert (tmp_path / "checkpoint-2" / "recommender" / "projector.safetensors").exists()
    batch = collated(with_candidates(WINDOWS[:2], SMALL.dataset), Choice(0, False), SMALL)
    model(**batch).loss.backward()  # no parameter without a gradient: what several processes wait for
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_loss_that_is_lost_ends_the_training(tmp_path):
    with pytest.raises(FloatingPointError, match="training loss is nan"):
        train(recommender(prompts=SMALL), SMALL, WINDOWS, brief(lr=math.nan, steps=50), tmp_path)


def test_adapters_of_a_bfloat16_model_learn_at_small_rates(tmp_path):
    model = recommender(prompts=SMALL, lm=tiny_lm(SMALL.tokenizer, 32, 1, 2).to(torch.bfloat16))
    assert model.lm.get_input_embeddings().weight.dtype == torch.bfloat16
    adapters = {name: p for name, p in model.lm.named_parameters() if "lora_A" in name}
    before = {name: p.detach().clone() for name, p in adapters.items()}
    train(model, SMALL, WINDOWS, brief(lr=5e-6, steps=4), tmp_path)
    changed = torch.cat([(p != before[name]).flatten() for name, p in adapters.items()])
    assert changed.float().mean() > 0.9
