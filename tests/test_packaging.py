"""What is installed and imported, and that the checkout harms nobody."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


# Without the finder of an editable install, which would lend others the checkout's native module.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"


def python(*arguments, cwd=ROOT, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_ilora_is_light():
    loaded = python("-c", "import sys, ilora; print(*sys.modules)").split()
    assert not {"triton", "transformers", "peft", "numpy.testing", "ilora.kernels"} & set(loaded)


def test_the_kernels_import(tmp_path):
    pytest.importorskip("triton")
    out = python("-c", "import ilora.kernels as k; print(k.forward.__name__, k.backward.__name__)", cwd=tmp_path)
    assert out.split() == ["forward", "backward"]


def test_the_checkout_does_not_shadow_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    pytest.importorskip("transformers")
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    assert python("-c", code, HF_HUB_OFFLINE="1").split() == ["LlamaForCausalLM"]


def test_the_report_names_every_backend_and_why_not():
    out = python("-m", "ilora", TRITON_INTERPRET="0")
    for name in ("reference", "native", "triton", "torch", "cpu"):
        assert name in out
    lines = [line.split(maxsplit=2) for line in out.split("backends\n")[1].splitlines()]
    assert all(verdict == "works" or verdict.startswith("no: ") for _, _, verdict in lines)


def built(tmp_path, **environment):
    """The build of a wheel into tmp_path as pip asks setuptools for it, once instead of three times."""
    source = tmp_path / "source"
    source = source if source.exists() else copied(tmp_path)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    command, environment = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=240)


def test_a_wheel_without_the_native_module_says_so_and_holds_the_rest(tmp_path):
    done = built(tmp_path, ILORA_BUILD_EXT="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"ilora/__init__.py", "ilora/op/functional.py", "ilora/kernels/__init__.py"} <= names
    assert not [n for n in names if n.endswith(".so") or n.startswith(("tests", "benchmarks", "kernels", "csrc"))]
    reason = ALONE + "from ilora.op import native; print(native.__file__, native.unavailable())"
    said = python("-c", reason, cwd=tmp_path, PYTHONPATH=str(wheel))
    assert said.startswith(str(wheel))
    assert "not built" in said


def test_a_wheel_whose_library_cannot_be_built_is_for_every_platform(tmp_path):
    nothing = {"CC": "/no/compiler", "CXX": "/no/compiler"}
    done = built(tmp_path, **nothing, ILORA_BUILD_EXT="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ilora: installing without the native CPU backend" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    done = built(tmp_path, **nothing, ILORA_BUILD_EXT="1")
    assert done.returncode != 0
    assert "/no/compiler" in done.stdout + done.stderr


def test_a_checkout_without_the_native_module_says_where_to_build_it(tmp_path):
    source = copied(tmp_path)
    reason = ALONE + "from ilora.op import native; print(native.unavailable())"
    said = python("-c", reason, cwd=source, PYTHONPATH=str(source))
    assert f"it was not built in {source}" in said
    assert f"-e {source}" in said


def copied(tmp_path):
    """The tracked build inputs alone, so that nothing built in the checkout slips into the wheel."""
    target = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in ("ilora", "kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target
