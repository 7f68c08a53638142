"""What a task class of transformers adds to a pretrained model is trained whole and saved; what its file had is not."""

import copy
import warnings

import pytest
import torch
from saved_cases import as_from_a_file, assert_same_state, randomise

import ilora
from ilora import ILoRAConfig

hf = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 24}
IMAGE = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 12))}
SIDES |= {"d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 24}
AUDIO = SMALL | {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (4,), "num_conv_pos_embeddings": 4}
AUDIO |= {"num_feat_extract_layers": 1, "num_conv_pos_embedding_groups": 2, "tdnn_dim": (8,), "tdnn_kernel": (1,)}
AUDIO |= {"tdnn_dilation": (1,), "classifier_proj_size": 8, "xvector_output_dim": 8}
STAGES = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 1], "num_encoder_blocks": 2}
STAGES |= {"sr_ratios": [1, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [1, 1]}
LATENT = {"num_latents": 4, "d_latents": 8, "d_model": 8, "num_blocks": 1, "num_self_attends_per_block": 1}
LATENT |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 24}
LATENT |= {"max_position_embeddings": 8}
CONFIGS = {
    "Bert": (hf.BertConfig, SMALL),
    "Roberta": (hf.RobertaConfig, SMALL),
    "DistilBert": (hf.DistilBertConfig, {"vocab_size": 24, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12}),
    "Deberta": (hf.DebertaConfig, SMALL),
    "DebertaV2": (hf.DebertaV2Config, SMALL),
    "Electra": (hf.ElectraConfig, SMALL | {"embedding_size": 8}),
    "Albert": (hf.AlbertConfig, SMALL | {"embedding_size": 8}),
    "ModernBert": (hf.ModernBertConfig, SMALL | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}),
    "XLNet": (hf.XLNetConfig, {"vocab_size": 24, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 12}),
    "Llama": (hf.LlamaConfig, SMALL | {"pad_token_id": 0}),
    "GPT2": (hf.GPT2Config, {"vocab_size": 24, "n_embd": 8, "n_layer": 1, "n_head": 2}),
    "Bart": (hf.BartConfig, SIDES),
    "T5": (hf.T5Config, {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}),
    "ViT": (hf.ViTConfig, IMAGE),
    "Segformer": (hf.SegformerConfig, STAGES | {"decoder_hidden_size": 8}),
    "Data2VecVision": (hf.Data2VecVisionConfig, IMAGE),
    "Wav2Vec2": (hf.Wav2Vec2Config, AUDIO),
    "AST": (hf.ASTConfig, IMAGE | {"max_length": 16, "num_mel_bins": 16}),
    "Perceiver": (hf.PerceiverConfig, LATENT),
}
ADDED = {  # of each task class: what is around the model, by hand
    "BertForSequenceClassification": {"classifier"},
    "BertForQuestionAnswering": {"qa_outputs"},
    "BertForMultipleChoice": {"classifier"},
    "RobertaForSequenceClassification": {"classifier"},
    "DistilBertForSequenceClassification": {"pre_classifier", "classifier"},
    "DebertaForSequenceClassification": {"pooler", "classifier"},
    "DebertaV2ForMultipleChoice": {"pooler", "classifier"},
    "ElectraForSequenceClassification": {"classifier"},
    "ElectraForMultipleChoice": {"sequence_summary", "classifier"},
    "AlbertForTokenClassification": {"classifier"},
    "ModernBertForSequenceClassification": {"head", "classifier"},
    "XLNetForSequenceClassification": {"sequence_summary", "logits_proj"},
    "XLNetForQuestionAnswering": {"start_logits", "end_logits", "answer_class"},
    "LlamaForSequenceClassification": {"score"},
    "GPT2ForSequenceClassification": {"score"},
    "BartForSequenceClassification": {"classification_head"},
    "T5ForSequenceClassification": {"classification_head"},
    "T5ForQuestionAnswering": {"qa_outputs"},
    "SegformerForImageClassification": {"classifier"},
    "SegformerForSemanticSegmentation": {"decode_head"},
    "Data2VecVisionForImageClassification": {"classifier", "data2vec_vision.pooler"},
    "Wav2Vec2ForSequenceClassification": {"projector", "classifier"},
    "Wav2Vec2ForAudioFrameClassification": {"classifier"},
    "Wav2Vec2ForXVector": {"projector", "tdnn", "feature_extractor", "classifier", "objective"},
    "Wav2Vec2ForCTC": {"lm_head"},
    "ASTForAudioClassification": {"classifier"},
    "PerceiverForSequenceClassification": {"perceiver.input_preprocessor", "perceiver.decoder"},
}


def loaded(name, folder, base="Model"):
    """(the class of this name, loaded from a saved model of its family, the keys that the file did not have)."""
    family = next(f for f in sorted(CONFIGS, key=len, reverse=True) if name.startswith(f))
    if not (folder / family).exists():
        kind, sizes = CONFIGS[family]
        getattr(hf, family + base)(kind(**sizes)).save_pretrained(folder / family)
    more = {"vocab_size": 24} if "CTC" in name else {}
    model, info = getattr(hf, name).from_pretrained(folder / family, output_loading_info=True, **more)
    return model, set(info["missing_keys"])


def heads(model, **options):
    """The modules that inject trains whole, by path."""
    return set(ilora.inject(model, ILoRAConfig(**options)).ilora.adapter.saved)


def saved(model):
    return {f"{path}.{key}" for path, module in model.ilora.adapter.saved.items() for key in module.state_dict()}


@pytest.mark.parametrize("targets", ["all-linear", "named"])
@pytest.mark.parametrize("name", ADDED)
def test_what_a_task_class_adds_is_trained_and_saved(tmp_path, name, targets):
    model, missing = loaded(name, tmp_path)
    if targets == "named":
        linear = [
            path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) or ".c_" in path
        ]
        inner = [path for path in linear if not path.startswith(tuple(ADDED[name])) and path.count(".") > 1]
        targets = [inner[0].rsplit(".", 1)[-1]]  # an ending that heads may have as well
    assert heads(model, r=4, num_experts=2, target_modules=targets) == ADDED[name]
    assert missing <= saved(model)
    parameters = dict(model.named_parameters())
    assert all(parameters[key].requires_grad for key in missing if key in parameters)
    ilora.save_adapter(randomise(model), tmp_path / "adapter")
    again = ilora.load_adapter(loaded(name, tmp_path)[0], tmp_path / "adapter")
    assert again.ilora.config == model.ilora.config
    assert_same_state(again.state_dict(), model.state_dict())


LANGUAGE = ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "BertForPreTraining", "DistilBertForMaskedLM"]
LANGUAGE += ["BartForConditionalGeneration", "T5ForConditionalGeneration", "BertModel", "ViTModel"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LANGUAGE)
def test_heads_of_language_models_are_not(tmp_path, name, tied):
    family = next(f for f in sorted(CONFIGS, key=len, reverse=True) if name.startswith(f))
    kind, sizes = CONFIGS[family]
    getattr(hf, name)(kind(**sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    model = getattr(hf, name).from_pretrained(tmp_path)
    assert not heads(model)
    assert not heads(getattr(hf, name)(model.config))


def test_composite_models():
    vision, text = hf.CLIPVisionConfig(**IMAGE), hf.LlamaConfig(**SMALL, pad_token_id=0)
    llava = hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision))
    assert not heads(llava, target_modules=["q_proj"])
    clip = hf.CLIPConfig(text_config=SMALL, vision_config=IMAGE)
    assert heads(hf.CLIPForImageClassification(clip)) == {"classifier"}
    assert not heads(hf.CLIPModel(clip))


def test_what_the_checkpoint_lacked_within_the_model(tmp_path):
    model, missing = loaded("BertForSequenceClassification", tmp_path, "ForMaskedLM")  # which has no pooler
    assert "bert.pooler.dense.weight" in missing
    assert heads(model) == {"classifier", "bert.pooler"}
    assert missing == saved(model)


def test_what_was_merged_or_offloaded_is_not_new(tmp_path):
    pytest.importorskip("accelerate")
    model = ilora.inject(loaded("LlamaForSequenceClassification", tmp_path)[0])
    ilora.eject(ilora.merge(model, torch.rand(4), keep_base=False))
    assert heads(model) == {"score"}
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk"} | {"model.norm": "cpu"}
    kind = type(loaded("LlamaForSequenceClassification", tmp_path)[0])
    offload = {"device_map": places | {"score": "cpu"}, "offload_folder": tmp_path / "offload"}
    model = kind.from_pretrained(tmp_path / "Llama", **offload)
    assert heads(model) == {"score"}


def test_a_parameter_that_took_the_place_of_a_loaded_one_is_not_new(tmp_path):
    model = loaded("LlamaForSequenceClassification", tmp_path)[0]
    for module in model.modules():  # as a merge by hand does, and dequantize
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach() * 2)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(model.model.embed_tokens.weight[:20], freeze=True)
    assert heads(model) == {"score"}
    assert len(ilora.targets(model)) == 14


def test_heavy_heads_that_the_checkpoint_had_stay_frozen(tmp_path):
    kind = hf.SegformerForSemanticSegmentation
    sizes = STAGES | {"decoder_hidden_size": 8}
    model = kind(hf.SegformerConfig(**sizes))
    assert heads(model, target_modules=["q_proj"]) == {"decode_head"}
    ilora.eject(model).save_pretrained(tmp_path)
    assert not heads(kind.from_pretrained(tmp_path), target_modules=["q_proj"])

    class LlamaForCausalLMAndClassification(hf.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.cls = torch.nn.Linear(8, 2)

    hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path / "lm")
    model = LlamaForCausalLMAndClassification.from_pretrained(tmp_path / "lm")
    assert heads(model, target_modules=["q_proj"]) == {"cls"}


def test_a_model_of_a_head_alone_says_what_became_of_it():
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))
    with pytest.raises(ValueError, match=r"trained whole instead: classifier \(exclude_modules leaves them out\)"):
        ilora.inject(model)


def test_a_head_that_is_named_is_as_it_was_asked_for(tmp_path):
    def score(**options):
        model = ilora.inject(loaded("LlamaForSequenceClassification", tmp_path)[0], ILoRAConfig(**options))
        return "score" in model.ilora.adapter.saved, "score" in ilora.targets(model)

    assert score() == score(target_modules=["q_proj"]) == score(modules_to_save=["score"]) == (True, False)
    assert score(target_modules=["score"]) == score(target_modules=r"model.*q_proj|score") == (False, True)
    assert score(exclude_modules=["score"]) == score(exclude_modules=r"score|.*\.k_proj") == (False, False)
    roberta = loaded("RobertaForSequenceClassification", tmp_path)[0]
    ilora.inject(roberta, ILoRAConfig(target_modules=["dense", "classifier.out_proj"]))
    assert not roberta.ilora.adapter.saved
    assert {"classifier.dense", "classifier.out_proj"} < set(ilora.targets(roberta))


def test_parameters_that_are_in_no_module_are_named(tmp_path):
    sizes = AUDIO | {"use_weighted_layer_sum": True}
    model = hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**sizes))
    with pytest.warns(UserWarning, match=r"Wav2Vec2ForSequenceClassification: layer_weights stays frozen"):
        ilora.inject(model, ILoRAConfig(target_modules=["q_proj"]))
    model.config._name_or_path = ""
    ilora.eject(model).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ilora.inject(hf.Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path))


def test_a_file_says_all(tmp_path):
    model = loaded("DistilBertForSequenceClassification", tmp_path)[0]
    config = ILoRAConfig(exclude_modules=["lin1"])  # as an earlier version, which adapted pre_classifier
    adapter = as_from_a_file(model, config).ilora.adapter
    assert "pre_classifier" in adapter.layers
    ilora.save_adapter(randomise(model), tmp_path / "adapter")
    again = ilora.load_adapter(loaded("DistilBertForSequenceClassification", tmp_path)[0], tmp_path / "adapter")
    ilora.add_adapter(again, "new")
    assert set(again.ilora.adapter.saved) == {"pre_classifier", "classifier"}
    ilora.load_adapter(again, tmp_path / "adapter", name="other")
    assert again.ilora.config == config
    assert set(again.ilora.adapter.layers) == set(adapter.layers)
