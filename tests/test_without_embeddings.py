"""Models that name no input embeddings: vision and sound take a gate network like any other."""

import pytest
import torch
from models import gates, randomised
from test_task_heads import AUDIO, IMAGE, SMALL, STAGES
from training_worker import assert_same

import ilora
from ilora import ILoRAConfig, PromptGate, SequenceGate, UniformGate

hf = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


def wav2vec2():
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**AUDIO)), {"input_values": torch.randn(2, 64)}


def clip():
    model = hf.CLIPModel(hf.CLIPConfig(text_config=SMALL | {"max_position_embeddings": 8}, vision_config=IMAGE))
    return model, {"input_ids": torch.randint(3, 20, (2, 5)), "pixel_values": torch.randn(2, 3, 8, 8)}


def segformer():
    model = hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**STAGES, decoder_hidden_size=8))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def detr():
    backbone = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 12))}
    sizes |= {"d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 3}
    config = hf.DetrConfig(backbone_config=backbone, use_timm_backbone=False, backbone=None, **sizes)
    return hf.DetrForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def first(output):
    return next(t for t in output.to_tuple() if torch.is_tensor(t) and t.is_floating_point() and t.dim() > 0)


@pytest.mark.parametrize("gate", [lambda: SequenceGate(5, 4), lambda: UniformGate(4)], ids=["sequence", "uniform"])
@pytest.mark.parametrize("make", [wav2vec2, clip, segformer, detr])
def test_a_gate_network_is_injected_saved_and_loaded(tmp_path, make, gate):
    torch.manual_seed(0)
    model, inputs = make()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    config = ILoRAConfig(r=8, num_experts=4, target_modules=r".*(q_proj|v_proj|out_proj|fc1)")
    randomised(ilora.inject(model.eval(), config, gate=gate()))
    extra = {"ilora_z": torch.randn(2, 5)} if isinstance(model.ilora_gate, SequenceGate) else {}
    with torch.no_grad():
        want = first(model(**inputs, **extra))
        assert torch.equal(want, first(model(**inputs, ilora_gate=model.ilora.state.last)))
        assert not torch.equal(want, first(model(**inputs, ilora_gate=gates(2))))
        ilora.save_adapter(model, tmp_path)
        again = make()[0].eval()
        again.load_state_dict(base)
        assert torch.equal(first(ilora.load_adapter(again, tmp_path)(**inputs, **extra)), want)
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("make", [wav2vec2, segformer])
def test_prompt_gate_says_what_it_needs(make):
    model, inputs = make()
    with pytest.raises(ValueError, match=r"hidden_size: neither PromptGate nor the model gives it"):
        ilora.inject(model, ILoRAConfig(target_modules=["q_proj"]), gate=PromptGate(4))


def test_prompt_gate_without_a_table_needs_embeddings():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def get_input_embeddings(self):
            raise NotImplementedError("not handled")

        get_output_embeddings = get_input_embeddings

        def forward(self, input_ids=None, inputs_embeds=None):
            return self.linear(inputs_embeds)

    model = ilora.inject(Reader(), ILoRAConfig(), gate=PromptGate(4, hidden_size=8))
    with pytest.raises(ValueError, match="PromptGate needs inputs_embeds: Reader names no input embeddings"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long))
    assert model(inputs_embeds=torch.randn(2, 3, 8)).shape == (2, 3, 8)


@pytest.mark.parametrize("make", [wav2vec2, segformer])
def test_checkpointing_needs_no_embeddings(make):
    model, inputs = make()
    ilora.inject(model.train(), ILoRAConfig(target_modules=["q_proj"]), gate=SequenceGate(5, 4))
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    first(model(**inputs, ilora_z=torch.randn(2, 5))).sum().backward()
    assert all(layer.lora_B.grad is not None for layer in ilora.ilora_layers(model).values())
