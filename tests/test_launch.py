"""The commands of examples/distributed: as they are written, killed, resumed by another scheme, on four processes."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

import estimate  # noqa: E402
import launch_worker as worker  # noqa: E402
import train  # noqa: E402
from accelerate.commands import launch  # noqa: E402
from ranks import run_ranks  # noqa: E402
from torch.distributed.run import get_args_parser  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # processes start, where there may be two cores
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "distributed"
COMMANDS = re.findall(r"^(?:torchrun|accelerate launch) .*", (FOLDER / "README.md").read_text(), re.MULTILINE)
FIRST, RESUMED, SPLIT = COMMANDS[:3]
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate launch": "accelerate.commands.launch"}  # what they call
# Python runs it at its start: the optimizer of rank 1 fails in the fourth step.
FAILING = """
import os, sys
if os.environ.get("RANK") == "1":
    import torch
    step, calls = torch.optim.AdamW.step, []
    def failing(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise OSError("the fourth step failed")
        return step(self, *args)
    torch.optim.AdamW.step = failing
"""


def losses(text):
    """{step: loss} of what a run printed. No step is printed twice."""
    found = re.findall(r"step (\d+) loss (\S+)", text)
    assert len(found) == len(dict(found))
    return {int(step): float(loss) for step, loss in found}


def run(command, folder, *paths):
    """Runs a command of the README as it is written, in a folder that has the examples."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    env = {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher, rest = re.match("(torchrun|accelerate launch) (.*)", command).groups()
    command = [sys.executable, "-m", LAUNCHERS[launcher], *shlex.split(rest)]
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | env, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    try:
        return (*process.communicate(timeout=300), process.returncode)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def arguments(command):
    """What the script gets."""
    return shlex.split(command.partition("train.py")[2])


def environment(command):
    """What accelerate's launcher tells its processes."""
    args = launch.launch_command_parser().parse_args(shlex.split(command)[2:])
    args, _, _ = launch._validate_launch_command(args)
    return launch.prepare_multi_gpu_env(args)


# The processes of each run and its arguments: two, and four of which two go on. All choose the same sequences.
RUNS = [
    "2 --dropout 0 --steps 4 --batch 4 --out runs/two",
    "4 --dropout 0 --steps 2 --batch 2 --out runs/fewer --shard",
    "2 --dropout 0 --steps 4 --batch 4 --out runs/fewer --shard --resume",
]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """(folder, losses of each run): the README's FSDP2 × tensor parallel on four processes, undisturbed, then RUNS."""
    folder = tmp_path_factory.mktemp("launch")
    env = environment(SPLIT)
    split = f"4 --shard --tp {env['PARALLELISM_CONFIG_TP_SIZE']} {' '.join(arguments(SPLIT))}"
    assert env["ACCELERATE_USE_FSDP"] == "true"
    (folder / "plan").write_text("\n".join([split, *RUNS]))
    run_ranks(worker, folder, 4)
    return folder, [losses(part) for part in re.split(r"run \d\n", (folder / "log").read_text())[1:]]


def test_rank_0_alone_shows_progress(forked):
    folder, found = forked
    assert sorted(found[0]) == [1, 2, 3, 4, 5, 6]
    assert "steps: 100%" in (folder / "log").read_text()
    for rank in (1, 2, 3):
        assert not re.search("step|Loading", (folder / f"quiet{rank}").read_text())


def test_half_as_many_processes_go_on_to_the_same_losses(forked):
    _, two, began, went_on = forked[1]
    assert (sorted(began), sorted(went_on)) == ([1, 2], [3, 4])
    assert began | went_on == pytest.approx(two, abs=2e-5)


def test_a_failing_process_ends_all_and_the_last_checkpoint_resumes(forked, tmp_path):
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "sitecustomize.py").write_text(FAILING)
    stdout, stderr, status = run(FIRST, tmp_path, tmp_path / "failing")
    assert status != 0
    assert "OSError: the fourth step failed" in stderr
    kept = [path.name for path in (tmp_path / "runs/first").glob("checkpoint-*")]
    assert kept == ["checkpoint-2"]
    began = losses(stdout)
    assert max(began) < 5
    stdout, stderr, status = run(RESUMED, tmp_path)
    assert status == 0, stderr[-3000:]
    went_on = losses(stdout)
    assert sorted(went_on) == [3, 4, 5, 6]
    assert began | went_on == pytest.approx(forked[1][0], abs=2e-5)
    found = {}
    for name, folder in (("resumed", tmp_path / "runs/first"), ("whole", forked[0] / "runs/split")):
        model = ilora.load_adapter(train.LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
        found[name] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in found["whole"].items():
        torch.testing.assert_close(found["resumed"][name], parameter, rtol=1e-4, atol=1e-5)
    assert found["whole"]["ilora_gate.weight"].abs().max() > 1e-3


def test_the_page_has_the_table_of_the_script():
    page = (ROOT / "docs" / "several-devices.md").read_text()
    assert estimate.table() in page
    for model, shape in estimate.MODELS.items():
        assert f"{estimate.copies_of_dropout(shape) / 1e9:.1f} GB for {model}" in page
    gates = [estimate.cost(shape, scheme, 512)[-1] for shape in estimate.MODELS.values() for scheme in estimate.SCHEMES]
    assert max(gates) < 5e5


def test_the_shapes_of_the_estimate_are_those_of_a_model():
    shape = estimate.Shape(hidden=64, intermediate=96, blocks=2, kv=32, vocabulary=53)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 53}
    model = train.LlamaForCausalLM(train.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.weights
    gate = ilora.PromptGate(num_experts=estimate.E)
    model = ilora.inject(model, ilora.ILoRAConfig(r=estimate.R, num_experts=estimate.E), gate=gate)
    assert ilora.trainable_parameters(model)[0] == shape.adapter() + shape.gate


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    if command.startswith("torchrun"):
        get_args_parser().parse_args(shlex.split(command)[1:])
    else:
        monkeypatch.chdir(ROOT)
        env = environment(command)
        for name in ("ACCELERATE_USE_FSDP", "PARALLELISM_CONFIG_TP_SIZE"):
            monkeypatch.setenv(name, env.get(name, {"ACCELERATE_USE_FSDP": "false"}.get(name, "1")))
    options = train.parse(arguments(command))
    assert options.shard == ("fsdp2" in command or "--shard" in command)
    assert options.tp == (2 if "fsdp2_tp" in command or "--tp 2" in command else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("--tp 3", "--tp 3: expected a divisor of the 4 processes"), ("--steps 0", "--steps: expected 1 or more, got 0")],
)
def test_what_the_script_refuses(arguments, words, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        train.parse(arguments.split())
    assert words in capsys.readouterr().err


def test_it_says_how_it_is_started(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        train.parse([])
    assert "start it with torchrun or accelerate launch" in capsys.readouterr().err
