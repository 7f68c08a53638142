"""ilora: instance-wise LoRA. Gated multi-expert low-rank updates, fused, for any linear layer (arXiv 2408.10159)."""

from . import reference
from .adapter import adapters, add_adapter, delete_adapter, ilora_layers, set_adapter, targets
from .backends import BackendUnavailable, available_backends
from .collate import GateCollator
from .config import ILoRAConfig
from .gate import gated
from .layer import ILoRALinear
from .merging import merge, unmerge
from .model import (
    disable_adapter,
    eject,
    gate_of,
    inject,
    last_gate,
    print_trainable_parameters,
    share_inputs,
    trainable_parameters,
)
from .networks import GateNetwork, PromptGate, SequenceGate, UniformGate
from .ops import ilora_linear, ilora_update
from .stats import GateStats, balance_loss, gate_stats, plot_gates
from .storage.checkpoint import load_adapter, save_adapter
from .storage.files import AdapterError
from .storage.hub import push_adapter
from .storage.interop import from_peft, to_peft

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "BackendUnavailable",
    "GateCollator",
    "GateNetwork",
    "GateStats",
    "ILoRAConfig",
    "ILoRALinear",
    "PromptGate",
    "SequenceGate",
    "UniformGate",
    "adapters",
    "add_adapter",
    "available_backends",
    "balance_loss",
    "delete_adapter",
    "disable_adapter",
    "eject",
    "from_peft",
    "gate_of",
    "gate_stats",
    "gated",
    "ilora_layers",
    "ilora_linear",
    "ilora_update",
    "inject",
    "last_gate",
    "load_adapter",
    "merge",
    "plot_gates",
    "print_trainable_parameters",
    "push_adapter",
    "reference",
    "save_adapter",
    "set_adapter",
    "share_inputs",
    "targets",
    "to_peft",
    "trainable_parameters",
    "unmerge",
]
