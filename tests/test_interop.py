"""PEFT reads what is saved here, and what PEFT trained comes in and goes out again: with the same outputs."""

import copy
from collections import OrderedDict

import pytest
import torch
from saved_cases import MODELS, adapted, assert_untouched, bert, bits, close, llama, logits, strictly, uniform
from torch import nn

import ilora
from ilora import AdapterError, PromptGate

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CONFIGS = {
    "plain": {},
    "patterns": {
        "rank_pattern": {"q_proj|c_attn": 16, "down_proj|c_fc": 4},
        "alpha_pattern": {r"1\.mlp\.(up_proj|c_proj)": 7.5, r"0\.(self_)?attn\.(q_proj|c_attn)": 3},
    },
    "experts": {"expert_pattern": {"k_proj|c_proj": 2}, "lora_alpha": 10},
    "saved": {"modules_to_save": ("lm_head",), "layers_to_transform": (1,)},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", MODELS)
def test_peft_loads_the_directory_as_the_uniform_gate(tmp_path, family, config):
    model = adapted(MODELS[family](), PromptGate(4), **CONFIGS[config])
    path = ilora.save_adapter(model, tmp_path / "a")
    loaded = strictly(lambda: peft.PeftModel.from_pretrained(MODELS[family](), str(path)))
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert sum(value.numel() for value in state.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    ) - (model.ilora_gate.weight.numel())
    close(logits(loaded), logits(model, ilora_gate=uniform()))


@pytest.mark.parametrize("saved", [(), ("classifier",)])
def test_peft_loads_a_classifier(tmp_path, saved):
    model = adapted(bert(), modules_to_save=saved, exclude_modules=("classifier",))
    path = ilora.save_adapter(model, tmp_path)
    loaded = strictly(lambda: peft.PeftModel.from_pretrained(bert(), str(path)))
    close(logits(loaded), logits(model, ilora_gate=uniform()))


class Named(nn.Module):
    """A module called fc in a module called fc, and one with a name that a regular expression would read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.fc, self.blk = nn.Linear(8, 8), nn.Module()
        self.blk.fc = nn.Sequential(nn.Linear(8, 8))
        self.blk.add_module("a(b", nn.Linear(8, 8))

    def forward(self, x):
        return getattr(self.blk, "a(b")(self.blk.fc(self.fc(x)))


def test_names_that_mean_several_modules(tmp_path):
    gate = nn.Sequential(OrderedDict(fc=nn.Linear(3, 4)))  # its names are not the model's
    patterns = {"rank_pattern": {r"blk\.a\(b": 4}, "alpha_pattern": {"^fc": 3}}
    model = adapted(Named(), gate, target_modules=r"fc|blk\.a\(b", **patterns)
    assert ilora.targets(model) == ("fc", "blk.a(b")
    x = torch.randn(3, 8)
    path = ilora.save_adapter(model, tmp_path / "a")
    again = ilora.load_adapter(Named(), path, gate=copy.deepcopy(gate))
    assert torch.equal(again(x, ilora_gate=uniform()), model(x, ilora_gate=uniform()))
    loaded = strictly(lambda: peft.PeftModel.from_pretrained(Named(), str(path)))
    close(loaded(x), model(x, ilora_gate=uniform()))
    loaded.save_pretrained(str(tmp_path / "b"))
    for source, base in ((tmp_path / "b", Named()), (loaded, None)):
        back = ilora.from_peft(source, 2, model=base)
        assert ilora.targets(back) == ilora.targets(model)
        close(back(x, ilora_gate=uniform(2)), model(x, ilora_gate=uniform()))


def test_a_task_of_peft_is_named_only_where_its_class_fits(tmp_path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    class OwnForCausalLM(nn.Sequential): ...

    def whisper():
        torch.manual_seed(0)
        sizes = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        sizes |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_source_positions": 8, "max_target_positions": 8}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        return WhisperForConditionalGeneration(
            WhisperConfig(vocab_size=20, num_mel_bins=4, d_model=8, **sizes, **tokens)
        ).eval()

    inputs = {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": torch.tensor([[1, 5], [1, 6]])}
    model = adapted(whisper(), target_modules=("q_proj",))
    loaded = peft.PeftModel.from_pretrained(whisper(), str(ilora.save_adapter(model, tmp_path / "a")))
    close(loaded(**inputs).logits, model(**inputs, ilora_gate=uniform()).logits)
    own = adapted(OwnForCausalLM(nn.Linear(8, 8)))
    path = ilora.save_adapter(own, tmp_path / "b")
    close(peft.PeftModel.from_pretrained(OwnForCausalLM(own[0].base_layer), str(path))(torch.ones(1, 8)),
          own(torch.ones(1, 8), ilora_gate=uniform()))  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", MODELS)
def test_to_peft_computes_what_the_gated_model_computes(tmp_path, family, config):
    model = adapted(MODELS[family]().double(), PromptGate(4, per_layer=True), **CONFIGS[config])
    model.ilora_gate.double()
    blocks = len(model.ilora.adapter.blocks)
    for i, gate in enumerate((torch.rand(4).double(), torch.rand(1, 4), torch.rand(blocks, 1, 4))):
        want = logits(model, ilora_gate=gate.reshape(*gate.shape[:-2], 1, 4))
        path = ilora.to_peft(model, gate, tmp_path / str(i))
        loaded = strictly(lambda path=path: peft.PeftModel.from_pretrained(MODELS[family]().double(), str(path)))
        close(logits(loaded) * 1e3, want * 1e3)
    live = strictly(lambda: peft.PeftModel.from_pretrained(ilora.eject(model), str(path)))
    assert isinstance(live, peft.PeftModel)
    assert not live.training
    close(logits(live) * 1e3, want * 1e3)


REFUSED = {  # message: (error, gate)
    r"to_peft: expected one user's gate, \[4\] or .* got \[2, 4\]": (ValueError, torch.rand(2, 4)),
    "expected a float tensor, one user's gate, .*, got torch.int64": (TypeError, torch.ones(4).long()),
    "a float tensor, .*, got NoneType": (TypeError, None),
    "a: holds an iLoRA adapter.*choose another name": (AdapterError, torch.rand(4)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_to_peft_refuses(tmp_path, words):
    (error, gate), model = REFUSED[words], adapted(llama(layers=1))
    path = ilora.save_adapter(model, tmp_path / "a")
    before = bits(model)
    with pytest.raises(error, match=words):
        ilora.to_peft(model, gate, path)
    with pytest.raises(ValueError, match=r"expected a path to write to; .*PeftModel\.from_pretrained"):
        ilora.to_peft(model, torch.rand(4))
    assert_untouched(model, before)
    ilora.merge(model, torch.rand(4))
    with pytest.raises(ValueError, match="unmerge"):
        ilora.to_peft(model, torch.rand(4))
