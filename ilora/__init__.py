"""ilora: instance-wise LoRA. Gated multi-expert low-rank updates, fused, for any linear layer (arXiv 2408.10159)."""

from . import reference
from .backends import BackendUnavailable, available_backends
from .gate import gated
from .layer import ILoRALinear
from .ops import ilora_linear, ilora_update

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "ILoRALinear",
    "available_backends",
    "gated",
    "ilora_linear",
    "ilora_update",
    "reference",
]
