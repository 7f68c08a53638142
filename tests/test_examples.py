"""The text example, on a tiny random Llama with a tokenizer made for the occasion."""

import re

import pytest
import smollm2_text as example
import torch

import ilora

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal language model with its tokenizer, as from_pretrained wants them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(re.findall(r"\w+|[^\w\s]+", (example.ROOT / "README.md").read_text())))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(vocabulary), **sizes, bos_token_id=None, eos_token_id=0)
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def test_it_trains_generates_and_saves(folder, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    example.main([f"--model={folder}", "--steps=30", "--length=32", "--prompt=the gate", f"--output={adapter}"])
    shown = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", shown)]
    assert losses[-1] < losses[0]
    continuations = re.findall(r"^(before: |after:  )['\"]the gate\b", shown, re.MULTILINE)  # repr chooses the quote
    assert continuations == ["before: ", "after:  "]
    assert "gate of 1 instances, 4 experts" in shown
    model, tokenizer = example.load(folder)
    ilora.load_adapter(model.eval(), adapter)
    inputs = tokenizer("the gate", return_tensors="pt")
    output = tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0])
    assert f"after:  {output!r}" in shown


def test_pieces_hide_their_prompt_and_a_short_text_is_refused(folder):
    _, tokenizer = example.load(folder)
    pieces = example.examples("the gate " * 10, tokenizer, length=8, prompt=3)
    assert len(pieces) == 2
    assert pieces[0]["labels"][:3] == [-100] * 3
    assert pieces[0]["labels"][3:] == pieces[0]["input_ids"][3:]
    with pytest.raises(ValueError, match="2 tokens, too few for one piece of 8"):
        example.examples("the gate", tokenizer, length=8, prompt=3)


def test_a_text_is_read_before_the_model(folder, tmp_path, monkeypatch):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("the gate")
    binary.write_bytes(b"\xff\xfe")
    monkeypatch.setattr(example, "load_model", lambda model: pytest.fail("the model was loaded"))
    for text, words in ((tmp_path / "none", "No such file"), (short, "2 tokens, too few"), (binary, "codec")):
        with pytest.raises(SystemExit, match=f"--text {text}: .*{words}"):
            example.main([f"--model={folder}", f"--text={text}"])
    with pytest.raises(SystemExit, match=f"--model {tmp_path}: "):
        example.main([f"--model={tmp_path}"])
