"""The README.md files of saved adapters."""

ADAPTER = """---
library_name: ilora
tags: [ilora, lora, peft]
---

# An iLoRA adapter

Instance-wise LoRA ([arXiv 2408.10159](https://arxiv.org/abs/2408.10159)): {experts} experts share a LoRA of rank {r},
and a gate computed once for each instance weighs them. Base model: {base}. Gate network: {gate}.

```python
import ilora

model = ilora.load_adapter(base_model, "path/to/this/directory")  # with the gate: what was trained
```

It is a PEFT adapter as well. PEFT knows no gate and computes the model under the uniform gate, all experts alike:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/directory")
```

| file | what it holds |
|---|---|
| `adapter_config.json`, `adapter_model.safetensors` | low-rank matrices and modules trained whole, for PEFT too |
| `ilora_config.json` | iLoRA's settings, the gate network's, and the SHA-256 sums of the other files |
| `ilora_gate.safetensors` | the gate network's parameters and buffers, if it has a gate network |
"""

PLAIN = """---
library_name: peft
tags: [lora, peft]
---

# A LoRA adapter

An iLoRA under one fixed gate, exported by `ilora.to_peft` as a plain PEFT LoRA: the gate is in `lora_B` and
`lora_alpha`.
"""
