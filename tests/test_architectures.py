"""Other makes of models: fused projections, state spaces, images, sound; and layers that are read, not called."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from models import SMALL, TOKENS, E, gates, randomised
from torch import nn

import ilora

N = 3
IDS = torch.randint(3, 60, (N, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(1))
VISION = {**SMALL, "image_size": 16, "patch_size": 8}


def phi3():
    return hf.Phi3ForCausalLM(hf.Phi3Config(**TOKENS, **SMALL, num_key_value_heads=2)), {"input_ids": IDS}


def bloom():
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=61, **sizes)), {"input_ids": IDS}


def mamba():
    config = hf.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)
    return hf.MambaForCausalLM(config), {"input_ids": IDS}


def deepseek_v3():
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = {"num_key_value_heads": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    config = hf.DeepseekV3Config(**TOKENS, **SMALL, **experts, **latent, **sizes)
    return hf.DeepseekV3ForCausalLM(config), {"input_ids": IDS}


def gpt_oss():
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**TOKENS, **SMALL, **sizes)), {"input_ids": IDS}


def llama4():  # its routers are linear layers that return two tensors
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = hf.Llama4TextConfig(**TOKENS, **SMALL, **sizes, interleave_moe_layer_step=1)
    return hf.Llama4ForCausalLM(config), {"input_ids": IDS}


def phimoe():
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.PhimoeForCausalLM(hf.PhimoeConfig(**TOKENS, **SMALL, **sizes)), {"input_ids": IDS}


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION)), {"pixel_values": IMAGES}


def whisper():
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
    rest = {"max_source_positions": 10, "decoder_start_token_id": 1, "dropout": 0.0}
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**TOKENS, **sides, **heads, **rest))
    sound = torch.randn(N, 8, 20, generator=torch.Generator().manual_seed(2))
    return model, {"input_features": sound, "decoder_input_ids": IDS}


def llava():
    text, vision = hf.LlamaConfig(**TOKENS, **SMALL, num_key_value_heads=2), hf.CLIPVisionConfig(**VISION)
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=60, vision_feature_layer=-1)
    ids = torch.cat([torch.full((N, 4), 60), IDS.clamp(max=59)], 1)
    return hf.LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": IMAGES}


@pytest.mark.parametrize(
    "make", [phi3, bloom, mamba, deepseek_v3, gpt_oss, llama4, phimoe, vit, whisper, llava], ids=lambda f: f.__name__
)
def test_each_instance_is_as_if_alone_and_every_layer_learns(make):
    torch.manual_seed(0)
    model, batch = make()
    excluded = ("dt_proj",) if make is mamba else ()
    model = randomised(ilora.inject(model.eval(), ilora.ILoRAConfig(num_experts=E, exclude_modules=excluded)))
    gate, others = gates(N), gates(N, seed=1)
    logits = model(**batch, ilora_gate=gate).logits
    assert (logits - model(**batch, ilora_gate=others).logits).abs().max() > 1e-3
    for i in range(N):
        alone = model(**{key: value[i : i + 1] for key, value in batch.items()}, ilora_gate=gate[i : i + 1]).logits
        torch.testing.assert_close(alone, logits[i : i + 1], atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_state_space_reads_a_projection_which_is_refused_by_name():
    model, batch = mamba()
    ilora.inject(model, ilora.ILoRAConfig(num_experts=E))
    with pytest.raises(RuntimeError, match=r"mixer\.dt_proj: the model reads.*exclude_modules=\['dt_proj'\]"):
        model(**batch, ilora_gate=gates(N))
    with ilora.disable_adapter(model):
        assert model(**batch).logits.isfinite().all()
    ilora.merge(model.eval(), gates(1)[0])  # what is read has the update in it then
    assert model(**batch).logits.isfinite().all()


class Reader(nn.Module):
    """how: "dtype" reads a weight's type before and after the call, "head" computes with it and does not call."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x.to(self.first.weight.dtype))
        if self.how == "head":
            return F.linear(x, self.head.weight)
        return self.head(x).to(self.head.weight.dtype)


def test_only_weights_that_are_read_instead_of_called_are_refused():
    x, gate = torch.randn(4, 3, 6), torch.rand(4, 2)
    config = ilora.ILoRAConfig(r=4, num_experts=2)
    assert ilora.inject(Reader("dtype"), config)(x, ilora_gate=gate).shape == (4, 3, 5)
    model = ilora.inject(Reader("head"), config)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^head: the model reads.*\(1 such\)"):
            model(x, ilora_gate=gate)
    model.how = "dtype"
    assert model(x, ilora_gate=gate).isfinite().all()
    model.how = "head"  # it was called in the forward before, which does not count
    with pytest.raises(RuntimeError, match="^head"):
        model(x, ilora_gate=gate)


def test_a_forward_put_in_front_that_reads_the_head_is_refused():
    model = ilora.inject(Reader("dtype"), ilora.ILoRAConfig(r=4, num_experts=2))
    model.forward = lambda x, **kwargs: F.linear(model.first(x), model.head.weight)
    with pytest.raises(RuntimeError, match="^head: the model reads"):
        model(torch.randn(4, 3, 6), ilora_gate=torch.rand(4, 2))
