"""A person's own data in all commands, what is refused before anything is trained, and what is written for later."""

import json
import random

import pytest
from sequential_recommendation import compare, recommend
from sequential_recommendation.data import Dataset
from sequential_recommendation.tiny_model import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

TEAS = [
    f"{kind} {name}" for kind in ("Green", "Black", "White") for name in ("Yún", "Assam", "Pekoe", "Sencha", "Ceylon")
]
LISTS = [random.Random(n).sample(range(15), 6) for n in range(30)]


@pytest.fixture(params=["interactions", "windows"])
def own(request, tmp_path):
    """(name of the format, folder of fifteen teas and thirty people)"""
    folder = tmp_path / "teas"
    folder.mkdir()
    (folder / "items.tsv").write_text("".join(f"{i}\t{title}\n" for i, title in enumerate(TEAS)), encoding="utf-8")
    if request.param == "interactions":
        lines = [f"p{n}\t{item}\t{time}\n" for n, items in enumerate(LISTS) for time, item in enumerate(items)]
        (folder / "interactions.tsv").write_text("".join(lines))
    else:
        for name, lists in (("train", LISTS[:20]), ("val", LISTS[20:25]), ("test", LISTS[25:])):
            lines = [f"{','.join(map(str, items[:t]))}\t{items[t]}\n" for items in lists for t in (3, 4, 5)]
            (folder / f"{name}.tsv").write_text("".join(lines))
    return request.param, folder


def brief(own, out, *more, model=None):
    data, folder = own
    more = (*more, f"--model={model}" if model else "--pretrain-steps=2")
    small = "--sequence-models sasrec --arms sequence --seed 0 --jobs 1 --batch-size 4 --effective-batch 4 "
    small += "--steps 2 --candidates 6 --lr 1e-3"
    return [f"--data={data}", f"--root={folder}", f"--out={out}", *small.split(), *more]


def test_own_data_are_compared_listed_and_recommended(own, tmp_path, capsys):
    out = tmp_path / "out"
    found = compare.main(brief(own, out))
    said = capsys.readouterr().out
    assert "teas: 30 users, 15 items, 180 interactions" in said or "teas: 50 users" in said
    (result,) = found["iLoRA, E=4, sequence gate"]
    (table,) = out.rglob("predictions.tsv")
    head, *lines = (line.split("\t") for line in table.read_text(encoding="utf-8").splitlines())
    assert head == ["user", "target", "rank", "scores"]
    assert len(lines) == result["total"]
    assert [int(rank) for _, _, rank, _ in lines] == result["ranks"]
    for _, target, rank, scores in lines:
        scored = json.loads(scores)
        assert len(scored) == 6
        assert sum(value >= scored[target] for value in scored.values()) == int(rank)
    run = f"--run={out}"
    assert recommend.main([run, "--json", "green yun", "BLACK ASSAM", "white pekoe"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["history"] == ["Green Yún", "Black Assam", "White Pekoe"]
    assert (answer["scored"], answer["notes"]) == (6, [])
    assert recommend.main([run, "--list", "yun"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == ["Black Yún", "Green Yún", "White Yún"]
    assert recommend.main([run, "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == sorted(TEAS)
    with pytest.raises(SystemExit):
        recommend.main([run])
    assert "give one TITLE or more, or --list" in capsys.readouterr().err
    with pytest.raises(
        SystemExit, match=r"too few titles, 15, for a history of [35] and 20 candidates: give --candidates 1[02]"
    ):
        compare.main([*brief(own, out), "--candidates", "20"])


@pytest.fixture
def teas(tmp_path):
    (tmp_path / "teas").mkdir()
    (tmp_path / "teas" / "items.tsv").write_text(
        "".join(f"{i}\t{title}\n" for i, title in enumerate(TEAS)), encoding="utf-8"
    )
    lines = [f"p{n}\t{item}\t{time}\n" for n, items in enumerate(LISTS) for time, item in enumerate(items)]
    (tmp_path / "teas" / "interactions.tsv").write_text("".join(lines))
    return "interactions", tmp_path / "teas"


def test_a_rate_that_diverges_loses(teas, tmp_path, capsys):
    found = compare.main(brief(teas, tmp_path / "out", "--lr", "1e30", "1e-3"))
    assert [result["run"]["settings"]["lr"] for result in found["iLoRA, E=4, sequence gate"]] == [1e-3]
    assert "sequence gate, lr 1e+30, seed 0: " in capsys.readouterr().out
    for _ in range(2):  # the second time it is read
        with pytest.raises(SystemExit, match="iLoRA, E=4, sequence gate, lr 1e.30: .* try a lower learning rate"):
            compare.main(brief(teas, tmp_path / "out", "--lr", "1e30"))


def test_comparisons_of_several_settings_keep_their_tables(teas, tmp_path):
    out = tmp_path / "out"
    compare.main(brief(teas, out))
    first = {path: path.read_bytes() for path in out.rglob("results.*")}
    assert [path.parent.name.split("-")[:2] for path in first] == [["2", "steps"]] * 2
    compare.main(brief(teas, out, "--steps", "1"))
    assert {path: path.read_bytes() for path in first} == first
    assert len(list(out.rglob("results.md"))) == 2


def test_sequence_models_can_be_compared_by_themselves(teas, tmp_path, capsys):
    assert compare.main([*brief(teas, tmp_path / "out"), "--seed", "0", "1", "--arms"]) == {}
    assert "| SASRec | | | 0." in (said := capsys.readouterr().out)
    assert " ± " in said.split("| SASRec")[1]
    assert "tests, 2 seeds |" in said
    assert not list((tmp_path / "out").rglob("tiny-lm*"))


def saved(folder, model):
    tokenizer = tiny_tokenizer(Dataset("teas", TEAS, {}))
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model(sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gpt2(sizes):
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **sizes))


def llama(sizes):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **small, **sizes))


@pytest.mark.parametrize(
    ("model", "words"), [(gpt2, "has room for 64"), (llama, "has room for 64"), (None, "causal lang")]
)
def test_a_model_of_no_use_is_refused_before_anything_is_trained(teas, tmp_path, model, words):
    folder = tmp_path / "model"
    folder.mkdir()
    if model:
        saved(folder, model)
    with pytest.raises(SystemExit, match=words):
        compare.main(brief(teas, tmp_path / "out", model=folder))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_the_same_model_is_taken_where_there_is_room(teas, tmp_path):
    folder = saved(tmp_path / "model", gpt2)
    assert compare.main(brief(teas, tmp_path / "out", "--candidates", "3", "--text-only", model=folder))


def test_titles_too_long_for_the_tiny_model_are_refused_before_it_is_trained(teas, tmp_path):
    long = "".join(f"{i}\t{' '.join([title] * 120)}\n" for i, title in enumerate(TEAS))
    (teas[1] / "items.tsv").write_text(long, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"a prompt with 6 candidates may have 2\d\d\d tokens, .* has room for 2048"):
        compare.main(brief(teas, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("tiny-lm*"))
