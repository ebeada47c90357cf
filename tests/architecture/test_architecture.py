"""The shape of the house, checked on its syntax trees.

import-linter holds the floors; this file holds what it cannot see.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cabochon

ROOT = Path(cabochon.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
PAPERS = sorted(p for p in (ROOT / "algorithms").glob("*.py") if p.name != "__init__.py")

LONGEST_FUNCTION = 60
LONGEST_PAPER = 250
LONGEST_CORE = 500
LONGEST_FIT = 120


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def lines(path: Path) -> int:
    """Lines that are not blank: white space for the eye is free."""
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(module: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def base_name(base: ast.expr) -> str:
    if isinstance(base, ast.Subscript):
        return base_name(base.value)
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_a_paper_is_one_readable_file_with_source_deviations_config_objective_and_train(
    path: Path,
) -> None:
    module = tree(path)
    docstring = ast.get_docstring(module) or ""
    defined = {n.name for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert "Source:" in docstring
    assert "arXiv:" in docstring
    assert "Deviations:" in docstring
    assert {"Config", "train"} <= defined
    assert any(name.endswith("objective") for name in defined)
    assert lines(path) <= LONGEST_PAPER


def test_no_class_of_ours_inherits_from_a_class_of_ours() -> None:
    """The error tree is the one exception: `except` needs it."""
    ours: set[str] = set()
    inherits: list[tuple[str, str, str]] = []
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                ours.add(node.name)
                inherits += [(name_of(path), node.name, base_name(b)) for b in node.bases]
    protocols = {"Policy", "Backbone", "Prediction", "Cache", "Sampler", "Objective"}
    errors = {str(Path("core", "errors.py"))}
    found = [
        (path, name, base)
        for path, name, base in inherits
        if base in ours - protocols and path not in errors
    ]
    assert found == []


def test_functions_fit_on_a_screen() -> None:
    long = [
        (name_of(path), f.name, f.end_lineno - f.lineno + 1)
        for path in MODULES
        for f in functions(tree(path))
        if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION
    ]
    assert long == []


def test_core_stays_small_and_so_does_the_loop() -> None:
    assert sum(lines(path) for path in (ROOT / "core").glob("*.py")) <= LONGEST_CORE
    assert lines(ROOT / "training" / "fit.py") <= LONGEST_FIT


def test_nothing_reads_or_writes_pickle() -> None:
    """torch.load and torch.save are pickle; so are the modules by those names."""
    forbidden = {"pickle", "dill", "cloudpickle", "shelve", "joblib"}
    found = []
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name.split(".")[0] for a in node.names}
                names |= {(getattr(node, "module", None) or "").split(".")[0]}
                found += [(name_of(path), name) for name in names & forbidden]
            if (
                isinstance(node, ast.Attribute)
                and node.attr in {"load", "save"}
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ):
                found.append((name_of(path), f"torch.{node.attr}"))
    assert found == []


def test_a_training_generator_is_never_called_without_being_iterated() -> None:
    """A generator that nobody iterates does nothing, silently."""
    bare = [
        (name_of(path), node.lineno)
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and base_name(node.value.func) in {"fit", "train"}
    ]
    assert bare == []


def test_no_room_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager"}
    assert [name_of(p) for p in MODULES if drawers & set(p.with_suffix("").parts)] == []


def test_every_module_says_what_it_is_for() -> None:
    assert [name_of(p) for p in MODULES if not ast.get_docstring(tree(p))] == []


def test_all_names_what_a_module_defines_in_public() -> None:
    wrong = []
    for path in MODULES:
        module = tree(path)
        public = {
            n.name
            for n in module.body
            if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
        }
        listed: set[str] | None = None
        for node in module.body:
            if isinstance(node, ast.Assign) and base_name(node.targets[0]) == "__all__":
                listed = set(ast.literal_eval(node.value))
        if public and (listed is None or not public <= listed):
            wrong.append((name_of(path), sorted(public - (listed or set()))))
    assert wrong == []


IMPORTS = {
    "cabochon": {"torch", "numpy", "transformers", "tyro", "pydantic", "rich"},
    "cabochon.cli": {"torch", "transformers", "datasets", "matplotlib"},
    "cabochon.cli.merge": {"torch", "transformers", "tokenizers"},
    "cabochon.weights.folders": {"torch", "transformers", "tyro", "pydantic", "tokenizers"},
    "cabochon.losses.linear": {"transformers", "tyro", "pydantic", "tokenizers", "yaml", "rich"},
    "cabochon.training.fit": {"transformers", "tyro", "pydantic", "tokenizers", "yaml", "rich"},
    "cabochon.models.gemma.decoder": {"transformers", "tyro", "pydantic", "tokenizers", "rich"},
    "cabochon.generation.engine": {"transformers", "tyro", "pydantic", "tokenizers", "rich"},
    "cabochon.generation.hugging_face": {"transformers", "tyro", "pydantic", "tokenizers"},
    "cabochon.generation.vllm": {"httpx2", "tenacity", "anyio", "transformers", "pydantic", "vllm"},
}


@pytest.mark.parametrize("module", IMPORTS)
def test_importing_a_room_brings_only_what_it_stands_on(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert IMPORTS[module].isdisjoint(loaded)
