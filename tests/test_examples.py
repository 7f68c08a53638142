"""The example's parts, on a tiny random Llama and text without a tokenizer's file."""

import copy
import random
from itertools import islice
from types import SimpleNamespace

import pytest
import smollm2_text as example
import torch

import ilora

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")


class Characters:
    """A tokenizer: one token a character."""

    pad_token_id, eos_token_id = None, 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [1 + ord(c) % 90 for c in text]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def texts(count):
    random.seed(0)
    histories = islice(example.invented_histories(), count)
    return [(f"{', '.join(played)}. Next:", f" {following}\n") for played, following in histories]


def batch_of(rows, side="right", length=48):
    return example.encode(Characters(), rows, length, side, CPU)


def test_training_lowers_the_loss_and_only_moves_adapters_and_gate(model, capsys):
    before = copy.deepcopy(model.state_dict())
    gate = example.add_ilora(model, 8, 4, 32.0, 0.05)
    learner = example.Learner(model, gate, lr=1e-2)
    gate_before = gate.linear.weight.detach().clone()
    history = example.train({"ilora": learner}, [batch_of(texts(4))] * 12)["ilora"]
    assert history[-1][0] < 0.95 * history[0][0]  # the head and all else is random and frozen
    assert not torch.equal(gate.linear.weight, gate_before)
    wrapped = [m for m in model.modules() if isinstance(m, ilora.ILoRALinear)]
    assert len(wrapped) == 2 * 7
    assert len(learner.trained) == 2 * len(wrapped) + 2
    after = model.state_dict()
    assert all(torch.equal(after[name if name in after else base_name(name)], value) for name, value in before.items())
    assert capsys.readouterr().out.count("loss ilora") == 12


def base_name(name):
    return name.replace(".weight", ".base_layer.weight")


def test_padding_side_does_not_change_loss_or_gate(model):
    learner = example.Learner(model, example.add_ilora(model, 8, 4, 32.0, 0.0), lr=1e-2)
    for module in model.modules():
        if isinstance(module, ilora.ILoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    left, right = (batch_of(texts(3), side, length=80) for side in ("left", "right"))
    torch.testing.assert_close(learner.gate(left), learner.gate(right))
    torch.testing.assert_close(learner.loss(left), learner.loss(right), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encode_keeps_the_end_of_the_prompt_and_labels_only_the_answer(side):
    batch = batch_of([("abcdefghij", "XY"), ("ab", "Z")], side, length=8)
    token = {c: 1 + ord(c) % 90 for c in "abcdefghijXYZ"}
    assert batch["input_ids"][0].tolist() == [token[c] for c in "efghijXY"]
    assert batch["labels"][0].tolist() == [-100] * 6 + [token["X"], token["Y"]]
    assert batch["prompt_mask"].sum(1).tolist() == [6, 2]
    assert batch["attention_mask"].sum(1).tolist() == [8, 3]
    assert batch["labels"][1].max() == token["Z"]


def test_it_has_as_many_parameters_as_peft_and_reports_both(model, capsys):
    pytest.importorskip("peft")
    options = SimpleNamespace(rank=8, alpha=32.0, dropout=0.05, lr=1e-2)
    peft = example.with_peft(copy.deepcopy(model), options)
    ours = example.Learner(model, example.add_ilora(model, 8, 4, 32.0, 0.05), lr=1e-2)
    sizes = [sum(p.numel() for p in learner.trained) for learner in (ours, peft)]
    assert sizes[0] - sizes[1] == 4 * 32 + 4  # the gate's
    learners, batch = {"ilora": ours, "peft": peft}, batch_of(texts(2))
    before = {name: learner.evaluate(batch) for name, learner in learners.items()}
    assert before["ilora"] == pytest.approx(before["peft"], rel=1e-5)  # both start as the frozen model
    example.report(learners, example.train(learners, [batch] * 2), before, batch)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["step", "step", "ilora", "peft"]
    assert f"held-out loss {before['ilora']:.4f} -> " in shown[2]


def test_histories_from_files(tmp_path):
    (tmp_path / "items.tsv").write_text("0\tCafé\n1\tB\n7\tC\n", encoding="utf-8")
    (tmp_path / "train.tsv").write_text("0,1\t7\n", encoding="utf-8")
    assert next(example.listening_histories(tmp_path)) == (["Café", "B"], "C")


def test_a_data_folder_that_lacks_its_files_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.parse([f"--data={tmp_path}"])
    assert "it has no items.tsv" in capsys.readouterr().err
