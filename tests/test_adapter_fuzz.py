"""Two hundred ways to spoil a saved adapter: each an error that names a file, and a model that is what it was."""

import copy
import json
import random
import shutil

import pytest
import torch
from saved_cases import FILES, adapted, assert_same_state, assert_untouched, bits, llama, logits

import ilora
from ilora import AdapterError, ILoRAConfig, SequenceGate
from ilora.storage.files import checksum, digest_of

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")

_, WEIGHTS, CONFIG, GATE = FILES
SETTINGS = {"modules_to_save": ("lm_head",), "rank_pattern": {"q_proj": 4}, "lora_dropout": 0.1}
Z = torch.ones(3, 6)
JUNK = [None, True, -1, 0, 7, 1.5, 1e300, "", "x", [], [1], {}, {"a": 1}, [["q"]], 10**30, "all-linear"]


def rewritten(change):
    """Other bytes in one of the files."""

    def changed(rng, path):
        file = path / rng.choice(FILES)
        file.write_bytes(change(rng, file.read_bytes()))

    return changed


def one_bit(rng, content):
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def noise(rng, content):
    return rng.choice([b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 9999, rng.randbytes(99)])


def delete(rng, path):
    (path / rng.choice(FILES)).unlink()


def swap(rng, path, files=FILES):
    one, two = rng.sample(files, 2)
    (path / one).rename(path / "x")
    (path / two).rename(path / one)
    (path / "x").rename(path / two)


def foreign(rng, path):
    """A good file, of another save."""
    name = rng.choice(FILES)
    shutil.copy(path.parent / "other" / name, path / name)


def spots(value, path=()):
    """Where a JSON value has values in it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from spots(inner, (*path, key))


def edit(rng, fields, free=()):
    """Another value, another type, no value, or one more, somewhere in it. A change to an equal one is none."""
    before = copy.deepcopy(fields)
    while json.dumps(fields) == json.dumps(before):
        top = rng.choice([key for key in fields if key not in free])
        where = (top, *rng.choice(list(spots(fields[top]))))
        inner = fields
        for key in where[:-1]:
            inner = inner[key]
        kind = rng.choice(["junk", "junk", "drop", "add"])
        if kind == "drop":
            del inner[where[-1]]
        elif kind == "add" and isinstance(inner, dict):
            inner["surplus"] = rng.choice(JUNK)
        else:
            inner[where[-1]] = rng.choice(JUNK)


def edit_config(rng, path):
    # What another right value makes a right adapter of stays out: a version, where it runs, a gate's temperature.
    fields = json.loads((path / CONFIG).read_text())
    part = rng.choice(["config", "config", "gate", "files", None])
    free = {"config": ("backend", "adapter_dtype", "expert_pattern", "rank_pattern", "alpha_pattern")}
    free["config"] += ("exclude_modules", "layers_to_transform", "target_modules", "lora_alpha", "lora_dropout")
    free["gate"] = ("temperature", "dropout", "balance", "top_k", "hidden_dim", "kind")
    if part is None:
        edit(rng, fields, free=("config", "gate", "files", "ilora_version", "digest", "vocabulary"))
    else:
        edit(rng, fields[part], free.get(part, ()))
    (path / CONFIG).write_text(json.dumps(fields))


def wrong_settings(rng, path):
    """Values of the right type that do not fit the model, the tensors or each other."""
    fields = json.loads((path / CONFIG).read_text())
    part, key, value = rng.choice(
        [("config", "target_modules", value) for value in (["nope"], ["q_proj"], "(", "norm", ["embed_tokens"], [])]
        + [("config", "layers_to_transform", [0]), ("config", "expert_pattern", {"q_proj": 3})]
        + [("config", "exclude_modules", ["v_proj"]), ("config", "adapter_dtype", "float99")]
        + [("config", "modules_to_save", value) for value in ([], ["nope"], ["norm"], ["lm_head", "norm"])]
        + [("config", "rank_pattern", value) for value in (None, {"q_proj": 8}, {"q_proj": 3}, {"q_proj": 2**40})]
        + [("config", "r", 2**60), ("config", "r", 16), ("config", "num_experts", 2)]
        + [("config", "lora_alpha", "8"), ("config", "lora_alpha", True), ("config", "lora_dropout", 1.0)]
        + [("gate", "z_dim", 7), ("gate", "z_dim", 2**30), ("gate", "num_experts", 2), ("gate", "num_layers", 3)]
        + [("gate", "kind", "mlp"), ("gate", "kind", "noisy"), ("gate", "kind", "maybe"), ("gate", "temperature", -1)]
        + [("gate", "type", value) for value in ("PromptGate", "UniformGate", "custom", "os.system")]
        + [("gate", "per_layer", False), ("gate", "dropout", 1.0), ("gate", "top_k", 0), ("gate", "hidden_dim", "4")]
    )
    fields[part][key] = value
    (path / CONFIG).write_text(json.dumps(fields))


TENSORS = {  # what becomes of one tensor: {key: value} in its place
    "drop": lambda key, value, rng: {},
    "rename": lambda key, value, rng: {rng.choice([key + "x", key.upper(), key[1:] + "_", "base_layer"]): value},
    "transpose": lambda key, value, rng: {key: value.transpose(-1, -2)[..., :3].contiguous()},
    "cut": lambda key, value, rng: {key: value[..., :-1].contiguous()},
    "flat": lambda key, value, rng: {key: value.flatten()},
    "more": lambda key, value, rng: {key: torch.cat([value, value])},
    "int": lambda key, value, rng: {key: value.to(rng.choice([torch.int64, torch.int8]))},
    "bool": lambda key, value, rng: {key: value > 0},
    "surplus": lambda key, value, rng: {key: value, "base_model.model.model.norm.weight": torch.ones(16)},
    "empty": lambda key, value, rng: {key: value[..., :0].contiguous()},
    "exchange": lambda key, value, rng: {key: torch.zeros(2, 3, 5)},
}


def tensors(rng, path):
    """One tensor missing, renamed, of another shape or dtype, or one too many."""
    file = path / rng.choice([WEIGHTS, GATE])
    values = safetensors.load_file(file)
    key = rng.choice(sorted(values))
    values |= TENSORS[rng.choice(sorted(TENSORS))](key, values.pop(key), rng)
    safetensors.save_file(values, file)


def sealed(change):
    """The change with checksums and digest made right again."""

    def changed(rng, path):
        change(rng, path)
        fields = json.loads((path / CONFIG).read_text())
        if change is not edit_config:
            fields["files"] = {name: checksum(path / name) for name in fields["files"]}
        fields["digest"] = digest_of({key: value for key, value in fields.items() if key != "digest"})
        (path / CONFIG).write_text(json.dumps(fields))

    return changed


def cut_tensors(rng, path):
    file = path / rng.choice([WEIGHTS, GATE])
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size - 2)])


CHANGES = {  # name: (change, how many)
    "one bit": (rewritten(one_bit), 20),
    "cut": (rewritten(lambda rng, content: content[: rng.randrange(len(content))]), 14),
    "grown": (rewritten(lambda rng, content: content + rng.randbytes(rng.randrange(1, 40))), 8),
    "noise": (rewritten(noise), 12),
    "deleted": (delete, 8),
    "swapped": (swap, 8),
    "of another save": (foreign, 8),
    "settings": (edit_config, 10),
    "tensors": (tensors, 12),
    "settings, sealed": (sealed(edit_config), 30),
    "unfit settings, sealed": (sealed(wrong_settings), 35),
    "tensors, sealed": (sealed(tensors), 33),
    "cut tensors, sealed": (sealed(cut_tensors), 8),
    "swapped, sealed": (sealed(lambda rng, path: swap(rng, path, FILES[:2] + FILES[3:])), 6),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A good directory and another, a plain model, and an injected one with two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    ilora.save_adapter(adapted(llama(), SequenceGate(6, 4, per_layer=True), **SETTINGS), root / "good")
    other = adapted(llama(), SequenceGate(6, 4, kind="topk"), std=0.3, lora_alpha=3, r=12)
    ilora.save_adapter(other, root / "other")
    plain = llama()
    full = adapted(llama(), SequenceGate(6, 4, per_layer=True), std=0.2, **SETTINGS)
    ilora.add_adapter(full, "second", ILoRAConfig(r=4, num_experts=2))
    ilora.set_adapter(full, "default")
    before = {id(model): (bits(model), logits(model, **call)) for model, call in ((plain, {}), (full, {"ilora_z": Z}))}
    return root, plain, full, before


def test_there_are_two_hundred():
    assert sum(count for _, count in CHANGES.values()) >= 200


@pytest.mark.parametrize("name", CHANGES)
def test_a_spoiled_directory_is_refused_and_the_model_kept(world, name):
    root, plain, full, before = world
    change, count = CHANGES[name]
    for seed in range(count):
        path = root / f"{name}-{seed}"
        shutil.copytree(root / "good", path)
        change(random.Random(f"{name} {seed}"), path)
        for model, adapter in ((plain, "default"), (full, "default"), (full, "third")):
            with pytest.raises(AdapterError) as caught:
                ilora.load_adapter(model, path, name=adapter)
            assert any(str(path / file) in str(caught.value) for file in FILES), (seed, str(caught.value))
            assert_untouched(model, before[id(model)][0])
        shutil.rmtree(path)
    assert ilora.adapters(full) == ("default", "second")
    assert not hasattr(plain, "ilora")
    assert torch.equal(logits(plain), before[id(plain)][1])
    assert torch.equal(logits(full, ilora_z=Z), before[id(full)][1])


def test_the_good_directory_loads(world):
    root, _, full, _ = world
    model = ilora.load_adapter(llama(), root / "good")
    loaded = ilora.load_adapter(copy.deepcopy(full), root / "good")
    assert_same_state(loaded.state_dict(), model.state_dict())
    loaded = ilora.load_adapter(copy.deepcopy(full), root / "other", name="third")
    assert ilora.adapters(loaded) == ("third", "second", "default")
