"""GateCollator: columns kept, packed examples told apart; with plain collators and in TRL's SFTTrainer."""

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

import training_worker as worker  # noqa: E402
import transformers as hf  # noqa: E402


def flattening(**options):
    return hf.DataCollatorWithFlattening(**options)


def uneven(n=4, column="ilora_z", width=6):
    """Examples of 3, 4, 5, ... tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 61, (3 + i,), generator=generator).tolist() for i in range(n)]
    rows = torch.softmax(2 * torch.randn(n, width, generator=generator), -1).tolist()
    return [{"input_ids": i, "labels": i, column: row} for i, row in zip(ids, rows, strict=True)]


def padding(features):
    """A plain collator that knows nothing of iLoRA."""
    length = max(len(f["input_ids"]) for f in features)
    fills = {"input_ids": 0, "labels": -100}
    pad = {n: [f[n] + [fill] * (length - len(f[n])) for f in features] for n, fill in fills.items()}
    pad["attention_mask"] = [[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features]
    return {name: torch.tensor(rows) for name, rows in pad.items()}


def z_gated():
    model = worker.tiny_llama()
    torch.manual_seed(1)
    ilora.inject(model, ilora.ILoRAConfig(r=8, num_experts=4), gate=ilora.SequenceGate(6, 4))
    torch.nn.init.normal_(model.ilora_gate.weight, std=2.0)
    for layer in ilora.ilora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    return model.train()


def test_padded_batches_get_the_columns_and_no_segments():
    batch = ilora.GateCollator(padding)(uneven())
    assert set(batch) == {"input_ids", "labels", "attention_mask", "ilora_z"}
    assert batch["ilora_z"].dtype == torch.float32
    assert batch["ilora_z"].tolist() == torch.tensor([f["ilora_z"] for f in uneven()]).tolist()
    assert set(ilora.GateCollator(padding)([{"input_ids": [1], "labels": [1]}])) == set(batch) - {"ilora_z"}


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_position_ids": False}])
def test_flattened_examples_are_instances(options):
    batch = ilora.GateCollator(flattening(**options))(uneven(3))
    assert batch["ilora_segments"].dtype == torch.int32
    assert batch["ilora_segments"].tolist() == [0, 3, 7, 12]
    assert batch["ilora_z"].shape == (3, 6)


def test_a_flattened_batch_of_one():
    collator = ilora.GateCollator(flattening(return_flash_attn_kwargs=True))
    batch = collator(uneven(1))
    assert batch["ilora_segments"].tolist() == [0, 3]
    z_gated()(**batch)


def test_packed_equals_unpacked():
    model, losses, gradients = z_gated(), [], []
    # Labels start behind the first token, where the flattening collator separates its sequences.
    for collate in (padding, flattening()):
        batch = ilora.GateCollator(collate)(uneven())
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss  # with a cache transformers' mask mixes packed sequences
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)
    without = flattening()([{n: f[n] for n in ("input_ids", "labels")} for f in uneven()])
    z = torch.tensor([f["ilora_z"] for f in uneven()])
    with pytest.raises(ValueError, match="ilora_segments"):
        model(**without, ilora_z=z)


def packed_feature(n=3, lengths=True, rows=None):
    examples = uneven(n)
    feature = {name: sum((f[name] for f in examples), []) for name in ("input_ids", "labels")}
    feature["ilora_z"] = [f["ilora_z"] for f in examples][:rows]
    return feature | ({"seq_lengths": [len(f["input_ids"]) for f in examples]} if lengths else {})


def rows_with_positions(features):
    """Packed rows, right-padded, one for each feature; not flattened."""
    batch = padding(features)
    starts = [[p for n in f["seq_lengths"] for p in range(n)] for f in features]
    length = batch["input_ids"].shape[1]
    batch["position_ids"] = torch.tensor([s + list(range(length - len(s))) for s in starts])
    return batch


def test_seq_lengths_make_instances_of_documents():
    batch = ilora.GateCollator(flattening())([packed_feature(3), packed_feature(2)])
    assert batch["ilora_segments"].tolist() == [0, 3, 7, 12, 15, 19]
    assert batch["ilora_z"].shape == (5, 6)
    batch = ilora.GateCollator(rows_with_positions)([packed_feature(3), packed_feature(2)])
    assert batch["ilora_segments"].tolist() == [0, 3, 7, 12, 15, 24]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda: uneven(2) + [{"input_ids": [1], "labels": [1]}], "ilora_z: 1 of the batch's 3"),
        (lambda: uneven(2) + uneven(1, width=5), r"ilora_z.*different lengths, \[5, 6\]"),
        (lambda: [packed_feature(rows=2)], r"ilora_z: expected \[3, width\]"),
        (lambda: [packed_feature(lengths=False)], "ilora_z: expected one row"),
        (lambda: [packed_feature() | {"seq_lengths": [3, 4, 50]}], r"seq_lengths: \[3, 4, 50\] of an example of 12"),
    ],
    ids=["missing", "width", "documents", "no-lengths", "too-long"],
)
def test_refusals_name_the_column(features, message):
    with pytest.raises(ValueError, match=message):
        ilora.GateCollator(flattening())(features())


def test_unknown_boundaries_are_refused():
    def restarting(features):
        ids = torch.tensor([f["input_ids"] for f in features])
        return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0]])}

    with pytest.raises(ValueError, match="seq_lengths"):
        ilora.GateCollator(restarting)(uneven(1))
    with pytest.raises(ValueError, match="3 examples became 2 rows"):
        ilora.GateCollator(lambda features: padding(features[:2]))(uneven(3))
