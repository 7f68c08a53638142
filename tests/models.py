"""Tiny random models of real transformers classes, and iLoRA in them with updates that are not zero."""

from functools import partial

import torch
import transformers as hf

import ilora

VOCABULARY, PAD, E = 61, 0, 4
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
SIDES |= {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}

OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
DEEPSEEK |= {"num_key_value_heads": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
LLAMA4 = {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 1}
LLAVA = {"text_config": {"model_type": "llama", **TOKENS, **GROUPED}, "image_token_id": 60, "vision_feature_layer": -1}
LLAVA |= {"vision_config": {"model_type": "clip_vision_model", **VISION}}
FAMILIES = {  # name: (class, settings)
    "llama": ("LlamaForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", HEADS),
    "gemma": ("GemmaForCausalLM", {**HEADS, "num_key_value_heads": 1}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, **EXPERTS}),
    "opt": ("OPTForCausalLM", OPT),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bert": ("BertForSequenceClassification", {**SMALL, "num_labels": 3}),
    "choices": ("BertForMultipleChoice", SMALL),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", {**SIDES, "max_position_embeddings": 64, "forced_eos_token_id": None}),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**SMALL, **DEEPSEEK}),
    "gpt_oss": ("GptOssForCausalLM", {**HEADS, **EXPERTS}),
    "llama4": ("Llama4ForCausalLM", LLAMA4),  # its routers are linear layers that return two tensors
    "phimoe": ("PhimoeForCausalLM", {**GROUPED, **EXPERTS}),
    "vit": ("ViTForImageClassification", VISION),
    "whisper": ("WhisperForConditionalGeneration", {**SIDES, "num_mel_bins": 8, "max_source_positions": 10}),
    "llava": ("LlavaForConditionalGeneration", LLAVA),
}
DROPOUT = ("dropout", "dropout_rate", "attention_dropout", "hidden_dropout")
DROPOUT += ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")


def make(name):
    """A model of this family, without dropout."""
    kind, settings = FAMILIES[name]
    tokens = {} if name in ("vit", "llava") else TOKENS
    config = getattr(hf, kind).config_class(**tokens, **settings)
    for dropout in DROPOUT:
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return getattr(hf, kind)(config)


MAKE = {name: partial(make, name) for name in FAMILIES}
DECODERS = {name: MAKE[name] for name in ("llama", "qwen3", "gemma", "mixtral", "opt", "gpt2")}
ENCODER_DECODERS = {name: MAKE[name] for name in ("t5", "bart")}
MODELS = {**DECODERS, **ENCODER_DECODERS, "bert": MAKE["bert"]}
llama, gpt2, mixtral, bert, t5, bart = (MODELS[name] for name in ("llama", "gpt2", "mixtral", "bert", "t5", "bart"))


def injected(make=llama, gate=None, seed=0, config=None, **options):
    """A tiny model in eval mode with random updates large enough to matter."""
    torch.manual_seed(seed)
    config = ilora.ILoRAConfig(r=8, num_experts=E, **options) if config is None else config
    model = ilora.inject(make().eval(), config, gate=gate)
    return randomised(model, seed)


def randomised(model, seed=0):
    """Normal lora_B, so that different gates give different outputs."""
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in ilora.ilora_layers(model).values():
        layer.lora_B.data.normal_(std=0.2, generator=generator)
    return model


def gates(n, seed=0):
    """[n, E], rows far apart."""
    return torch.softmax(3 * torch.randn(n, E, generator=torch.Generator().manual_seed(seed)), -1)


def prompts(lengths, seed=0, left=True):
    """(input_ids, attention_mask) [n, max length], padded on the left or on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(ids, lengths, strict=True):
        where = slice(len(row) - length, None) if left else slice(0, length)
        row[where] = torch.randint(3, VOCABULARY, (length,), generator=generator)
    return ids, (ids != PAD).long()
