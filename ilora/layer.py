"""ILoRALinear: a frozen linear layer with a gated low-rank update."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .base_layers import adapter_like, features_of, is_conv1d, keep_unpacked
from .current_gate import GateState
from .op.checks import check_settings, dtype_named
from .op.functional import ilora_linear, ilora_update
from .shared import SharedInputGroup
from .tensor_parallel import add_update, split_of

# What x Wᵀ may be computed of; a FakeTensor is a weight in a model that is being exported.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class ILoRALinear(nn.Module):
    """Wraps a linear layer: y = base(x) + ((dropout(x) lora_Aᵀ) ⊙ γ) lora_Bᵀ, γ from the gate of each instance.

    Args:
        base_layer: nn.Linear or transformers' Conv1D, whose product and update are then computed together; or any
            module that maps [..., d_in] to [..., d_out] and has in_features and out_features (a quantised linear, one
            with hooks or with a tensor-subclass weight), whose output the update is added to. It is frozen in place.
        r: total rank R, 1 to 256, split evenly over the experts.
        num_experts: E, which divides r.
        lora_alpha: scaling = lora_alpha / (r / num_experts).
        lora_dropout: 0 <= p < 1, on the low-rank path, in training mode only.
        adapter_dtype: of lora_A and lora_B, torch.float32 or "float32" and so on; None means the base weight's, or
            float32 where that is no float.
        backend: as in `ilora.ilora_linear`.
    lora_A [R, d_in] starts Kaiming-uniform and lora_B [d_out, R] zero, so a fresh layer equals its base.
    Raises: TypeError, ValueError naming a base or a setting that does not fit, before the base is changed.
    """

    input_group: SharedInputGroup | None = None  # with others that get the same input (ilora.share_inputs)

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
        self.split = split_of(base_layer)  # over processes, or None
        if self.split is not None:
            self.lora_A = self.split.distribute(self.lora_A, 1)
            self.lora_B = self.split.distribute(self.lora_B, 0)

    def reset_parameters(self) -> None:
        """lora_A Kaiming-uniform (as nn.Linear's own), lora_B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

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
        """y [..., d_out] from x [..., d_in], gate [N, E] and segments int32 [N+1] (see `ilora.ilora_linear`).

        Raises: RuntimeError without a gate, and for one while another is merged into the weights; TypeError, ValueError
        naming the argument that does not fit.
        """
        if not torch.compiler.is_compiling():
            self.gate_state.reads.called.add(self.name)
        if self.merged and gate is not None:
            raise RuntimeError(f"{self.name}: a gate is merged into its weights; ilora.unmerge before giving another")
        if not self.gate_state.enabled or self.merged:
            return self.base_layer(x)
        if gate is None:
            y = None if self.input_group is None else self.input_group.output(self, x)
            if y is not None:
                return y
            gate, segments = self.gate_state.gate_for(x, self.gate_index, self.name)
        if gate is None:
            raise RuntimeError(
                f"{self.name} ({self.in_features}->{self.out_features}) has no gate: pass layer(x, gate=g) with g "
                f"[N, {self.gate_experts}], or run the model inside `with ilora.gated(model, g):`"
            )
        dropout_p = self.lora_dropout if self.training else 0.0
        adapter = (self.lora_A, self.lora_B, self.own_gate(gate), self.scaling, segments, dropout_p, None, self.backend)
        if self.split is not None:
            settings = (*adapter[:5], dropout_p, self.backend)
            try:
                return add_update(self.split, x, self.base_layer(x), *settings)
            except ValueError as error:
                error.args = (f"{self.name}: {error}",)
                raise
        weight = self.plain_weight()
        if weight is None:
            return ilora_update(x, self.base_layer(x), *adapter)
        try:
            return ilora_linear(x, weight, self.base_layer.bias, *adapter)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            error.args = (f"{self.name}: {error}",)
            raise

    def plain_weight(self) -> Tensor | None:
        """[d_out, d_in] if x Wᵀ + b is all that calling the base does; None where it must be called itself."""
        base = self.base_layer
        linear = type(base) is nn.Linear
        if not linear and not is_conv1d(base):
            return None
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return None
        if "forward" in base.__dict__:  # as accelerate's device maps put there
            return None
        weight = cast(Tensor, base.weight)
        if type(weight) not in _PLAIN:
            return None
        return weight if linear else weight.T

    def own_gate(self, gate: Tensor) -> Tensor:
        """[N, num_experts] from the model's [N, gate_experts]: a layer with fewer experts sums neighbours' gates.
        Raises TypeError, ValueError for what is no gate of this width."""
        try:
            fits = gate.shape[-1] == self.gate_experts
        except (AttributeError, IndexError):  # no tensor, or one without dimensions
            fits = False
        if not fits:
            got = list(gate.shape) if isinstance(gate, Tensor) else type(gate).__name__
            kind = ValueError if isinstance(gate, Tensor) else TypeError
            raise kind(f"gate: expected [N, num_experts={self.gate_experts}], got {got}")
        if self.num_experts == self.gate_experts:
            return gate
        return gate.reshape(gate.shape[0], self.num_experts, -1).sum(-1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"num_experts={self.num_experts}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        )
