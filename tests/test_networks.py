"""Gate networks: literals worked by hand, gradients, independence of rows, settings, and which tokens they may read."""

import json
import math

import pytest
import torch

from ilora.gates.networks import (
    GATE_TYPES,
    PromptGate,
    SequenceGate,
    UniformGate,
    gate_from_settings,
)
from ilora.gates.pooling import masked_mean, prompt_mask

KINDS = ["dense", "topk", "mlp", "noisy"]
LN2 = math.log(2)
X, MASK = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)


def with_weight(net, weight):
    with torch.no_grad():
        net.weight.copy_(torch.tensor(weight))
    return net


def random_gate(kind, **settings):
    torch.manual_seed(0)
    net = SequenceGate(5, 4, kind, **settings).double()
    for p in net.parameters():
        torch.nn.init.normal_(p)
    return net


def test_dense_is_the_softmax_of_a_product_over_the_temperature():
    net = with_weight(SequenceGate(2, 2), [[[LN2, 0.0], [0.0, LN2]]])
    gate = net(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    torch.testing.assert_close(gate, torch.tensor([[2 / 3, 1 / 3], [1 / 5, 4 / 5], [1 / 2, 1 / 2]]))
    assert gate.dtype == torch.float32
    assert gate.is_contiguous()
    net = with_weight(SequenceGate(1, 2, temperature=0.5), [[[LN2], [0.0]]])
    torch.testing.assert_close(net(torch.ones(1, 1)), torch.tensor([[4 / 5, 1 / 5]]))


def test_topk_renormalises_the_largest_and_zeroes_the_rest():
    net = with_weight(SequenceGate(1, 4, "topk", top_k=2), [[[0.0], [LN2], [-1.0], [2 * LN2]]])
    gate = net(torch.ones(1, 1))
    torch.testing.assert_close(gate, torch.tensor([[0.0, 1 / 3, 0.0, 2 / 3]]))
    assert (gate[0, [0, 2]] == 0).all()
    assert net(torch.zeros(1, 1)).tolist() == [[0.5, 0.5, 0.0, 0.0]]  # a tie goes to the lower experts


def test_mlp_is_two_layers():
    net = with_weight(SequenceGate(1, 2, "mlp", hidden_dim=1), [[[1.0], [0.0]]])
    with torch.no_grad():
        net.hidden_weight.fill_(2.0)
        net.hidden_bias.fill_(1.0)
    silu3 = 3 / (1 + math.exp(-3))
    expected = math.exp(silu3) / (math.exp(silu3) + 1)
    torch.testing.assert_close(net(torch.ones(1, 1)), torch.tensor([[expected, 1 - expected]]))


@pytest.mark.parametrize(("z_dim", "width"), [(64, 64), (3, 16), (4096, 256)])
def test_mlp_hidden_width_is_bounded(z_dim, width):
    assert SequenceGate(z_dim, 4, "mlp").weight.shape == (1, 4, width)


@pytest.mark.parametrize("net", [lambda: SequenceGate(5, 4, "noisy"), lambda: SequenceGate(5, 4, dropout=0.5)])
def test_noise_and_dropout_in_training_only(net):
    net, z = net(), torch.randn(8, 5)
    assert not torch.equal(net(z), net(z))
    assert torch.equal(net.eval()(z), net(z))
    assert torch.equal(net(z), (z @ net.weight[0].T).softmax(-1))


def test_noise_has_the_scale_of_a_softplus():
    net = with_weight(SequenceGate(1, 2, "noisy"), [[[0.0], [0.0]]])
    torch.manual_seed(0)
    gate = net(torch.ones(20_000, 1))  # noise_weight is 0: each logit has std softplus(0) = ln 2
    logits = (gate[:, 0] / gate[:, 1]).log().detach()
    assert float(logits.std()) == pytest.approx(LN2 * 2**0.5, rel=0.03)
    gate[:, 0].sum().backward()
    assert net.noise_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_gradients(kind, per_layer):
    net = random_gate(kind, per_layer=per_layer, num_layers=2 if per_layer else 1).eval()
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in net.named_parameters() if name != "noise_weight"]
    values = [p.detach().clone().requires_grad_() for name, p in net.named_parameters() if name in names]

    def gate(z, *values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (z,))

    assert torch.autograd.gradcheck(gate, (z, *values))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind):
    net, z = random_gate(kind).eval(), torch.randn(7, 5, dtype=torch.float64)
    gate = net(z)
    torch.testing.assert_close(gate.sum(-1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(torch.cat([net(row[None]) for row in z]), gate, rtol=1e-12, atol=0)
    assert net(z[:0]).shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_one_gate_for_each_layer(kind):
    net = SequenceGate(5, 4, kind, per_layer=True).eval()
    net.bind(4, 3)
    z = torch.randn(2, 5)
    gate = net(z)
    assert gate.shape == (3, 2, 4)
    assert gate.is_contiguous()
    assert not torch.equal(gate[0], gate[1])
    one = SequenceGate(5, 4, kind).eval()
    for layer in range(3):
        one.load_state_dict({name: p[layer : layer + 1] for name, p in net.state_dict().items()})
        torch.testing.assert_close(one(z), gate[layer])


def test_starts_near_uniform_but_distinct():
    for kind in ("dense", "mlp"):
        gate = SequenceGate(64, 4, kind)(torch.randn(50, 64))
        assert 0 < (gate - 0.25).abs().max() < 0.25
        assert len(set(gate[0].tolist())) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computes_in_float32_whatever_comes_in(dtype):
    net, z = SequenceGate(5), torch.randn(3, 5).to(dtype)
    assert torch.equal(net(z), net(z.float()))
    if dtype != torch.float64:
        net.to(dtype)
        gate = net(z)
        assert gate.dtype == torch.float32
        torch.testing.assert_close(gate, (z.float() @ net.weight[0].float().T).softmax(-1))
    assert net.double()(z.float()).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_it(kind):
    net, z = random_gate(kind).float().eval(), torch.randn(3, 5)
    expected = net(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(z), expected)


def test_bind_keeps_what_fits():
    net = SequenceGate(5)
    weight = net.weight
    net.bind(4, 12, 64)
    assert net.weight is weight
    assert net.num_layers == 1
    with pytest.raises(ValueError, match="num_experts: expected this gate network's 4, got 8"):
        net.bind(8, 12, 64)
    layered = SequenceGate(5, per_layer=True)
    layered.bind(4, 3)
    weight = layered.weight
    layered.bind(4, 3)
    assert layered.weight is weight
    with pytest.raises(ValueError, match="num_layers: expected 3, .* got 5"):
        layered.bind(4, 5)
    assert layered.weight is weight


def test_bind_builds_what_waited():
    net = PromptGate(kind="noisy", per_layer=True).to(torch.bfloat16)
    with pytest.raises(ValueError, match="hidden_size"):
        net.bind(4, 3)
    net.bind(4, 3, 8)
    assert net.weight.shape == net.noise_weight.shape == (3, 4, 8)
    assert net.weight.dtype == torch.bfloat16
    assert net(torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)).shape == (3, 2, 4)
    weight = net.weight
    net.bind(4, 3, 8)
    assert net.weight is weight
    with pytest.raises(ValueError, match="hidden_size: expected this PromptGate's 8, got 16"):
        net.bind(4, 3, 16)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    "net",
    [
        lambda: SequenceGate(5, 3, "mlp", hidden_dim=7, temperature=2, dropout=0.1, balance=0.01),
        lambda: SequenceGate(5, 3, "topk", top_k=1, per_layer=True),
        lambda: PromptGate(3, "noisy", per_layer=True, min_tokens=4),
        lambda: PromptGate(3, "mlp", 6),
        lambda: UniformGate(3),
    ],
)
def test_settings_round_trip(net, bound):
    net = net()
    if bound:
        net.bind(3, 2, 6)
    settings = json.loads(json.dumps(net.settings()))
    same = type(net)(**settings)
    assert same.settings() == net.settings()
    same.load_state_dict(net.state_dict())
    again = gate_from_settings({"type": type(net).__name__, **settings})
    assert type(again) is type(net)
    again.load_state_dict(net.state_dict())
    assert repr(again) == repr(net)


BAD = {  # of SequenceGate
    "z_dim": ("4", True, 0, 10**400),
    "num_experts": (0, 2**31),
    "kind": ("sparse", ["dense"]),
    "top_k": (0, 1.5),
    "hidden_dim": (0,),
    "temperature": (0, math.nan),
    "dropout": (1.0,),
    "balance": (math.inf,),
    "per_layer": (1,),
    "num_layers": (2,),
}
BAD_SETTINGS = [
    *(({"type": "SequenceGate", "z_dim": 4, key: value}, f"^{key}: expected") for key in BAD for value in BAD[key]),
    ({"type": "SequenceGate", "z_dim": 4, "kind": "topk", "top_k": 5}, "top_k: expected an integer from 1 to"),
    ({"type": "SequenceGate", "z_dim": 10**6, "num_experts": 10**6}, "weights"),
    ({"type": "SequenceGate", "z_dim": 4, "evil": 1}, "evil"),
    ({"type": "SequenceGate"}, "z_dim"),
    ({"type": "PromptGate", "hidden_size": 0}, "hidden_size: expected None or an integer >= 1, got 0"),
    ({"type": "PromptGate", "min_tokens": -1}, "min_tokens: expected an integer >= 0, got -1"),
    ({"type": "UniformGate", "num_experts": 0}, "num_experts: expected"),
    ({"type": "UniformGate", 3: 4}, "string"),
    ({"type": "Nope"}, "SequenceGate, PromptGate, UniformGate, got 'Nope'"),
    ({"type": ["SequenceGate"]}, "got"),
    ({}, "got None"),
    (None, "dict"),
]


@pytest.mark.parametrize(("settings", "words"), BAD_SETTINGS)
def test_settings_from_a_file_are_not_trusted(settings, words):
    with pytest.raises(ValueError, match=words):
        gate_from_settings(settings)


def test_uniform():
    assert set(GATE_TYPES) == {"SequenceGate", "PromptGate", "UniformGate"}
    assert UniformGate(4)(2, torch.device("cpu")).tolist() == [[0.25] * 4] * 2
    assert UniformGate(1)(1).tolist() == [[1.0]]
    assert not list(UniformGate().parameters())


def test_prompt_gate_by_hand():
    net = with_weight(PromptGate(2, hidden_size=2), [[[LN2, 0.0], [0.0, 0.0]]])
    embeddings = torch.tensor([[[9.0, 9.0], [3.0, 1.0], [5.0, -1.0]], [[1.0, 2.0]] * 3])
    mask = torch.tensor([[False, True, True], [False, False, False]])
    # The mean (4, 0) normalises to (1, -1), so the logits are (ln 2, 0); no tokens give logits 0.
    torch.testing.assert_close(net(embeddings, mask), torch.tensor([[2 / 3, 1 / 3], [1 / 2, 1 / 2]]))


def test_prompt_gate_does_not_depend_on_scale_or_padding():
    torch.manual_seed(0)
    net = PromptGate(4, "mlp", 64)
    embeddings, mask = torch.randn(2, 9, 64), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4:] = False
    gate = net(embeddings, mask)
    torch.testing.assert_close(net(embeddings * 1e-4, mask), gate, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net(embeddings[:1, :4], mask[:1, :4]), gate[:1])
    embeddings[0, 4:] = math.nan
    assert torch.equal(net(embeddings, mask), gate)


def test_prompt_gate_packed_equals_unpacked():
    torch.manual_seed(0)
    net = PromptGate(4, hidden_size=8, per_layer=True).double()
    net.bind(4, 3, 8)
    lengths, L = [3, 0, 5, 1], 5
    segments = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    rows = torch.randn(9, 8, dtype=torch.float64)
    kept = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    embeddings, mask = torch.zeros(4, L, 8, dtype=torch.float64), torch.zeros(4, L, dtype=torch.bool)
    for i, n in enumerate(lengths):
        embeddings[i, :n], mask[i, :n] = rows[segments[i] : segments[i] + n], kept[segments[i] : segments[i] + n]
    expected = net(embeddings, mask)
    assert expected.isfinite().all()
    torch.testing.assert_close(net(rows[None], kept[None], segments), expected)
    shape = (3, 3)  # segments are over the flattened rows, however these were batched
    torch.testing.assert_close(net(rows.view(*shape, 8), kept.view(shape), segments.long()), expected)


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 2, 2, 6], dtype=torch.int32)])
def test_prompt_gate_gradients(segments):
    torch.manual_seed(0)
    net = PromptGate(3, hidden_size=4).double()
    torch.nn.init.normal_(net.weight)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: net(x, mask, segments), (x,))
    net(x, torch.zeros_like(mask), segments)[:, 0].sum().backward()
    assert x.grad.abs().sum() == 0  # not nan: nothing was read


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 3, 6], dtype=torch.int32)])
def test_prompt_gate_computes_in_float32(segments):
    net, x = PromptGate(4, hidden_size=8), X.bfloat16()
    expected = net(x.float(), MASK)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(net(x, MASK), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(net(x, MASK, segments), expected)
    x = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
    x[0, 1::2] = 1 / 128  # a bfloat16 sum would stick at 256
    ends = None if segments is None else torch.tensor([0, 4096])
    assert masked_mean(x, torch.ones(1, 4096, dtype=torch.bool), ends, torch.float32).item() == (1 + 1 / 128) / 2


REFUSED = [  # (function, its arguments, error, message)
    (SequenceGate(5), (torch.randn(2, 4),), ValueError, r"z: expected \[N, z_dim=5\], got \[2, 4\]"),
    (SequenceGate(5), (torch.randn(5),), ValueError, r"z: expected .* got \[5\]"),
    (SequenceGate(5), (torch.ones(2, 5, dtype=torch.int64),), TypeError, "z: expected a float tensor, got torch.int64"),
    (SequenceGate(5), ([1.0],), TypeError, "z: expected a float tensor .* got list"),
    (PromptGate(), (X, MASK), RuntimeError, "hidden_size is not known yet"),
    (PromptGate(4, hidden_size=8), (X[..., :4], MASK), ValueError, r"expected \[B, L, H=8\], got \[2, 3, 4\]"),
    (PromptGate(4, hidden_size=8), (X[0], MASK), ValueError, r"got \[3, 8\]"),
    (PromptGate(4, hidden_size=8), (X, MASK[:, :2]), ValueError, r"mask \[B, L\], got .* \[2, 2\]"),
    (PromptGate(4, hidden_size=8), (X, MASK.long()), TypeError, r"bool mask, got .* torch.int64"),
    (prompt_mask, (torch.ones(1, 1, 4, 4), None, (1, 4)), ValueError, r"got \[1, 1, 4, 4\]; pass ilora_prompt_mask"),
    (prompt_mask, (None, torch.ones(2), (2, 4)), ValueError, r"labels: expected \[B, L\] = \[2, 4\], got \[2\]"),
    (prompt_mask, ({"full": None}, None, (2, 4)), ValueError, "attention_mask: .* got dict"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "words"), REFUSED)
def test_refusals_name_the_argument(function, arguments, error, words):
    with pytest.raises(error, match=words):
        function(*arguments)


def bits(mask):
    return ["".join(str(int(v)) for v in row) for row in mask]


def rows(*texts):
    return torch.tensor([[int(c) for c in text] for text in texts])


def labels(*texts):
    """A letter is a label, a dot is -100."""
    return torch.tensor([[-100 if c == "." else ord(c) for c in text] for text in texts])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_mask_without_labels_is_what_is_attended(dtype):
    assert bits(prompt_mask(rows("0011", "1110").to(dtype), None, (2, 4))) == ["0011", "1110"]
    assert bits(prompt_mask(None, None, (1, 3), device="cpu")) == ["111"]


@pytest.mark.parametrize(
    ("attended", "labelled", "min_tokens", "expected"),
    [
        ("11111", "...ab", 1, "11100"),  # instruction tuning
        ("00111", "...ab", 1, "00100"),  # left padding
        ("11100", "..a..", 1, "11000"),  # right padding
        ("11111", "abcde", 1, "10000"),  # plain language modelling
        ("11111", "abcde", 3, "11100"),
        ("11111", "abcde", 9, "11111"),
        ("11111", "abcde", 0, "00000"),
        ("00111", "..abc", 2, "00110"),  # min_tokens counts attended tokens
        ("00111", "ab..c", 1, "00110"),  # a label on padding is nobody's answer
        ("11111", "..a.b", 1, "11000"),  # what follows an answer has seen it
        ("11111", ".....", 1, "11111"),
        ("00000", "..abc", 1, "00000"),
    ],
)
def test_mask_stops_at_the_first_label(attended, labelled, min_tokens, expected):
    mask = prompt_mask(rows(attended), labels(labelled), (1, 5), min_tokens)
    assert mask.dtype == torch.bool
    assert bits(mask) == [expected]
    beside = prompt_mask(rows("11111", attended), labels("a....", labelled), (2, 5), min_tokens)
    assert bits(beside[1:]) == [expected]


def test_mask_of_packed_rows():
    segments = torch.tensor([0, 4, 4, 7, 10], dtype=torch.int32)  # the second instance is empty
    packed = labels("..ab" + "..." + "abc")
    assert bits(prompt_mask(None, packed, (1, 10), 1, segments=segments)) == ["1100" + "111" + "100"]
    attended = rows("0111" + "110" + "011")
    assert bits(prompt_mask(attended, packed, (1, 10), 1, segments)) == ["0100" + "110" + "010"]
    two = prompt_mask(None, packed.view(2, 5), (2, 5), 2, segments)
    assert bits(two) == ["1100" + "1", "11" + "110"]
    empty_ends = torch.tensor([0, 0, 10, 10])
    assert bits(prompt_mask(None, packed, (1, 10), 1, empty_ends)) == ["1100000000"]


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind):
    torch._dynamo.reset()
    net, z = random_gate(kind).float().eval(), torch.randn(3, 5)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(z), net(z))


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 2, 6], dtype=torch.int32)])
def test_prompt_gate_compiles_in_one_graph(segments):
    torch._dynamo.reset()
    net, x = PromptGate(4, hidden_size=8), torch.randn(2, 3, 8)

    def gate(x, attended, labelled):
        return net(x, prompt_mask(attended, labelled, (2, 3), net.min_tokens, segments, x.device), segments)

    inputs = (x, rows("111", "011"), labels("..a", "..b"))
    torch.testing.assert_close(torch.compile(gate, backend="eager", fullgraph=True)(*inputs), gate(*inputs))
