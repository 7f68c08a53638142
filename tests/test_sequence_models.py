"""SASRec, GRU4Rec and Caser: padding, batches, causality, files, training."""

import copy
import io
import pickle
import random
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from sequential_recommendation import sequence_training as training
from sequential_recommendation.data import Dataset, split, with_candidates
from sequential_recommendation.metrics import hit_ratio
from sequential_recommendation.sequence_models import (
    KINDS,
    Popularity,
    SequenceEncoder,
    build,
    load,
    pad_histories,
    save,
)
from sequential_recommendation.sequence_training import Settings, target_ranks, train_sequence_model
from torch import nn

ITEMS = 30


@pytest.fixture(params=list(KINDS))
def model(request):
    return build(request.param, ITEMS, seed=1, dropout=0.3).eval()


def histories(count=7):
    """Rows of 1 to 10 items."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(ITEMS, (1 + n % 10,), generator=generator).tolist() for n in range(3, 3 + count)]


HISTORY = pad_histories(histories(), ITEMS)


def test_padding_ids_are_never_items():
    assert pad_histories([[1], [0, 1, 0]], 2, 2).tolist() == [[1, 2], [1, 0]]
    assert pad_histories([], 5).shape == (0, 10)


def padded(row, before, behind):
    return torch.tensor([[ITEMS] * before + row + [ITEMS] * behind])


def test_z_depends_on_the_last_ten_items_and_their_order_alone(model):
    long = torch.randperm(ITEMS)[:14].tolist()
    for row in (long, *histories()):
        z = model.represent(pad_histories([row], ITEMS))
        for before, behind in ((0, 0), (3, 0), (0, 12), (5, 6)):
            assert torch.equal(model.represent(padded(row, before, behind)), z)
            assert torch.equal(model.represent(padded(row[-10:], before, behind)), z)
    assert not torch.allclose(model.represent(padded([3, 1, 2], 0, 0)), model.represent(padded([3, 2, 1], 0, 0)))


def test_z_does_not_depend_on_the_other_rows(model):
    rows = histories(20)
    together = model.represent(pad_histories(rows, ITEMS))
    assert together.shape == (20, 64)
    alone = torch.cat([model.represent(pad_histories([row], ITEMS)) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.represent(pad_histories(rows[::-1], ITEMS)).flip(0), together)


def test_scores_are_products_with_the_item_embeddings(model):
    z = model.represent(HISTORY)
    assert torch.equal(model(HISTORY), model.scores(z))
    assert model(HISTORY).shape == (7, ITEMS)  # the padding has no score
    torch.testing.assert_close(model(HISTORY)[2, 5], z[2] @ model.items.weight[5])
    assert not model.items.weight[ITEMS].any()


def test_sasrec_is_causal():
    model = build("sasrec", ITEMS).eval()
    row, lengths = torch.arange(10)[None], torch.tensor([10])
    before = model.states(row, lengths)
    for t in range(10):
        changed = row.clone()
        changed[0, t] = ITEMS - 1
        moved = (model.states(changed, lengths) != before).any(-1)[0]
        assert moved.tolist() == [False] * t + [True] * (10 - t)


def test_the_seed_alone_decides_a_fresh_model():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build("sasrec", ITEMS, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = build("sasrec", ITEMS, seed=3), build("sasrec", ITEMS, seed=4)
    assert torch.equal(first.items.weight, again.items.weight)
    assert not torch.equal(first.items.weight, other.items.weight)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("bert4rec", ITEMS), "unknown sequence model 'bert4rec': expected one of sasrec, gru4rec, caser"),
        (lambda: build("sasrec", ITEMS, heads=5), "heads that divide 64"),
        (lambda: build("caser", 0), "num_items=0"),
        (lambda: train_sequence_model(build("sasrec", ITEMS), [], []), "0 windows"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_histories_that_are_none_are_refused(model):
    for history, words in [
        (torch.full((1, 4), ITEMS), "a row holds no item"),
        (torch.zeros(0, 3), r"expected int64 \[N, L\], got torch.float32"),
        (torch.zeros(3, dtype=torch.long), r"expected int64 \[N, L\], got torch.int64 \[3\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            model.represent(history)


def test_a_saved_model_comes_back_bit_for_bit_frozen_and_in_eval_mode(model, tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    save(model, path)
    again = load(path)
    assert type(again) is type(model)
    assert again.config == model.config
    assert not any(module.training for module in again.modules())
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(again(HISTORY), model(HISTORY))
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(build("gru4rec", ITEMS), path)
    before = path.read_bytes()

    def fail(file, content):
        file.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        save(build("sasrec", ITEMS), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_model_are_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(path)
    save(build("caser", ITEMS), path)
    content, without_settings = path.read_bytes(), safetensors.torch.save(load_file(path))
    for wrong in (content[: len(content) // 2], pickle.dumps({"weights": 1}), b"", without_settings):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"model\.safetensors: expected a saved sequence model"):
            load(path)


def test_the_encoder_stays_in_eval_mode_and_without_gradients(model):
    """The published frozen SASRec ran with dropout, and so gave another z each time."""
    parent = nn.ModuleDict({"encoder": SequenceEncoder(model.train()), "head": nn.Linear(64, 1)})
    encoder = parent["encoder"]
    expected = encoder(HISTORY)
    parent.train()
    assert parent["head"].training
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder(HISTORY), expected)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    parent.requires_grad_(True)
    parent["head"](encoder(HISTORY)).sum().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(copy.deepcopy(parent).train()["encoder"](HISTORY), expected)
    assert torch.equal(encoder.item_embeddings(), model.items.weight[:ITEMS])


@pytest.fixture(scope="module")
def made_up():
    draw = random.Random(0)
    users = {}  # they go round a ring of items, each with a stride of 1, 2, 4 or 7, which the history shows
    for user in range(600):
        start, stride = draw.randrange(31), (1, 2, 4, 7)[user % 4]
        users[f"u{user}"] = [(start + step * stride) % 31 for step in range(draw.randint(6, 9))]
    dataset = Dataset("ring", [f"item {n}" for n in range(31)], users)
    parts = split(dataset, protocol="leave-one-out")
    return dataset, parts, *(with_candidates(part, dataset) for part in parts[1:])


def test_sasrec_finds_the_rule_of_each_user(made_up):
    dataset, parts, val, test = made_up
    model = build("sasrec", dataset.num_items, blocks=1, dropout=0.1)
    record = train_sequence_model(model, parts.train, val, Settings(epochs=12, batch_size=128, lr=3e-3))
    assert record[-1].loss < 0.7 * record[0].loss
    assert hit_ratio(target_ranks(Popularity(dataset.num_items, parts.train).eval(), test)).interval()[1] < 0.3
    rank = target_ranks(model, test)
    assert hit_ratio(rank).interval()[0] > 0.8  # knowing the last item but not the group gives about 0.4
    assert torch.equal(target_ranks(model, test, batch_size=7), rank)
    assert (target_ranks(model, test, whole=True) >= rank).all()  # against all items that are not in the history
    assert len(rank) == len(test) == 600  # 600 = 85 * 7 + 5: the last, smaller batch counts too


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_learns_repeatably_and_is_frozen_after(kind, made_up):
    dataset, parts, val, _ = made_up
    weights = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = build(kind, dataset.num_items)
        state = torch.get_rng_state()
        record = train_sequence_model(model, parts.train[:600], val[:50], Settings(epochs=3, lr=3e-3), seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        assert record[-1].loss < record[0].loss
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_keeps_the_best_epoch_and_stops_after_it(made_up, monkeypatch):
    dataset, parts, val, _ = made_up
    seen, quality = [], iter([0.2, 0.5, 0.4, 0.5, 0.3, 0.9])
    model = build("caser", dataset.num_items)

    def watched(rank, k):
        seen.append(copy.deepcopy(model.state_dict()))
        return next(quality)

    monkeypatch.setattr(training, "ndcg", watched)
    record = train_sequence_model(model, parts.train[:200], val[:5], Settings(epochs=9, patience=3))
    assert [epoch.ndcg for epoch in record] == [0.2, 0.5, 0.4, 0.5, 0.3]
    assert all(torch.equal(value, seen[1][name]) for name, value in model.state_dict().items())
    assert not torch.equal(seen[1]["items.weight"], seen[4]["items.weight"])


def test_training_to_infinity_is_refused(made_up):
    dataset, parts, val, _ = made_up
    with pytest.raises(FloatingPointError, match="try a lower learning rate"):
        train_sequence_model(build("gru4rec", dataset.num_items), parts.train, val, Settings(lr=1e30))


def test_a_terminal_sees_how_long_it_will_take(made_up, monkeypatch, capsys):
    dataset, parts, val, _ = made_up
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    for stream, silent in ((terminal, False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        train_sequence_model(build("caser", dataset.num_items), parts.train, val, Settings(epochs=2))
        assert (stream.getvalue() == "") == silent
    assert "Caser, epochs (2 at most)" in terminal.getvalue()
    assert "/2 [" in terminal.getvalue()
