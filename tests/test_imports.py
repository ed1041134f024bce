"""The arrows of the package: cli -> step -> core, and no heavy import where a command must answer at once."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shl

ROOT = Path(shl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TOOLS = {
    "controls": {"vector"},
    "dose": {"gen", "filter"},
    "bands": {"dose", "vector"},
    "info": {"results"},
    "plot": {"results"},
    "report": {"filter", "info", "plot"},
}  # which steps a tool is made of
PACKAGES = {"plot", "report"}  # steps that are a folder
HEAVY = {"torch", "transformers", "peft", "safetensors", "accelerate", "matplotlib"}
LIGHT_CORE = {"console", "defaults", "errors", "files", "format", "lm_eval", "locate", "pools", "provenance",
              "ranks", "records", "runs", "seeds", "text", "trajectory", "verdict", "vignettes", "where"}  # fmt: skip
LIGHT_STEPS = {"filter", "info", "new", "results", "__init__", "__main__"}


def imports(node: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported module of a file, and whether the import waits inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield child.module, inside_function
            if child.module in ("shl", "shl.core", "shl.cli"):
                yield from ((f"{child.module}.{alias.name}", inside_function) for alias in child.names)
        function = inside_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(child, function)


def of(path: Path) -> list[tuple[str, bool]]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    inner = path.relative_to(ROOT)
    layer = inner.parts[0] if len(inner.parts) > 1 else "step"
    step, layer = (layer, "step") if layer in PACKAGES else (inner.stem, layer)
    for name, _ in of(path):
        parts = name.split(".")
        if parts[0] == "typer":
            assert layer == "cli", f"{inner} imports typer"
        if parts[0] == "rich":
            assert str(inner) == "core/console.py" or layer == "cli", f"{inner} imports rich"
        if parts[0] != "shl" or len(parts) == 1:
            continue
        target = parts[1]
        if layer == "core":
            assert target in ("core", "__version__"), f"{inner} imports {name}: core must not know steps"
        elif layer == "step" and str(inner) not in ("__init__.py", "__main__.py"):
            allowed = {"core", "toy", "__version__"} | TOOLS.get(step, set()) | ({step} & PACKAGES)
            assert target in allowed, f"{inner} imports {name}: steps meet in files"
        elif layer == "toy":
            assert target in ("core", "toy"), f"{inner} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_imports_wait(path):
    inner = path.relative_to(ROOT)
    whole = {"cli": {path.stem}, "report": {path.stem}, "plot": {path.stem}}  # folders in which everything is light
    light = {"core": LIGHT_CORE, ".": LIGHT_STEPS, **whole}.get(str(inner.parent), set())
    if path.stem not in light:
        return
    for name, waits in of(path):
        assert waits or name.split(".")[0] not in HEAVY, f"{inner} imports {name} at module level"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text)), path


def test_import_shl_is_light_and_its_names_are_real():
    code = (
        "import sys, shl\n"
        "shl.ShlError, shl.keep, shl.read_records, shl.append_row, shl.GenConfig  # each is imported here\n"
        "assert not {'torch', 'transformers', 'peft', 'matplotlib', 'typer'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(shl.__all__) <= set(dir(shl))
    with pytest.raises(AttributeError):
        _ = shl.nonsense


def test_every_public_name_can_be_had():
    for name in shl.__all__:
        assert getattr(shl, name) is not None, name
