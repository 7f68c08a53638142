"""dev.py: whose folder a relative path is of, and what is run there."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(monkeypatch):
    """Runs dev.py, which installs nothing and starts nothing, from a folder: (the program, its last command, where)."""

    def from_folder(folder, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["dev.py", *arguments])
        spec, ran = importlib.util.spec_from_file_location("dev", ROOT / "dev.py"), []
        dev = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(dev)
        dev.install = dev.pip = lambda *arguments: None
        monkeypatch.setattr(subprocess, "call", lambda command, cwd: ran.append((command, Path(cwd))) or 0)
        assert dev.main() == 0
        assert ran[-1][0][0] == str(dev.PYTHON)
        return dev, *ran[-1]

    return from_folder


@pytest.mark.parametrize(
    ("job", "scripts"),
    [("bench", ["benchmarks/bench_moe_lora.py"]), ("example", ["examples/smollm2_text.py"]), ("shell", [])],
)
def test_a_persons_paths_are_of_their_folder(run, job, scripts, tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_VENV", "mine")
    dev, command, folder = run(tmp_path, job, "--text", "notes.txt")
    assert (command[1:], folder) == ([*(str(ROOT / script) for script in scripts), "--text", "notes.txt"], tmp_path)
    assert tmp_path / "mine" == dev.VENV


def test_tests_run_in_the_checkout_whatever_their_paths_are_relative_to(run):
    here, rest = ROOT / "tests", ["tests/test_ops.py", "-k", "cuda", "-n2"]
    _, command, folder = run(here, "test", "-x", "test_dev.py::test_x", "cuda", *rest)
    assert command[-7:] == ["-x", f"{here}/test_dev.py::test_x", f"{here}/cuda", *rest]
    assert folder == ROOT
