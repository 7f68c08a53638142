"""ILoRALinear: a frozen linear layer with a gated low-rank update."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from .base_layers import adapter_like, features_of, is_conv1d, keep_unpacked
from .current_gate import GateState, own_gate
from .op.checks import check_settings, dtype_named
from .op.functional import ilora_linear, ilora_update
from .shared import SharedInputGroup
from .tensor_parallel import add_update, refuse_trained_weight, split_of

# The types of a weight that the fused operation may read; a FakeTensor is one in a model that is being exported.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class ILoRALinear(nn.Module):
    """Wraps a linear layer: y = base(x) + ((dropout(x) lora_Aᵀ) ⊙ γ) lora_Bᵀ, γ from the gate of each instance.

    Args:
        base_layer: the layer, which is frozen (requires_grad=False). For nn.Linear and transformers' Conv1D, x Wᵀ and
            the update are computed together. Any other module with in_features and out_features that maps
            [..., d_in] to [..., d_out], such as a quantised linear, is called, and the update is added to its output.
            So is a linear with hooks, under hooks for all modules, or with a weight of a tensor subclass.
        r: total rank R, 1 to 256, split evenly over the experts.
        num_experts: E, which divides r.
        lora_alpha: scaling = lora_alpha / (r / num_experts).
        lora_dropout: 0 <= p < 1, on the low-rank path, in training mode only.
        adapter_dtype: the dtype of lora_A and lora_B, as torch.float32 or "float32"; None means that of the base's
            weight, or float32 if the weight is quantised.
        backend: as in `ilora.ilora_linear`.
    lora_A [R, d_in] starts Kaiming-uniform and lora_B [d_out, R] zero, so that a new layer computes what its base does.
    Raises: TypeError, ValueError naming the argument that does not fit, before the base is changed.
    """

    input_group: SharedInputGroup | None = None  # the layers that may get the same input (ilora.share_inputs)

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        num_experts: int = 4,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        *,
        adapter_dtype: str | torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features_of(base_layer)
        check_settings(r, num_experts, lora_alpha, lora_dropout, backend)
        dtype = dtype_named(adapter_dtype)
        self.r, self.num_experts, self.lora_alpha, self.lora_dropout = r, num_experts, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (r // num_experts)
        self.backend = backend
        self.base_layer = base_layer.requires_grad_(False)
        keep_unpacked(base_layer)
        self.name, self.gate_state, self.gate_index, self.gate_experts = "ILoRALinear", GateState(), 0, num_experts
        self.merged = False  # whether a gate is folded into the base's weight (ilora.merge)
        like = adapter_like(base_layer, dtype)
        self.lora_A = nn.Parameter(like.new_empty(r, self.in_features))
        self.lora_B = nn.Parameter(like.new_empty(self.out_features, r))
        self.reset_parameters()
        self.split = split_of(base_layer)
        if self.split is not None:
            self.lora_A = self.split.distribute(self.lora_A, 1)
            self.lora_B = self.split.distribute(self.lora_B, 0)

    def reset_parameters(self) -> None:
        """lora_A Kaiming-uniform (as nn.Linear's own), lora_B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def factors(self) -> list[nn.Parameter]:
        """Its trained tensors."""
        return [self.lora_A, self.lora_B]

    @property
    def weight(self) -> Tensor:
        """The base layer's own weight, for code that reads its dtype or device."""
        if not torch.compiler.is_compiling():
            self.gate_state.reads.read.add(self.name)
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's own bias, None where it has none."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor, gate: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """y [..., d_out] from x [..., d_in], gate [N, E] and segments int32 [N+1]; see `ilora.ilora_linear`. Without a
        gate argument the model's gate is used (`ilora.gated`, or the call of an injected model).

        Raises: RuntimeError without any gate, and where a gate is given while another is merged into the weights;
        TypeError, ValueError naming the layer and the argument that does not fit.
        """
        if not torch.compiler.is_compiling():
            self.gate_state.reads.called.add(self.name)
        if self.merged and gate is not None:
            raise RuntimeError(f"{self.name}: a gate is merged into its weights; ilora.unmerge before giving another")
        if not self.gate_state.enabled or self.merged:
            return self.base_layer(x)
        if gate is None:
            mixture = self.gate_state.current.mixture
            if mixture is not None:
                return mixture.output(self, x)
            y = None if self.input_group is None else self.input_group.output(self, x)
            if y is not None:
                return y
            gate, segments = self.gate_state.gate_for(x, self.gate_index, self.name)
        if gate is None:
            raise RuntimeError(
                f"{self.name} ({self.in_features}->{self.out_features}) has no gate: pass layer(x, gate=g) with g "
                f"[N, {self.gate_experts}], or run the model inside `with ilora.gated(model, g):`"
            )
        if self.split is not None:
            refuse_trained_weight(self.name, self.base_layer)
        weight = self.plain_weight()
        base = self.base_layer(x) if weight is None else None
        settings = (self.scaling, segments, self.lora_dropout if self.training else 0.0, None, self.backend)
        try:
            adapter = (self.lora_A, self.lora_B, self.own_gate(gate), *settings)
            if self.split is not None:
                return add_update(self.split, x, base, *adapter)
            if weight is None:
                return ilora_update(x, base, *adapter)
            return ilora_linear(x, weight, self.base_layer.bias, *adapter)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            error.args = (f"{self.name}: {error}",)
            raise

    def plain_weight(self) -> Tensor | None:
        """The base's weight [d_out, d_in] if the base computes x Wᵀ + b and nothing else; None where it must be called:
        it is no linear layer, or something watches or replaces its forward."""
        base = self.base_layer
        linear = type(base) is nn.Linear
        if not linear and not is_conv1d(base):
            return None
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return None
        if _has_any_global_hook() or "forward" in base.__dict__:  # accelerate's device maps replace `forward`
            return None
        weight = cast(Tensor, base.weight)
        if type(weight) not in _PLAIN:
            return None
        return weight if linear else weight.T

    def own_gate(self, gate: Tensor) -> Tensor:
        """As `current_gate.own_gate`."""
        return own_gate(gate, self.num_experts, self.gate_experts)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"num_experts={self.num_experts}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        )
