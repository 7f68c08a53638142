"""The definition in plain torch, under its public name: `ilora.reference.ilora_linear`."""

from .op.reference import as_seed, ilora_linear, keep_mask, row_gates, row_instances

__all__ = ["as_seed", "ilora_linear", "keep_mask", "row_gates", "row_instances"]
