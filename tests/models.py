"""Tiny random models of real transformers classes, and iLoRA in them with updates that are not zero."""

import torch
import transformers as hf

import ilora

VOCABULARY, PAD, E = 61, 0, 4
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


def llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TOKENS, **SMALL, num_key_value_heads=2, **options))


def qwen3():
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**TOKENS, **SMALL, num_key_value_heads=2, head_dim=8))


def gemma():
    return hf.GemmaForCausalLM(hf.GemmaConfig(**TOKENS, **SMALL, num_key_value_heads=1, head_dim=8))


def mixtral():
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TOKENS, **SMALL, **sizes))


def opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    config = hf.OPTConfig(**TOKENS, **sizes, word_embed_proj_dim=32, max_position_embeddings=64)
    return hf.OPTForCausalLM(config)


def gpt2():
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**TOKENS, **drops, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def bert():
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=VOCABULARY, **SMALL, **drops, num_labels=3))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **tokens))


def bart():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0}
    tokens = {**TOKENS, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    return hf.BartForConditionalGeneration(hf.BartConfig(**tokens, **sizes, **heads, d_model=32))


DECODERS = {"llama": llama, "qwen3": qwen3, "gemma": gemma, "mixtral": mixtral, "opt": opt, "gpt2": gpt2}
ENCODER_DECODERS = {"t5": t5, "bart": bart}
MODELS = {**DECODERS, **ENCODER_DECODERS, "bert": bert}


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
