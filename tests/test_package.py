"""The package as a whole: metadata, the set-up commands of the README, sizes of files, and which way imports point."""

from __future__ import annotations

import ast
import graphlib
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vision_ar

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vision_ar"
FILES = sorted(PACKAGE.rglob("*.py"))
ENTRY_FILES = sorted(ROOT.glob("*.py"))
MAX_LINES = 600
SETUP_COMMANDS = {"run": "pip install -e . && python sample.py", "test": 'pip install -e ".[dev]" && python -m pytest'}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "skimage": "scikit-image"}
"""Where the name to import is not the name to install."""
LATE = "_triton"
"""Ends the names of files that import an extra at once, and so are imported late themselves."""

FIRST = {"command_line", "interfaces", "shapes"}
LOW = {"layers", "quantizers", "embeddings", "kernels"}
NOUNS = {"tokenizers", "backbones", "objectives"}
MIDDLE = {"generator", "checkpoints", "sampler"}
HIGH = {"pipeline", "sampling_options", "evaluation", "tasks", "training"}
SCRIPTS = {"__init__", "sample_cli"}
EVERYTHING = FIRST | LOW | NOUNS | MIDDLE | HIGH | SCRIPTS | {"data", "pictures"}
MAY_IMPORT = {
    "interfaces": set(),
    "shapes": set(),
    "command_line": set(),
    "pictures": FIRST | {"data"},
    "data": FIRST | {"layers", "data"},
    "generator": FIRST | LOW,
    "checkpoints": FIRST | LOW | {"generator", "checkpoints"},  # classes of models are built by their names
    "sampler": FIRST | LOW | NOUNS | MIDDLE,
    **{part: FIRST | LOW for part in LOW},
    **{part: FIRST | LOW | {part} for part in NOUNS},
    **{part: EVERYTHING - SCRIPTS for part in HIGH},
    **{part: EVERYTHING for part in SCRIPTS},
}
"""For every file and folder right under vision_ar: which others it may import."""


def name_of(path: Path) -> str:
    """Path below the root, for messages and test ids."""
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """File or folder right under vision_ar that a module belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_function(node: ast.AST) -> bool:
    """True for functions, whose imports run later or never."""
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def is_entry(node: ast.AST) -> bool:
    """True for `main`, which runs a module as a command and so stands outside the order of the package."""
    return isinstance(node, ast.FunctionDef) and node.name == "main"


def imports_of(tree: ast.AST, skip: Callable[[ast.AST], bool] = lambda node: False) -> Iterator[str]:
    """Full names that a file imports, `a.b.c` for `from a.b import c`, leaving out the nodes to skip."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"imports must be absolute, got a relative one in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not skip(node):
            yield from imports_of(node, skip)


def foreign(names: Iterator[str]) -> set[str]:
    """Normal names of the distributions, neither this package nor the standard library, that imports come from."""
    roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {PACKAGE.name}
    return {canonicalize_name(DISTRIBUTIONS.get(root, root)) for root in roots}


def module_file(name: str) -> Path | None:
    """File in vision_ar that importing `name` reads, None for modules from elsewhere; cuts names inside a module."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    raise AssertionError(f"{name} must be a module of this package")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(project: dict[str, Any]) -> dict[str, Requirement]:
    """All dependencies and extras by their normal names."""
    lines = project["project"]["dependencies"] + sum(project["project"]["optional-dependencies"].values(), [])
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def test_the_version_is_the_same_everywhere(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == vision_ar.__version__
    assert f"## {vision_ar.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("[", "")


def test_python_and_lightning_have_the_ranges_the_code_needs(project: dict[str, Any]) -> None:
    needed = requirements(project)
    assert project["project"]["requires-python"] == ">=3.10"
    assert {str(part) for part in needed["lightning"].specifier} == {">=2.6.4", "<2.7"}
    assert str(needed["jsonargparse"].specifier) == "<5" and needed["jsonargparse"].extras == {"signatures"}
    assert str(needed["torch"].specifier) == ">=2.11"


def test_no_requirement_names_a_place_to_install_from(project: dict[str, Any]) -> None:
    assert [str(needed) for needed in requirements(project).values() if needed.url] == []
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    assert [text for text in texts if "://" in text or "index-url" in text] == []


def test_constraints_are_plain_versions_inside_the_ranges(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    needed = requirements(project)
    for line in (line for line in lines if not line.startswith("#")):
        name, _, version = line.partition("==")
        assert re.fullmatch(r"\d+(\.\d+)+", version), f"{line} must be name==version without a suffix"
        requirement = needed.get(canonicalize_name(name))
        assert requirement is None or version in requirement.specifier, f"{line} must fit {requirement}"
    constrained = {canonicalize_name(line.partition("==")[0]) for line in lines}
    base = {canonicalize_name(Requirement(line).name) for line in project["project"]["dependencies"]}
    assert base - constrained == set()


def test_imported_packages_are_declared_and_extras_are_imported_late(project: dict[str, Any]) -> None:
    base = {canonicalize_name(Requirement(line).name) for line in project["project"]["dependencies"]}
    for path in FILES + ENTRY_FILES:
        at_once, ever = foreign(imports_of(tree_of(path), is_function)), foreign(imports_of(tree_of(path)))
        assert ever - requirements(project).keys() == set(), f"{name_of(path)} must import only what is declared"
        if path.stem.endswith(LATE):  # a file of its own for an extra
            continue
        assert at_once - base == set(), f"{name_of(path)} must import extras inside functions; the base has none"
        early = [name for name in imports_of(tree_of(path), is_function) if name.endswith(LATE)]
        assert early == [], f"{name_of(path)} must import {early} inside functions"


def test_every_file_of_a_bundled_model_is_packaged(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]["vision_ar"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = {path for path in (PACKAGE / "models").rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert sorted(map(name_of, files - packaged)) == []


@pytest.mark.parametrize("name", SETUP_COMMANDS)
def test_the_readme_has_the_set_up_command(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^<!-- setup: {name} -->\n```bash\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert blocks == [SETUP_COMMANDS[name]]


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash and file modes")
def test_the_ci_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"vision_ar/{part} must have a place in MAY_IMPORT, got none; give it one"
    if path.name == "__main__.py":
        return  # a command, as the scripts are
    targets = {name: module_file(name) for name in imports_of(tree_of(path), is_entry)}
    wrong = sorted(name for name, file in targets.items() if file and part_of(file) not in MAY_IMPORT[part])
    assert wrong == [], (
        f"{name_of(path)} may import only {', '.join(sorted(MAY_IMPORT[part])) or 'nothing'} of vision_ar"
    )


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        path: {file for name in imports_of(tree_of(path), is_function) if (file := module_file(name))} for path in FILES
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) >= set(FILES)


def test_the_contracts_import_only_torch() -> None:
    names = set(imports_of(tree_of(PACKAGE / "interfaces.py")))
    assert foreign(iter(names)) == {"torch"}
    assert {name for name in names if name.startswith(f"{PACKAGE.name}.")} == set()


@pytest.mark.parametrize("path", FILES + ENTRY_FILES, ids=name_of)
def test_files_stay_short(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{name_of(path)} must have at most {MAX_LINES} lines, got {num_lines}; split it"


def test_init_files_of_sub_packages_are_empty() -> None:
    inits = [path for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE]
    assert [name_of(path) for path in inits if path.read_text(encoding="utf-8").strip()] == []


def test_every_folder_with_code_is_a_package() -> None:
    assert sorted({name_of(path.parent) for path in FILES if not (path.parent / "__init__.py").is_file()}) == []
