"""What the README and the documentation say is true: tables come from the results, and the code runs."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import report
import torch
import torch.nn.functional as F
import transformers as hf
from models import llama, prompts

import ilora

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README)
RESULTS = sorted(report.RESULTS.glob("*.json"))


def test_the_readme_fits_a_screen_or_two():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_result_has_its_table(file):
    measured = (DOCS / "measured.md").read_text()
    assert f"<!-- {file.name} -->" in measured
    assert report.markdown(json.loads(file.read_text())) in measured


def test_the_tables_can_be_written_anew(tmp_path):
    page = DOCS / "measured.md"
    tables = re.compile(r"^\|.*\n", re.MULTILINE)
    empty = tmp_path / "page.md"
    empty.write_text(tables.sub("", page.read_text()))
    report.main(["--update", str(empty)])
    assert tables.findall(empty.read_text()) == tables.findall(page.read_text())
    report.main(["--update", str(empty)])
    assert empty.read_text() == report.updated(page.read_text())


def test_the_readmes_figures_are_those_of_the_results():
    rows = json.loads((report.RESULTS / "cpu-avx512-bfloat16.json").read_text())["rows"]

    def between(peer, dropout):
        ratios = [row["eager"]["both"]["ratio"] for row in rows if (row["peer"], row["dropout"]) == (peer, dropout)]
        return f"{min(ratios):.2f}", f"{max(ratios):.2f}"

    ours, pefts = between("ilora[native]", 0.0), between("peft", 0.0)
    assert f"take {ours[0]} to {ours[1]} times as long" in README
    assert f"takes {pefts[0]} to {pefts[1]} times as long" in README
    ours, pefts = between("ilora[native]", 0.1), between("peft", 0.1)
    assert f"With dropout it is {ours[0]} to {ours[1]} against {pefts[0]} to {pefts[1]}" in README


def test_the_reference_names_every_public_name():
    named = re.findall(r"^::: ilora\.(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert sorted([*named, "reference"]) == sorted(ilora.__all__)


def test_the_equivalent_is_the_definition():
    M, N, d_in, d_out, R, E = 12, 3, 10, 7, 8, 4
    x, weight, bias = torch.randn(M, d_in), torch.randn(d_out, d_in), torch.randn(d_out)
    A, B, gate, scaling, dropout_p = torch.randn(R, d_in), torch.randn(d_out, R), torch.rand(N, E), 2.0, 0.0
    scope = dict(locals(), F=F, i=torch.arange(M) // (M // N))
    (equivalent,) = (block for block in BLOCKS if "repeat_interleave" in block)
    exec(equivalent, scope)
    y = ilora.ilora_linear(x, weight, bias, A, B, gate, scaling)
    torch.testing.assert_close(scope["y"], y, rtol=1e-4, atol=1e-4)


def test_the_examples_run(tmp_path, monkeypatch):
    """As pasted, one after another; a tiny model stands for the one on the Hub."""
    ids, _ = prompts((5, 5))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda name: llama())
    tokenizer = SimpleNamespace(
        from_pretrained=lambda name: lambda text, return_tensors: SimpleNamespace(input_ids=ids)
    )
    monkeypatch.setattr("transformers.AutoTokenizer", tokenizer)  # hf may be an older object of this name
    scope: dict = {}
    layer, whole, many = (block for block in BLOCKS if re.search(r"ILoRALinear\(|ilora\.inject|ilora_adapters", block))
    exec(layer, scope)
    assert scope["y"].shape == (8, 256, 1536)

    exec(whole, scope)
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in ilora.ilora_layers(scope["model"]).values())
    assert (tmp_path / "adapter" / "ilora_config.json").exists()

    exec(many, scope)
    assert scope["logits"].shape[:2] == ids.shape
    assert ilora.adapters(scope["model"]) == ("bob", "anna")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def sentences(page):
    """The page's sentences; a piece of code is one word."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"^[|#!<].*$", "", text, flags=re.MULTILINE)  # tables, headings, pictures
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", text):
        yield from re.split(r"(?<=[.!?])\**\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_sentence_is_longer_than_forty_words(page):
    assert not [text for text in sentences(page) if len(re.findall(r"\w[\w'’.-]*", text)) > 40]


# Words that the code once used in a sense of its own. In a name none of them means anything today; in a text those of
# the second line have their ordinary meaning.
PRIVATE = {"frame", "frames", "home", "homes", "sibling", "siblings", "halves"}
PRIVATE_NAMES = PRIVATE | {"beside", "cell", "fresh", "gathered", "held", "stored", "taken", "turn", "writes"}


def test_no_private_words():
    texts, names = {page: page.read_text() for page in PAGES}, {}
    for path in [*ROOT.glob("ilora/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        tree = list(ast.walk(ast.parse(path.read_text())))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts[path] = "\n".join(ast.get_docstring(node) or "" for node in tree if isinstance(node, documented))
        names[path] = [node.name for node in tree if isinstance(node, documented[1:])]
        names[path] += [path.stem, *(node.arg for node in tree if isinstance(node, ast.arg))]
    assert not {
        path: found for path, text in texts.items() if (found := PRIVATE & set(re.findall(r"\w+", text.lower())))
    }
    assert not {
        path: found for path, said in names.items() if (found := PRIVATE_NAMES & set("_".join(said).split("_")))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_files_it_names_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:benchmarks|docs|tests|examples|ilora|kernels|csrc)/[\w/.-]+)`", text):
        assert (ROOT / target).exists(), target


def run_page(name):
    """Runs all blocks of a page, one after another; their number."""
    blocks, scope = BLOCK.findall((DOCS / name).read_text()), {"__name__": name}
    for block in blocks:
        exec(compile(block, block.splitlines()[0], "exec"), scope)
    return len(blocks)


def test_the_how_tos_run(capsys):
    for package in ("transformers", "peft", "accelerate", "bitsandbytes"):
        pytest.importorskip(package)
    assert run_page("how-to.md") > 10
    shown = capsys.readouterr().out
    assert "tensor([ 0, 12, 17, 24], dtype=torch.int32)" in shown
    assert "give ilora_segments" in shown
    assert "('default', 'other')" in shown


def test_what_the_page_on_sharing_says():
    pytest.importorskip("peft")
    assert run_page("sharing.md") == 5
