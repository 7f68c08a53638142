"""ilora: instance-wise LoRA. Gated multi-expert low-rank updates, fused, for any linear layer (arXiv 2408.10159)."""

from . import reference
from .adapter.config import ILoRAConfig
from .adapter.merging import merge, unmerge
from .adapter.record import (
    adapter_parameters,
    adapters,
    ilora_layers,
    print_trainable_parameters,
    targets,
    trainable_parameters,
)
from .adapter.switch import add_adapter, delete_adapter, disable_adapter, set_adapter
from .current_gate import gated
from .gates.collate import GateCollator
from .gates.networks import GateNetwork, PromptGate, SequenceGate, UniformGate
from .gates.scoring import PromptScoring, prompt_lengths
from .gates.stats import GateStats, balance_loss, gate_stats, plot_gates
from .grouped.functional import grouped_linear, grouped_update
from .grouped.names import adapter_losses
from .layer import ILoRALinear
from .model.inject import eject, gate_of, inject, last_gate, share_inputs
from .model.loading import from_peft, load_adapter, to_peft
from .op.backends import BackendUnavailable, available_backends
from .op.functional import ilora_linear, ilora_update
from .storage.files import AdapterError
from .storage.save import push_adapter, save_adapter

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
    "PromptScoring",
    "SequenceGate",
    "UniformGate",
    "adapter_losses",
    "adapter_parameters",
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
    "grouped_linear",
    "grouped_update",
    "ilora_layers",
    "ilora_linear",
    "ilora_update",
    "inject",
    "last_gate",
    "load_adapter",
    "merge",
    "plot_gates",
    "print_trainable_parameters",
    "prompt_lengths",
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
