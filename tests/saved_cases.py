"""Tiny models with adapters worth saving: every tensor random, nothing at its initial value."""

import warnings

import torch
from torch import nn

import ilora
from ilora import ILoRAConfig, SequenceGate
from ilora.adapter.record import Injection
from ilora.adapter.switch import build
from ilora.model.inject import install

FILES = ("adapter_config.json", "adapter_model.safetensors", "ilora_config.json", "ilora_gate.safetensors")


def llama(seed=1, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def gpt2(seed=1):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


def bert(seed=1):
    """With a head that its checkpoint would not have: a task's."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=16, num_labels=3)
    return BertForSequenceClassification(config).eval()


class Twice(nn.Module):
    """One linear layer in two places, and a head with running statistics."""

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.between = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5))

    def forward(self, x):
        return self.head(self.second(self.between(self.first(x).tanh()).tanh()))


def twice(seed=1):
    return Twice(seed).eval()


BASES = {**MODELS, "bert": bert, "twice": twice}


class NormedGate(nn.Module):
    """A gate network of a user's own, with buffers."""

    def __init__(self, z_dim=6, num_experts=4):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(z_dim), nn.Linear(z_dim, num_experts)

    def forward(self, z):
        return self.linear(self.norm(z)).softmax(-1)


class BlockGate(SequenceGate):
    """A user's kind of one of ours."""


def adapted(model, gate=None, *, name="default", std=0.1, **config):
    """The model with an adapter all of whose floating tensors are normal, and buffers that are not fresh."""
    ilora.inject(model, ILoRAConfig(**{"r": 8, "num_experts": 4, "lora_alpha": 16, **config}), gate, name=name)
    return randomise(model, std).eval()


def as_from_a_file(model, config):
    """The model with an adapter whose config is taken as it stands."""
    return install(model, Injection(build(model, "default", config, None)))


def randomise(model, std=0.1):
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
        if isinstance(model.ilora_gate, NormedGate):
            model.ilora_gate.norm.running_mean.normal_()
            model.ilora_gate.norm.num_batches_tracked.fill_(17)
    return model


def ids(rows=3, length=7):
    return torch.randint(0, 48, (rows, length), generator=torch.Generator().manual_seed(3))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids(), **kwargs).logits


def uniform(E=4):
    return torch.full((1, E), 1.0 / E)


def bits(model):
    """A copy of everything a failed call must leave alone."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    modules = {path: (id(module), module.training) for path, module in model.named_modules()}
    return type(model), state, flags, modules


def assert_untouched(model, before):
    kind, state, flags, modules = bits(model)
    assert kind is before[0]
    assert_same_state(state, before[1])
    assert flags == before[2]
    assert modules == before[3]


def assert_same_state(state, other):
    assert list(state) == list(other)
    for key, value in state.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


def close(left, right):
    assert left.shape == right.shape
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6 * max(1.0, right.abs().max().item()))


def strictly(load):
    """Without any warning of PEFT's, about keys or otherwise, but the one that it loads no gate."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", r"Unexpected keyword arguments \['an iLoRA adapter")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # they are not tied any more
        return load()
