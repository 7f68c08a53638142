"""dev.py: whose folder a relative path is of, and what is run there."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def dev(monkeypatch):
    """The program, which installs nothing and runs nothing: dev.ran is the commands and their folders."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran = []
    monkeypatch.setattr(module, "install", lambda extras: None)
    monkeypatch.setattr(module, "pip", lambda *arguments: None)
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: module.ran.append((command, Path(cwd))) or 0)
    return module


@pytest.mark.parametrize(
    ("job", "script"), [("bench", "benchmarks/bench_moe_lora.py"), ("example", "examples/smollm2_text.py")]
)
def test_a_persons_paths_are_of_their_folder(dev, job, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dev.py", job, "--text", "notes.txt"])
    assert dev.main() == 0
    command, folder = dev.ran[-1]
    assert command == [str(dev.PYTHON), str(ROOT / script), "--text", "notes.txt"]
    assert folder == tmp_path


def test_shell_is_where_the_person_stands(dev, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dev.py", "shell", "mine.py"])
    dev.main()
    assert dev.ran[-1] == ([str(dev.PYTHON), "mine.py"], tmp_path)


def test_tests_run_in_the_checkout_whatever_their_paths_are_relative_to(dev, monkeypatch):
    monkeypatch.chdir(ROOT / "tests")
    given = ["-x", "test_dev.py::test_x", "cuda", "tests/test_ops.py", "-k", "cuda", "-n2"]
    monkeypatch.setattr("sys.argv", ["dev.py", "test", *given])
    dev.main()
    command, folder = dev.ran[-1]
    here = str(ROOT / "tests")
    wanted = ["-x", f"{here}/test_dev.py::test_x", f"{here}/cuda", "tests/test_ops.py", "-k", "cuda", "-n2"]
    assert command[-len(given) :] == wanted
    assert folder == ROOT


def test_the_environment_is_named_from_the_persons_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ILORA_VENV", "mine")
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert tmp_path / "mine" == module.VENV
