"""Tokens added to the base before inject: their embeddings are saved, and loading looks at the vocabulary."""

import json

import pytest
import torch
from models import E, gates
from saved_cases import assert_same_state, assert_untouched, bits, randomise

import ilora
from ilora import AdapterError, ILoRAConfig

hf = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 1}
OLD, NEW = 61, 70
KINDS = {  # name: (class, settings, the embeddings that are saved)
    "llama": ("LlamaForCausalLM", SIZES, ["model.embed_tokens.weight", "lm_head.weight"]),
    "tied": ("LlamaForCausalLM", {**SIZES, "tie_word_embeddings": True}, ["model.embed_tokens.weight"]),
    "gpt2": ("GPT2LMHeadModel", GPT2, ["transformer.wte.weight"]),
    "biased head": ("PhiForCausalLM", SIZES, ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"]),
    "t5": ("T5ForConditionalGeneration", T5, ["shared.weight"]),
    "classifier": ("BertForSequenceClassification", SIZES, ["bert.embeddings.word_embeddings.weight"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for kind, (name, settings, _) in KINDS.items():
        torch.manual_seed(0)
        config = getattr(hf, name).config_class(**settings, vocab_size=OLD, pad_token_id=0)
        getattr(hf, name)(config).save_pretrained(folder / kind)
    return folder


def resized(bases, kind="llama", rows=NEW, seed=1):
    """The base with tokens added, whose embeddings are random: another seed, other values."""
    torch.manual_seed(seed)
    model = getattr(hf, KINDS[kind][0]).from_pretrained(bases / kind).eval()
    if rows != OLD:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embeddings is not None:
                torch.nn.init.normal_(embeddings.weight.data[OLD:])
    return model


def adapted(model, **config):
    return randomise(ilora.inject(model, ILoRAConfig(num_experts=E, **config))).eval()


@torch.no_grad()
def logits(model, **options):
    ids = torch.tensor([[3, OLD, OLD + 4, 5, NEW - 1], [6, 7, 8, 9, 10]])
    more = {"labels": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more, **options).logits


@pytest.mark.parametrize("way", ["save_adapter", "save_pretrained"])
@pytest.mark.parametrize("kind", KINDS)
def test_save_resize_load_and_merge_keep_every_bit(tmp_path, bases, kind, way):
    model, gate = adapted(resized(bases, kind)), gates(2)
    path = tmp_path / "a"
    ilora.save_adapter(model, path) if way == "save_adapter" else model.save_pretrained(path)
    saved = json.loads((path / "ilora_config.json").read_text())["vocabulary"]
    assert saved == {"rows": NEW, "embeddings": KINDS[kind][2]}
    again = ilora.load_adapter(resized(bases, kind, seed=2), path).eval()
    assert_same_state(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again, ilora_gate=gate), logits(model, ilora_gate=gate))
    merged = [logits(ilora.merge(each, gate[0])) for each in (again, model)]
    assert torch.equal(*merged)
    ilora.unmerge(again)
    assert torch.equal(logits(again, ilora_gate=gate), logits(ilora.unmerge(model), ilora_gate=gate))
    final = ilora.eject(ilora.merge(again, gate[0], keep_base=False))
    assert torch.equal(logits(final), merged[0])
    final.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(type(final).from_pretrained(tmp_path / "whole").eval()), merged[0])


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_new_rows_alone_are_trained_and_saved(tmp_path, bases, kind):
    """The how-to's way: gradients of the old rows are set to zero, and AdamW decays nothing."""
    model = adapted(resized(bases, kind)).train()
    weights = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True).register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:OLD]), grad[OLD:]]))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.0)
    ids = torch.tensor([[3, OLD, OLD + 4, 5, NEW - 1], [6, 7, 8, 9, OLD + 1]])
    for _ in range(3):
        model(input_ids=ids, labels=ids, ilora_gate=gates(2)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight[:OLD], old[:OLD])
        assert not torch.equal(weight[OLD:], old[OLD:])
    path = ilora.save_adapter(model.eval(), tmp_path / "a")
    again = ilora.load_adapter(resized(bases, kind, seed=2), path).eval()
    assert torch.equal(logits(again, ilora_gate=gates(2)), logits(model, ilora_gate=gates(2)))


@pytest.mark.parametrize("rows", [NEW, 64, 50])
def test_more_and_fewer_rows_are_resized_ones(tmp_path, bases, rows):
    model = adapted(resized(bases, rows=rows))
    again = ilora.load_adapter(resized(bases, rows=rows, seed=2), ilora.save_adapter(model, tmp_path / "a"))
    assert_same_state(again.state_dict(), model.state_dict())


def test_a_base_that_is_as_it_was_saves_none(tmp_path, bases):
    ilora.save_adapter(adapted(resized(bases, rows=OLD)), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "ilora_config.json").read_text())["vocabulary"] == {
        "rows": OLD,
        "embeddings": [],
    }
    whole = resized(bases)
    whole.save_pretrained(tmp_path / "base")  # the new tokens are the checkpoint's own now
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ilora.save_adapter(adapted(again), tmp_path / "b")
    for name in "ab":
        names = safetensors.load_file(tmp_path / name / "adapter_model.safetensors")
        assert all("lora" in key for key in names)


@pytest.mark.parametrize("rows", [OLD, 64, 80])
def test_another_vocabulary_is_refused(tmp_path, bases, rows):
    ilora.save_adapter(adapted(resized(bases)), tmp_path / "a")
    plain = ilora.save_adapter(adapted(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, vocab_size=NEW))), tmp_path / "b")
    model = resized(bases, rows=rows)
    before = bits(model)
    for path in (tmp_path / "a", plain):
        with pytest.raises(AdapterError, match=rf"base of 70 embeddings, this one has {rows}; model\.resize_token_emb"):
            ilora.load_adapter(model, path)
        assert_untouched(model, before)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    ilora.load_adapter(model, plain).resize_token_embeddings(80, mean_resizing=False)


def test_embeddings_tied_otherwise_are_refused(tmp_path, bases):
    path = ilora.save_adapter(adapted(resized(bases)), tmp_path / "a")
    with pytest.raises(AdapterError, match=r"expected embeddings .*'lm_head\.weight', the model has 'model\.embed"):
        ilora.load_adapter(resized(bases, "tied"), path)


@pytest.mark.parametrize(
    ("kind", "config", "names"),
    [
        ("llama", {"modules_to_save": ["embed_tokens"]}, ["lm_head.weight"]),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, []),
        (
            "llama",
            {"target_modules": ["q_proj", "lm_head"]},
            ["model.embed_tokens.weight", "lm_head.base_layer.weight"],
        ),
        ("tied", {"modules_to_save": ["embed_tokens"]}, ["lm_head.weight"]),
        ("tied", {"modules_to_save": ["lm_head"]}, ["model.embed_tokens.weight"]),
    ],
)
def test_embeddings_that_are_trained_or_adapted(tmp_path, bases, kind, config, names):
    model = adapted(resized(bases, kind), **config)
    path = ilora.save_adapter(model, tmp_path / "a")
    assert json.loads((path / "ilora_config.json").read_text())["vocabulary"]["embeddings"] == names
    again = ilora.load_adapter(resized(bases, kind, seed=2), path)
    assert_same_state(again.state_dict(), model.state_dict())
    flags = ({key: p.requires_grad for key, p in each.named_parameters()} for each in (again, model))
    assert next(flags) == next(flags)


def test_several_adapters_share_the_embeddings(tmp_path, bases):
    model = adapted(resized(bases))
    one = ilora.save_adapter(model, tmp_path / "one")
    ilora.add_adapter(model, "two", ILoRAConfig(num_experts=E, modules_to_save=["embed_tokens"]))
    randomise(model)
    two = ilora.save_adapter(model, tmp_path / "two", name="two")
    kept = ilora.save_adapter(
        model, tmp_path / "kept", name="default"
    )  # the embeddings of the base, not those of "two"
    assert_same_state(*(safetensors.load_file(path / "adapter_model.safetensors") for path in (kept, one)))
    again = ilora.load_adapter(resized(bases, seed=2), one)
    ilora.load_adapter(again, one)  # in place
    ilora.load_adapter(again, two, name="two")
    assert torch.equal(logits(again, ilora_gate=gates(2)), logits(model, ilora_gate=gates(2)))
    stranger = ilora.save_adapter(adapted(resized(bases, seed=3)), tmp_path / "stranger")
    before = bits(again)
    with pytest.raises(AdapterError, match="which its other adapters use too, are not the same"):
        ilora.load_adapter(again, stranger, name="three")
    assert_untouched(again, before)
    ilora.load_adapter(ilora.load_adapter(resized(bases, seed=2), one), stranger)  # the only one: another save of it


def test_a_checkpoint_of_the_trainer_has_them_too(tmp_path, bases):
    model = adapted(resized(bases))
    model.save_pretrained(tmp_path / "a")
    again = adapted(resized(bases, seed=2))
    result = again.load_state_dict(safetensors.load_file(tmp_path / "a" / "model.safetensors"), strict=False)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same_state(again.state_dict(), model.state_dict())


def test_peft_reads_them(tmp_path, bases):
    peft = pytest.importorskip("peft")
    model = adapted(resized(bases))
    gate = gates(1)
    paths = [ilora.save_adapter(model, tmp_path / "a"), ilora.to_peft(model, gate, tmp_path / "b")]
    for path, own in zip(paths, (torch.full((1, E), 1 / E), gate), strict=True):
        live = peft.PeftModel.from_pretrained(resized(bases, seed=2), path).eval()
        torch.testing.assert_close(logits(live), logits(model, ilora_gate=own), rtol=1e-5, atol=1e-5)


def test_a_base_that_is_gone_is_told(tmp_path, bases):
    model = adapted(resized(bases))
    model.config._name_or_path = str(tmp_path / "gone")
    with pytest.warns(
        UserWarning, match="cannot be read any more, so nothing tells whether the vocabulary was resized"
    ):
        ilora.save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize(
    "value",
    [{}, {"rows": "70", "embeddings": []}, {"rows": NEW, "embeddings": [1]}, {"rows": NEW, "embeddings": [], "x": 1}],
)
def test_a_damaged_entry_is_refused(tmp_path, bases, value):
    path = ilora.save_adapter(adapted(resized(bases)), tmp_path / "a")
    fields = json.loads((path / "ilora_config.json").read_text())
    (path / "ilora_config.json").write_text(json.dumps({**fields, "vocabulary": value}))
    with pytest.raises(AdapterError, match="vocabulary: expected its rows and the names of embeddings"):
        ilora.load_adapter(resized(bases), path, verify=False)
    del fields["vocabulary"]["embeddings"][0]
    (path / "ilora_config.json").write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match=r"expected embeddings 'lm_head\.weight', the model has"):
        ilora.load_adapter(resized(bases), path, verify=False)
