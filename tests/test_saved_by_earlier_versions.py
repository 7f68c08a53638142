"""Adapters that earlier versions saved (`saved/make.py` says how) load to the bit, compute what they computed then, and
are saved again as the same bytes. Only public functions are used: this is the contract, whatever is behind them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from saved_cases import BASES, NormedGate, assert_same_state

import ilora
from ilora.storage.save import NOTICE

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SAVED = Path(__file__).parent / "saved"
VERSIONS = [path.parent for path in sorted(SAVED.glob("*/bases"))]
ADAPTERS = [path for version in VERSIONS for path in sorted((version / "adapters").iterdir())]
LORAS = [path for version in VERSIONS for path in sorted((version / "peft").iterdir())]
EQUAL = ("adapter_model.safetensors", "adapter_config.json", "ilora_gate.safetensors", "model.safetensors")
OWN_GATES = {"saved_cases.NormedGate": NormedGate}


def ids_of(path):
    return f"{path.parent.parent.name}-{path.name}"


def read(file):
    """(tensors, metadata)"""
    with safetensors.safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def expected(case, prefix=""):
    """(the model's arguments, its output, how it was made) of a case's folder."""
    tensors, how = read(case.parent.parent / "expected" / f"{prefix}{case.name}.safetensors")
    arguments = {key.removeprefix("in."): value for key, value in tensors.items() if key != "out"}
    return arguments, tensors["out"], how


def base_for(case, how):
    """The model that the case was saved from, whatever initial weights its class has by now."""
    model = BASES[how["base"]]()
    model.load_state_dict(read(case.parent.parent / "bases" / f"{how['base']}.safetensors")[0])
    return model.to(getattr(torch, how.get("dtype", "float32")))


def own_gate(case):
    """A new gate network of the class that only its owner can build, else None."""
    gate = json.loads((case / "ilora_config.json").read_text())["gate"]
    return OWN_GATES[gate["class"]]() if gate and gate["type"] == "custom" else None


def loaded(case):
    how = expected(case)[2]
    return ilora.load_adapter(base_for(case, how), case, gate=own_gate(case))


def files_of(case):
    """Every tensor of the adapter's files, by its name in the injected model."""
    tensors = {}
    for key, value in read(case / "adapter_model.safetensors")[0].items():
        assert key.startswith("base_model.model.")
        tensors[re.sub(r"\.(lora_[AB])\.weight$", r".\1", key.removeprefix("base_model.model."))] = value
    if (case / "ilora_gate.safetensors").exists():
        network = read(case / "ilora_gate.safetensors")[0]
        tensors |= {f"ilora_gate.{key}": value for key, value in network.items()}
    return tensors


def assert_holds(model, tensors):
    """The model has these tensors to the bit, and trains those of them that are parameters and nothing else."""
    state, parameters = model.state_dict(), dict(model.named_parameters())
    assert any(name.endswith(".lora_A") for name in tensors)
    assert_same_state({name: state[name] for name in tensors}, tensors)
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trainable == tensors.keys() & parameters.keys()


@torch.no_grad()
def overwrite(model, names):
    """Puts threes into these parameters and buffers."""
    state = model.state_dict()
    for name in names:
        state[name].fill_(3)


@torch.no_grad()
def assert_computes(model, arguments, output):
    """In float32: the values are of the adapter's dtype, the rounding of products is of the processor."""
    result = model.float().eval()(**arguments)
    result = result if isinstance(result, torch.Tensor) else result.logits
    torch.testing.assert_close(result, output, rtol=1e-5, atol=1e-5 * output.abs().max().item())


def content(file):
    """The bytes of a file; of what PEFT reads without the field that tells it of the gate, which came later."""
    if file.name != "adapter_config.json":
        return file.read_bytes()
    fields = json.loads(file.read_text())
    fields.pop(NOTICE, None)
    return json.dumps(fields)


def assert_same_files(new, old, names=EQUAL):
    for name in names:
        assert (new / name).exists() == (old / name).exists(), name
        assert not (old / name).exists() or content(new / name) == content(old / name), name


def assert_saved_again(new, old):
    assert_same_files(new, old)
    settings = [json.loads((path / "ilora_config.json").read_text()) for path in (new, old)]
    for key in ("config", "gate"):
        assert settings[0][key] == settings[1][key]


def test_nothing_is_lost():
    assert "0.1.0" in [version.name for version in VERSIONS]
    for version in VERSIONS:
        cases = [path.name for path in (version / "adapters").iterdir()]
        cases += [f"peft_{path.name}" for path in (version / "peft").iterdir()]
        assert sorted(cases) == sorted(path.stem for path in (version / "expected").iterdir())
    assert (len(ADAPTERS), len(LORAS)) >= (29, 6)


@pytest.mark.parametrize("case", ADAPTERS, ids=ids_of)
def test_an_adapter_is_what_it_was(case, tmp_path):
    arguments, output, how = expected(case)
    model = loaded(case)
    assert_holds(model, files_of(case))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == json.loads(how["trainable"])  # an optimizer's state is by this order
    if (case / "model.safetensors").exists():
        model.save_pretrained(tmp_path / "again")
    else:
        assert ilora.save_adapter(model, tmp_path / "again") == tmp_path / "again"
    assert_saved_again(tmp_path / "again", case)
    assert_computes(model, arguments, output)


@pytest.mark.parametrize("case", ADAPTERS, ids=ids_of)
def test_values_are_overwritten_and_the_base_comes_back(case):
    arguments, output, how = expected(case)
    model = loaded(case)
    where = {name: id(parameter) for name, parameter in model.named_parameters()}
    overwrite(model, files_of(case))
    assert ilora.load_adapter(model, case) is model
    assert where == {name: id(parameter) for name, parameter in model.named_parameters()}  # an optimizer keeps them
    assert_holds(model, files_of(case))
    plain = ilora.eject(model)
    assert_same_state(plain.state_dict(), base_for(case, how).state_dict())
    again = ilora.load_adapter(plain, case, gate=own_gate(case))
    assert_computes(again, arguments, output)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
@pytest.mark.parametrize("first", ["one", "two"])
def test_several_adapters_of_one_model(version, first, tmp_path):
    cases = {name: version / "adapters" / f"several_{name}" for name in ("one", "two")}
    model = base_for(cases["one"], {"base": "llama"})
    for name in sorted(cases, key=lambda name: name != first):
        ilora.load_adapter(model, cases[name], name=name)
    assert set(ilora.adapters(model)) == {"one", "two"}
    for name, case in cases.items():
        ilora.save_adapter(model, tmp_path / name, name=name)
        assert_saved_again(tmp_path / name, case)
        arguments, output, _ = expected(case)
        ilora.set_adapter(model, name)
        assert_holds(model, files_of(case))
        assert_computes(model, arguments, output)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_trainer_resumes_from_the_models_own_names(version):
    case = version / "adapters" / "save_pretrained"
    arguments, output, _ = expected(case)
    model = loaded(case)
    overwrite(model, files_of(case))
    values = read(case / "model.safetensors")[0]
    assert_same_state(dict(sorted(values.items())), dict(sorted(files_of(case).items())))
    result = model.load_state_dict(values, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_holds(model, files_of(case))
    assert_computes(model, arguments, output)


@pytest.mark.parametrize("case", LORAS, ids=ids_of)
def test_a_lora_of_peft_becomes_what_it_became(case, tmp_path):
    arguments, output, how = expected(case, "peft_")
    model = ilora.from_peft(case, 4, model=base_for(case, how))
    assert_holds(model, files_of(case))
    became = case.parent.parent / "adapters" / f"from_peft_{case.name}"
    if became.exists():
        ilora.save_adapter(model, tmp_path / "again")
        assert_saved_again(tmp_path / "again", became)
    assert_computes(model, {"input_ids": arguments["input_ids"], "ilora_gate": torch.full((1, 4), 0.25)}, output)


@pytest.mark.parametrize("case", LORAS, ids=ids_of)
def test_peft_computes_what_it_computed(case):
    peft = pytest.importorskip("peft")
    arguments, output, how = expected(case, "peft_")
    model = peft.PeftModel.from_pretrained(base_for(case, how), str(case))
    assert_computes(model, {"input_ids": arguments["input_ids"]}, output)


@pytest.mark.parametrize("case", [case for case in LORAS if case.name.startswith("exported")], ids=ids_of)
def test_an_export_is_what_it_was(case, tmp_path):
    arguments, output, how = expected(case, "peft_")
    model = ilora.load_adapter(base_for(case, how), case.parent.parent / "adapters" / how["source"])
    ilora.to_peft(model, arguments["ilora_gate"], tmp_path / "again")
    assert_same_files(tmp_path / "again", case)
    assert_computes(model, arguments, output)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_the_state_of_a_single_layer(version):
    tensors, _ = read(version / "layer.safetensors")
    x, gate, output = (tensors.pop(name) for name in ("in.x", "in.gate", "out"))
    layer = ilora.ILoRALinear(torch.nn.Linear(6, 5), r=4, num_experts=4, lora_alpha=12)
    layer.load_state_dict(tensors)
    torch.testing.assert_close(layer(x, gate=gate), output, rtol=1e-5, atol=1e-5)


def test_make_overwrites_nothing(monkeypatch):
    monkeypatch.syspath_prepend(SAVED)
    import make

    monkeypatch.setattr(make, "OUT", SAVED / "0.1.0")
    before = {file: file.read_bytes() for file in make.OUT.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit, match="is there already"):
        make.main()
    assert before == {file: file.read_bytes() for file in before}


def test_a_changed_file_would_be_seen(tmp_path):
    case = SAVED / "0.1.0" / "adapters" / "dense"
    shutil.copytree(case, tmp_path / "dense")
    tensors, metadata = read(tmp_path / "dense" / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    safetensors.save_file(tensors, tmp_path / "dense" / "adapter_model.safetensors", metadata)
    with pytest.raises(ilora.AdapterError, match=r"adapter_model\.safetensors"):
        ilora.load_adapter(base_for(case, {"base": "llama"}), tmp_path / "dense")
    model = ilora.load_adapter(base_for(case, {"base": "llama"}), tmp_path / "dense", verify=False)
    with pytest.raises(AssertionError):
        assert_holds(model, files_of(case))
    arguments, output, _ = expected(case)
    with pytest.raises(AssertionError):
        assert_computes(model, arguments, output)
