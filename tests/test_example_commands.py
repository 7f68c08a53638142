"""The command lines of the examples: what they refuse before any work, and that what our pages show is accepted."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import smollm2_text
from sequential_recommendation import compare, kept, page, recommend
from sequential_recommendation.experiments import MADE_UP, PROMPTS
from sequential_recommendation.options import experiment_of, parse
from sequential_recommendation.readers import READERS
from sequential_recommendation.tastes import tastes
from sequential_recommendation.titles import Titles

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "sequential_recommendation"
FILMS = "--data ml-100k --root . "
SMOL = FILMS + "--model smollm2 "
REFUSED = {  # arguments: words, by command
    parse: {
        "--experts 4 3": "--experts 3: the rank is 8",
        "--experts 0": "--experts: expected a whole number of 1 or more, got '0'",
        "--experts 4 4": "--experts: given more than once: 4 4",
        "--seed 0 0": "--seed: given more than once: 0 0",
        "--seed -1": "--seed: expected a whole number from 0 to 4294967295, got '-1'",
        "--arms lora lora": "--arms: given more than once: lora lora",
        "--lr 0.1 1e-1": "--lr: given more than once: 0.1 0.1",
        "--lr -1": "--lr: expected a number above 0, got '-1'",
        "--lr nan": "--lr: expected a number above 0, got 'nan'",
        "--batch-size 5 --effective-batch 12": "a multiple of --batch-size, got 12 and 5",
        "--effective-batch 12": "a multiple of --batch-size, got 12 and 32",
        SMOL + "--effective-batch 100": "a multiple of --batch-size, got 100 and 8",
        SMOL + "--batch-size 24": "a multiple of --batch-size, got 128 and 24",
        "--batch-size -4": "--batch-size: expected a whole number of 1 or more, got '-4'",
        "--jobs -1": "--jobs: expected a whole number of 1 or more, got '-1'",
        "--patience 2": "--patience: needs --watch",
        "--batch-size 1": "--arms shuffled: expected a --batch-size of 2 or more",
        "--data amazon": "--root goes with --data",
        "--data tastes --root x": "--root goes with --data",
        "--candidates 1": "--candidates: expected a whole number of 2 or more, got '1'",
        "--pretrain-steps 0": "--pretrain-steps: expected a whole number of 1 or more, got '0'",
        "--tests -5": "--tests: expected a whole number of 0 or more, got '-5'",
        "--steps 0": "--steps: expected a whole number of 1 or more, got '0'",
        "--epochs 0": "--epochs: expected a number above 0, got '0'",
        "--epochs 1 --steps 3": "--steps: not allowed with argument --epochs",
        "--min-users 20": "--min-users: means nothing with --data tastes",
        "--plain": "--plain: means nothing with --data tastes",
        FILMS + "--users 9": "--users: means nothing with --data ml-100k",
        "--model smollm2 --pretrain-steps 9": "--pretrain-steps: means nothing with --model smollm2",
        "--protocol all": "--protocol: invalid choice: 'all'",
    },
    recommend.main: {
        "--top=0 Heat": "--top: expected a whole number of 1 or more, got '0'",
        "--shortlist=1 Heat": "--shortlist: expected a whole number of 2 or more, got '1'",
        "": "give one TITLE or more, or --list",
    },
    smollm2_text.main: {
        "--steps 0": "--steps: expected 1 or more, got 0",
        "--batch 0": "--batch: expected 1 or more, got 0",
        "--length 1": "--length: expected 2 or more, got 1",
        "--model /nonexist": "--model /nonexist: expected the folder of a causal language model",
    },
}


@pytest.mark.parametrize(("command", "arguments"), [(each, row) for each, rows in REFUSED.items() for row in rows])
def test_options_that_cannot_be_meant_are_refused_at_once(command, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command(arguments.split())
    assert ended.value.code == 2
    assert REFUSED[command][arguments] in capsys.readouterr().err


def test_a_comparison_under_a_launcher_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        parse([])
    assert "a launcher started several processes" in capsys.readouterr().err


def test_the_commands_of_the_results_are_still_accepted():
    texts = [path.read_text(encoding="utf-8") for path in (FOLDER / "README.md", *(FOLDER / "results").glob("*.md"))]
    commands = [found for text in texts for found in re.findall(r"recommendation/compare\.py([^`#\n]*)", text)]
    assert len(commands) >= 8
    for command in commands:
        assert experiment_of(parse(shlex.split(command)))


@pytest.mark.parametrize("page_of_commands", [ROOT / "docs" / "recommender.md", FOLDER / "README.md"])
def test_the_commands_of_the_pages(page_of_commands):
    lines = page_of_commands.read_text(encoding="utf-8").splitlines()
    start = f"python {FOLDER.relative_to(ROOT)}/"
    commands = [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]
    parsers = {"compare.py": compare.parse, "recommend.py": recommend.parser().parse_args, "page.py": page.parse}
    assert {script for script, *_ in commands} >= set(parsers)
    made_up = Titles(tastes())
    for script, *arguments in commands:
        options = parsers[script](arguments)
        if getattr(options, "titles", None) and options.run == kept.FOLDER and not options.list:
            made_up.find([*options.titles, *options.candidates])


def test_the_data_of_the_readme_are_those_of_the_commands():
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").split("## Data\n")[1].split("\n## ")[0].splitlines()
    rows = {name for line in lines if line.startswith("| `") for name in re.findall("`([^`]+)`", line.split("|")[1])}
    rows.remove("--data")
    assert rows == {*PROMPTS, *READERS}
    for name in rows:
        root = [] if name == MADE_UP else ["--root=."]
        assert parse([f"--data={name}", *root]).data == name


def test_the_command_runs_by_its_path(tmp_path):
    command = [sys.executable, FOLDER / "compare.py", "--help"]
    helped = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert helped.returncode == 0
    assert b"--protocol" in helped.stdout


def test_who_has_no_recommender_is_told_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no trained recommender in recommender-comparison") as ended:
        recommend.main(["Heat"])
    command = next(line.strip() for line in str(ended.value).splitlines() if "compare.py" in line)
    assert command == kept.COMPARE
    assert (ROOT / command.split()[1]).exists()
