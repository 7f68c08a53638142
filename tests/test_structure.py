"""Imports run one way: no files of the package import each other in a circle, and no two folders do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("op", "grouped", "gates", "adapter", "storage", "model")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "ilora").rglob("*.py"))
    if path.parent.name in (*FOLDERS, "ilora")
}


def type_checking_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree):
    """Every import of the file, those inside of functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not type_checking_only(node):
            yield from statements(node)


def imported(name, path):
    """The files of the package that this one imports, by module name."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            candidates = [f"{module}.{alias.name}" for alias in node.names] + [module]
            candidates = [each for each in candidates if each in FILES][:1]
        found.update(each for each in candidates if each in FILES and each != name)
    return found


GRAPH = {name: imported(name, path) for name, path in FILES.items() if path.stem not in ("__init__", "__main__")}


def circle(graph):
    """One circle of the graph as a list of names, or None."""
    done = set()

    def visit(name, way):
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := visit(other, [*way, name]):
                    return found
            done.add(name)
        return None

    return next((found for name in graph if (found := visit(name, []))), None)


def test_no_circle():
    assert len(GRAPH) > 20
    assert circle(GRAPH) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_folders_import_one_way():
    doors = {
        (a.rpartition(".")[0], b.rpartition(".")[0])
        for a, others in GRAPH.items()
        for b in others
        if a.rpartition(".")[0] != b.rpartition(".")[0]
    }
    assert ("ilora.model", "ilora.storage") in doors
    assert not [door for door in doors if door[::-1] in doors]


def test_a_folder_holds_few_files():
    folders = [path for path in (ROOT / "ilora").iterdir() if path.is_dir() and list(path.glob("*.py"))]
    assert {path.name for path in folders if path.name != "kernels"} == set(FOLDERS)
    for folder in (ROOT / "ilora", *folders):
        assert len(list(folder.glob("*.py"))) <= 8, folder


@pytest.mark.parametrize(("folder", "strangers"), [("kernels", {"ilora"}), ("ilora", {"benchmarks", "examples"})])
def test_what_stands_below_imports_nothing_above(folder, strangers):
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name.partition(".")[0] for name in names} & strangers, path
