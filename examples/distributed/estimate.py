"""Reckons from shapes what each way of using many GPUs costs: `python examples/distributed/estimate.py`.

For one GPU: its memory, and the bytes that it sends in a training step. Nothing is measured. Assumptions:
- Frozen weights and activations in bfloat16; blocks recomputed in backward, so that only their inputs stay. The adapter
  (all seven projections of each block) in float32 with its gradient and AdamW's moments, 16 bytes a parameter, and so
  its ranks (TOKENS × R).
- Each copy of the model has a batch of its own. A sum over n GPUs sends 2(n-1)/n of its bytes, a gather (n-1)/n.
- FSDP2 gathers the weights twice a step and holds two gathered blocks. Tensor parallel is within 8 GPUs, as torch's
  plans do it: a sum for each row-wise layer in forward and for each column-wise one in backward. A pipeline has 8
  stages and 8 micro-batches under 1F1B. What is left of the GPUs are further copies, which sum the adapter's gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

R, E, SEQUENCES, LENGTH, GROUP = 16, 4, 8, 1024, 8
TOKENS = SEQUENCES * LENGTH
STATE, HALF, FULL = 16, 2, 4  # bytes


@dataclass(frozen=True)
class Shape:
    """A Llama: hidden and intermediate sizes, blocks, features of k and v, vocabulary; its head is not tied."""

    hidden: int
    intermediate: int
    blocks: int
    kv: int
    vocabulary: int

    @property
    def columns(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of the layers of a block that tensor parallelism splits by columns: q, k, v, gate, up."""
        d = self.hidden
        return [(d, d), (d, self.kv), (d, self.kv), (d, self.intermediate), (d, self.intermediate)]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The same for o and down."""
        return [(self.hidden, self.hidden), (self.intermediate, self.hidden)]

    @property
    def block(self) -> int:
        """Parameters of a block."""
        return sum(d_in * d_out for d_in, d_out in self.columns + self.rows) + 2 * self.hidden

    @property
    def weights(self) -> int:
        """Frozen parameters."""
        return self.blocks * self.block + (2 * self.vocabulary + 1) * self.hidden

    @property
    def gate(self) -> int:
        """Parameters of a PromptGate."""
        return E * self.hidden

    def adapter(self, split: int = 1) -> float:
        """Parameters of the adapter in one of `split` GPUs that share each layer."""
        columns = sum(R * d_in + R * d_out / split for d_in, d_out in self.columns)
        rows = sum(R * d_in / split + R * d_out for d_in, d_out in self.rows)
        return self.blocks * (columns + rows)


MODELS = {"8B": Shape(4096, 14336, 32, 1024, 128256), "70B": Shape(8192, 28672, 80, 1024, 128256)}
SCHEMES = ("DDP", "FSDP2", "TP", "FSDP2 × TP", "pipeline")


def summed(count: float, over: int) -> float:
    """What a GPU sends of a sum of `count` elements or bytes over so many."""
    return 2 * count * (over - 1) / over


def cost(shape: Shape, scheme: str, gpus: int) -> tuple[float, float, float, float, float, float]:
    """For one GPU and step: memory of weights, of adapter and gate, of the blocks' inputs; bytes sent for the frozen
    model, for adapter and gate, and for the gate alone."""
    split = GROUP if "TP" in scheme else 1
    stages = GROUP if scheme == "pipeline" else 1
    copies = gpus // split // stages
    sharded = copies if "FSDP2" in scheme else 1
    weights = HALF * shape.weights / split / stages
    inputs = HALF * TOKENS * shape.hidden * shape.blocks / stages
    adapter, gate = shape.adapter(split) / stages, shape.gate
    memory = weights / sharded + (2 * HALF * shape.block / split if sharded > 1 else 0)
    sent_frozen = 2 * weights * (sharded - 1) / sharded
    # Sharded parameters are gathered twice and their gradients reduced to the shards: one and a half sums.
    passes = 1.5 if sharded > 1 else 1
    sent_adapter, sent_gate = passes * summed(FULL * adapter, copies), passes * summed(FULL * gate, copies)
    if split > 1:
        sums, ranks = len(shape.columns) + len(shape.rows), TOKENS * R
        sent_frozen += shape.blocks * sums * summed(HALF * TOKENS * shape.hidden, split)
        sent_adapter += shape.blocks * sums * summed(FULL * ranks, split)
        sent_gate += shape.blocks * len(shape.columns) * summed(FULL * SEQUENCES * E, split)
    if stages > 1:
        sent_frozen += 2 * HALF * TOKENS * shape.hidden  # to the next stage, and the gradient to the one before
        sent_gate += 2 * FULL * SEQUENCES * E
    return memory, STATE * (adapter + gate) / sharded, inputs, sent_frozen, sent_adapter + sent_gate, sent_gate


def copies_of_dropout(shape: Shape) -> int:
    """Bytes that dropout before each layer keeps of one block, as PEFT has it: its output in bfloat16 and a mask."""
    return TOKENS * (HALF + 1) * sum(d_in for d_in, _ in shape.columns + shape.rows)


def table() -> str:
    """A Markdown table of all models, numbers of GPUs and schemes."""
    head = ["model", "GPUs", "scheme", "weights GB", "adapter and gate MB", "block inputs GB"]
    head += ["sent: frozen model GB", "sent: adapter and gate MB", "of which the gate MB"]
    lines = [head, [":--", *["--:"], ":--", *["--:"] * 6]]
    for model, shape in MODELS.items():
        for gpus in (8, 64, 512):
            for scheme in SCHEMES:
                weights, state, inputs, frozen, adapter, gate = cost(shape, scheme, gpus)
                numbers = [f"{weights / 1e9:.1f}", f"{state / 1e6:.1f}", f"{inputs / 1e9:.1f}", f"{frozen / 1e9:.2f}"]
                lines.append([model, str(gpus), scheme, *numbers, f"{adapter / 1e6:.2f}", f"{gate / 1e6:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
