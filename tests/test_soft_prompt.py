"""z as a soft prompt token of a LoRA, and the training step with a frozen model in bfloat16."""

from copy import deepcopy

import pytest
import torch
from sequential_recommendation import sequence_models
from sequential_recommendation.data import Dataset, split, with_candidates
from sequential_recommendation.likelihoods import candidate_likelihoods
from sequential_recommendation.prompts import NO_ITEM, USER, Choice, Prompts
from sequential_recommendation.recommender import Recommender, RecommenderConfig, load
from sequential_recommendation.scoring import STANDARD, generate
from sequential_recommendation.tiny_model import tiny_lm, tiny_tokenizer
from sequential_recommendation.training import TrainingSettings, parameter_groups, train

import ilora

TITLES = [f"Film number {n}" for n in range(40)]
SOFT = RecommenderConfig(gate="uniform", num_experts=1, soft_prompt=True)
USERS = {f"u{n}": [(n * 3 + step * (1 + n % 4)) % 40 for step in range(9)] for n in range(40)}


@pytest.fixture(scope="module")
def films():
    return Dataset("films", TITLES, USERS)


@pytest.fixture
def prompts(films):
    return Prompts(tiny_tokenizer(films, "movies"), films, "movies", soft_prompt=True)


@pytest.fixture
def examples(films):
    return with_candidates(split(films).train[:5], films)


def made(prompts, config=SOFT):
    """Adapters that do something, and no dropout, so that two passes agree."""
    torch.manual_seed(0)
    model = Recommender(
        tiny_lm(prompts.tokenizer, 32, 2, 2), sequence_models.build("sasrec", 40, dim=8, blocks=1), config
    )
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def with_other_history(batch):
    """The same words and candidates, other users' histories for z."""
    return {**batch, "history": batch["history"].roll(1, 0)}


def test_z_has_one_place_behind_the_history(prompts, examples):
    plain = Prompts(prompts.tokenizer, prompts.dataset, "movies")
    for choice in (Choice(1, False), Choice(2, True)):
        ids, items = prompts.prompt(examples[0], choice)
        place = items.index(USER)
        assert items.count(USER) == 1
        assert ids[place] == prompts.pad
        assert (ids[:place] + ids[place + 1 :], items[:place] + items[place + 1 :]) == plain.prompt(examples[0], choice)
    ids, items = prompts.prompt(examples[0], Choice(0, True))
    place = items.index(USER)
    assert items[place - 1] == examples[0].history[-1]  # behind the last item's embedding, before the candidates
    assert "on offer" in prompts.tokenizer.decode(ids[place:])


def test_embed_puts_the_projected_z_there(prompts, examples):
    model = made(prompts)
    batch = prompts.collate(examples, [STANDARD] * 5)
    found = model.embed(batch)
    place = batch["item_ids"] == USER
    torch.testing.assert_close(found[place], model.user_projector(model.encoder(batch["history"])))
    words = batch["item_ids"] == NO_ITEM
    torch.testing.assert_close(found[words], model.lm.get_input_embeddings()(batch["input_ids"])[words])


def test_z_reaches_loss_likelihoods_and_texts(prompts, examples):
    model = made(prompts)
    batch = prompts.collate(examples, [STANDARD] * 5)
    with torch.no_grad():
        assert not torch.allclose(model(**batch).loss, model(**with_other_history(batch)).loss, rtol=1e-6)
    packed = candidate_likelihoods(model, prompts, examples, STANDARD)
    assert model.tried  # so they stood side by side
    model.reach = 0  # each candidate in a row of its own
    torch.testing.assert_close(packed, candidate_likelihoods(model, prompts, examples, STANDARD), rtol=0, atol=1e-4)
    texts = generate(model, prompts, examples, STANDARD)
    with torch.no_grad():
        model.user_projector[2].bias.add_(1.0)
    assert not torch.allclose(packed, candidate_likelihoods(model, prompts, examples, STANDARD), atol=1e-3)
    assert texts != generate(model, prompts, examples, STANDARD)


def test_a_prompt_without_the_place_is_refused_and_one_too_many_too(prompts, examples):
    plain = Prompts(prompts.tokenizer, prompts.dataset, "movies")
    with pytest.raises(ValueError, match=r"expected 1 place for z in each prompt, got \[0, 0, 0, 0, 0\]"):
        made(prompts).embed(plain.collate(examples, [STANDARD] * 5))
    with pytest.raises(ValueError, match="expected 0 place for z"):
        made(prompts, RecommenderConfig()).embed(prompts.collate(examples, [STANDARD] * 5))


def test_the_projector_of_z_is_trained_saved_and_read(prompts, films, tmp_path):
    model = made(prompts)
    before = deepcopy(model.user_projector.state_dict())
    settings = TrainingSettings(steps=3, lr=1e-2, batch_size=2, effective_batch=4)
    grouped = {id(p) for group in parameter_groups(model, settings) for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == grouped
    train(model, prompts, split(films).train, settings, tmp_path / "run")
    after = model.user_projector.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    torch.manual_seed(3)
    other = load(model.save(tmp_path / "kept"), tiny_lm(prompts.tokenizer, 32, 2, 2))
    for name, tensor in after.items():
        assert torch.equal(other.user_projector.state_dict()[name], tensor)
    restored = made(prompts).restore(tmp_path / "kept")
    assert torch.equal(restored.user_projector[0].weight, after["0.weight"])


def test_the_output_embeddings_get_contiguous_columns(prompts, examples):
    model, seen = made(prompts), []
    model.lm.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**prompts.collate(examples, [STANDARD] * 5))
    assert seen[0].shape[1] < 20
    assert seen[0].is_contiguous()


@pytest.mark.parametrize("gate", ["uniform", "sequence"])
def test_the_cheap_step_agrees_with_autocast(films, gate):
    """Same batch, same adapters: a frozen model in bfloat16, shared inputs, one batch; and autocast over float32."""
    prompts = Prompts(tiny_tokenizer(films, "movies"), films, "movies")
    examples = with_candidates(split(films).train[:6], films)
    model = made(prompts, RecommenderConfig(gate=gate, num_experts=1 if gate == "uniform" else 4, lora_dropout=0.0))
    cheap = deepcopy(model)
    for module in cheap.lm.modules():  # all that is frozen
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.bfloat16(), requires_grad=False))
    ilora.share_inputs(cheap.lm)
    batch = prompts.collate(examples, [Choice(0, True)] * 6)
    with torch.no_grad():
        exact, now = model(**batch), cheap(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            present = model(**batch)
    limit = 2 * float((present.logits.float() - exact.logits).norm())
    assert limit > 0
    assert float((now.logits.float() - exact.logits).norm()) < limit
    torch.testing.assert_close(now.loss, present.loss, rtol=0.02, atol=0.0)
    assert {p.dtype for p in cheap.parameters() if p.requires_grad} == {torch.float32}
