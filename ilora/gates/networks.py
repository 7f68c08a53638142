"""Gate networks: from what is known of an instance to the weights of its experts.

N instances, E experts, G gates (one, or one per layer): a gate is [N, E], or [G, N, E] where each layer has its own.
It is computed and returned in float32, or in float64 where the parameters are float64, whatever comes in.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..op.functional import autocasts
from .checks import expect, is_int, is_real
from .pooling import masked_mean

KINDS = ("dense", "topk", "mlp", "noisy")
MAX_ELEMENTS = 2**31  # of one parameter, since settings may come from a file


class GateNetwork(nn.Module):
    """The base class of gate networks; a subclass adds `forward`.

    num_experts: E. per_layer: each block of the model has its own gate; num_layers: how many (1 if they share one).
    balance: the coefficient of `ilora.balance_loss` in the training loss.
    A subclass keeps its constructor's arguments as attributes of the same names, which `settings` reads.
    Raises: ValueError for settings of a wrong type or range.
    """

    def __init__(self, num_experts: int, per_layer: bool = False, balance: float = 0.0, num_layers: int = 1) -> None:
        super().__init__()
        expect(is_int(num_experts), "num_experts", "an integer >= 1", num_experts)
        expect(isinstance(per_layer, bool), "per_layer", "True or False", per_layer)
        expect(is_real(balance, 0.0), "balance", "a number >= 0", balance)
        fits = is_int(num_layers) and (per_layer or num_layers == 1)
        expect(fits, "num_layers", "an integer >= 1, and 1 unless per_layer", num_layers)
        self.num_experts, self.per_layer, self.balance, self.num_layers = num_experts, per_layer, balance, num_layers

    def bind(self, num_experts: int, num_layers: int, hidden_size: int | None = None) -> None:
        """Fits the network to a model; parameters that fit already are kept. Call it before making an optimizer.

        num_experts: the model's, which must be this network's. num_layers: the model's adapted blocks, for per_layer.
        hidden_size: the width of the model's input embeddings, for a network that reads them.
        Raises: ValueError where they disagree, or where the network has been bound to another number of blocks.
        """
        expect(num_experts == self.num_experts, "num_experts", f"this gate network's {self.num_experts}", num_experts)
        expect(is_int(num_layers), "num_layers", "an integer >= 1", num_layers)
        kept = not self.per_layer or self.num_layers in (1, num_layers)  # gates that may have been trained by now
        expect(kept, "num_layers", f"{self.num_layers}, to which this gate network is bound", num_layers)
        if self.per_layer and num_layers != self.num_layers:
            self.num_layers = num_layers
            self._build()

    def _build(self) -> None: ...  # new parameters for num_layers gates

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, JSON-able: `type(net)(**net.settings())` has parameters of the same shapes."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class SequenceGate(GateNetwork):
    """The gate from a representation z of the instance, such as a sequence recommender's (arXiv 2408.10159).

    Args:
        z_dim: width of z.
        num_experts: E, the model's.
        kind: "dense" softmax(W z / T), as in the paper; "topk" the same over the top_k largest logits, the others
            exactly 0; "mlp" with W silu(W' z + b') for W z, hidden_dim wide (None: at least 4·E, at most 256 of z_dim);
            "noisy" with W z + softplus(W_noise z) · normal noise, in training only (arXiv 1701.06538).
        top_k: for kind "topk" alone: how many experts an instance has, 1 to num_experts.
        temperature: T above, for all kinds: below 1 gates are sharper. dropout: acts on z, in training only.
        per_layer, balance, num_layers: as in `GateNetwork`; num_layers is set by `bind`.
    Parameters: weight [G, E, z_dim], without bias; "mlp": weight [G, E, hidden], hidden_weight [G, hidden, z_dim],
        hidden_bias [G, 1, hidden]; "noisy": also noise_weight [G, E, z_dim].
    Raises: ValueError naming a setting of a wrong type or range, or one that asks for 2³¹ weights.
    """

    def __init__(
        self,
        z_dim: int,
        num_experts: int = 4,
        kind: str = "dense",
        *,
        top_k: int = 2,
        hidden_dim: int | None = None,
        temperature: float = 1.0,
        dropout: float = 0.0,
        per_layer: bool = False,
        balance: float = 0.0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(num_experts, per_layer, balance, num_layers)
        expect(is_int(z_dim), "z_dim", "an integer >= 1", z_dim)
        expect(isinstance(kind, str) and kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
        top_k_fits = is_int(top_k) and (kind != "topk" or top_k <= num_experts)
        expect(top_k_fits, "top_k", f"an integer from 1 to num_experts={num_experts}", top_k)
        expect(hidden_dim is None or is_int(hidden_dim), "hidden_dim", "None or an integer >= 1", hidden_dim)
        expect(is_real(temperature, 1e-6), "temperature", "a number >= 1e-6", temperature)
        expect(is_real(dropout, 0.0, 1.0), "dropout", "0 <= p < 1", dropout)
        self.z_dim, self.kind, self.top_k, self.hidden_dim = z_dim, kind, top_k, hidden_dim
        self.temperature, self.dropout = temperature, dropout
        self.weight = nn.Parameter(torch.empty(0))
        self._build()

    def forward(self, z: Tensor) -> Tensor:
        """gate [N, E], or [num_layers, N, E] if per_layer, from z [N, z_dim] of any float dtype; rows are independent.

        Raises: ValueError for another shape or device, TypeError for another dtype and what is no tensor.
        """
        if not isinstance(z, Tensor):
            raise TypeError(f"z: expected a float tensor [N, z_dim={self.z_dim}], got {type(z).__name__}")
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z: expected [N, z_dim={self.z_dim}], got {list(z.shape)}")
        if not z.is_floating_point():
            raise TypeError(f"z: expected a float tensor, got {z.dtype}")
        if z.device != self.weight.device:
            raise ValueError(f"z: expected it on the gate network's device {self.weight.device}, got {z.device}")
        with _without_autocast(z.device.type):
            return self._gate(z)

    def _build(self) -> None:
        # In the dtype and on the device of the old parameters. They are small, so that gates start near-uniform.
        G, E, D, like, mlp = self.num_layers, self.num_experts, self.z_dim, self.weight, self.kind == "mlp"
        hidden = self.hidden_dim or max(4 * E, min(D, 256))
        elements = G * max(E * D, hidden * max(D, E) * mlp)
        expect(elements < MAX_ELEMENTS, "gate network", f"fewer than {MAX_ELEMENTS} weights", elements)
        self.weight = nn.Parameter(nn.init.normal_(like.new_empty(G, E, hidden if mlp else D), std=0.02))
        if mlp:
            self.hidden_weight = nn.Parameter(nn.init.normal_(like.new_empty(G, hidden, D), std=D**-0.5))
            self.hidden_bias = nn.Parameter(like.new_zeros(G, 1, hidden))
        if self.kind == "noisy":
            self.noise_weight = nn.Parameter(like.new_zeros(G, E, D))

    def _gate(self, z: Tensor) -> Tensor:
        """[N, z_dim] -> [N, E] or [G, N, E]. Called with autocast off."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        z = F.dropout(z.to(wide), self.dropout, self.training)
        if self.kind == "mlp":
            hidden = torch.einsum("nd,ghd->gnh", z, self.hidden_weight.to(wide)) + self.hidden_bias.to(wide)
            logits = torch.einsum("gnh,geh->gne", F.silu(hidden), self.weight.to(wide))
        else:
            logits = torch.einsum("nd,ged->gne", z, self.weight.to(wide))
        if self.kind == "noisy" and self.training:
            scale = F.softplus(torch.einsum("nd,ged->gne", z, self.noise_weight.to(wide)))
            logits = logits + scale * torch.randn_like(logits)
        logits = logits / self.temperature
        if self.kind == "topk":  # a stable sort, so that a tie goes to the lower expert on every device
            chosen = logits.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]
            gate = torch.zeros_like(logits).scatter(-1, chosen, logits.gather(-1, chosen).softmax(-1))
        else:
            gate = logits.softmax(-1)
        return (gate if self.per_layer else gate[0]).contiguous()


class PromptGate(SequenceGate):
    """The gate from the prompt itself: the layer-normed mean of its input embeddings is the z of a `SequenceGate`.

    hidden_size: H, the width of the embeddings; None waits for `bind`. min_tokens: as in `prompt_mask`.
    The other arguments, the parameters and the errors are those of `SequenceGate` with z_dim = H.
    """

    warned = False  # whether a forward in which it may have read the answer has been warned of

    def __init__(
        self,
        num_experts: int = 4,
        kind: str = "dense",
        hidden_size: int | None = None,
        *,
        top_k: int = 2,
        hidden_dim: int | None = None,
        temperature: float = 1.0,
        dropout: float = 0.0,
        per_layer: bool = False,
        balance: float = 0.0,
        min_tokens: int = 1,
        num_layers: int = 1,
    ) -> None:
        expect(hidden_size is None or is_int(hidden_size), "hidden_size", "None or an integer >= 1", hidden_size)
        expect(is_int(min_tokens, 0), "min_tokens", "an integer >= 0", min_tokens)
        net: dict[str, Any] = {"top_k": top_k, "hidden_dim": hidden_dim, "temperature": temperature, "dropout": dropout}
        net |= {"per_layer": per_layer, "balance": balance, "num_layers": num_layers}
        super().__init__(hidden_size or 1, num_experts, kind, **net)  # 1 holds the place until bind
        self.hidden_size, self.min_tokens = hidden_size, min_tokens

    def bind(self, num_experts: int, num_layers: int, hidden_size: int | None = None) -> None:
        """As `GateNetwork.bind`; the first hidden_size makes the parameters, if the constructor was given none.

        Raises: ValueError also where nobody gives hidden_size, or where it is not this network's.
        """
        width = self.hidden_size or hidden_size
        if width is None:
            raise ValueError("hidden_size: neither PromptGate nor the model gives it; pass PromptGate(hidden_size=...)")
        expect(hidden_size in (None, width), "hidden_size", f"this PromptGate's {width}", hidden_size)
        super().bind(num_experts, num_layers, hidden_size)
        if self.hidden_size is None:
            self.hidden_size = self.z_dim = width
            self._build()

    def forward(self, embeddings: Tensor, mask: Tensor, segments: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """gate [N, E], or [num_layers, N, E] if per_layer; N = B, or that of segments.

        embeddings: [B, L, H] of any float dtype. mask: bool [B, L], the tokens to average (see `prompt_mask`); the mean
        of an instance without any is zero. segments: int32 [N+1] over the B·L rows of a packed batch.
        Raises: RuntimeError before hidden_size is known, ValueError for other shapes, TypeError for other dtypes.
        """
        if self.hidden_size is None:
            raise RuntimeError("PromptGate: hidden_size is not known yet; inject it into a model, or call bind")
        if embeddings.shape[-1] != self.hidden_size:
            raise ValueError(f"embeddings: expected [B, L, H={self.hidden_size}], got {list(embeddings.shape)}")
        with _without_autocast(embeddings.device.type):
            mean = masked_mean(embeddings, mask, segments, torch.promote_types(self.weight.dtype, torch.float32))
            # eps far below any embedding: a feature of an LLM's mean embedding may have variance 1e-9
            return self._gate(F.layer_norm(mean, mean.shape[1:], eps=1e-12))


class UniformGate(GateNetwork):
    """1/E for every expert and instance: what a plain LoRA of the same rank computes. It has no parameters.
    Raises: ValueError for a num_experts that is no integer >= 1."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__(num_experts)

    def forward(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """gate [n, E] float32 on the device."""
        return torch.full((n, self.num_experts), 1.0 / self.num_experts, dtype=torch.float32, device=device)


GATE_TYPES: dict[str, type[GateNetwork]] = {c.__name__: c for c in (SequenceGate, PromptGate, UniformGate)}


def gate_from_settings(settings: dict[str, Any]) -> GateNetwork:
    """A new network from {"type": a name in GATE_TYPES, **its settings()}, as read from a file.

    Raises: ValueError for anything else, whatever the dict holds.
    """
    kind = settings.get("type") if isinstance(settings, dict) else None
    if not isinstance(kind, str) or kind not in GATE_TYPES:
        raise ValueError(f"gate settings: expected a dict with a type among {', '.join(GATE_TYPES)}, got {kind!r}")
    arguments = {name: value for name, value in settings.items() if name != "type"}
    try:
        inspect.signature(GATE_TYPES[kind]).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"gate settings of {kind}: {error}") from None
    return GATE_TYPES[kind](**arguments)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast off where it is on; elsewhere nothing, because torch's pipelines cannot cut a model at such a region."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()
