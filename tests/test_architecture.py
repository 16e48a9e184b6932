from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What stands in a later rank may import what stands in an earlier one; within a rank only siblings of one package.
RANKS = [
    {"features_cache"},
    {
        "pipeline.arrays",
        "pipeline.errors",
        "pipeline.spec",
        "pipeline.invalidation",
        "pipeline.results",
        "pipeline.options",
        "pipeline.model_file",
        "pipeline.provenance",
        "pipeline.tables",
        "pipeline.user_folder",
    },
    {"pipeline.images", "pipeline.backbones", "pipeline.evaluation"},
    {"pipeline.heads", "pipeline.engines"},
    {"pipeline.extraction"},
    {"pipeline.extract"},
    {"pipeline.finetuning", "pipeline.diagnostics", "pipeline.neighbours"},
    {"pipeline.pretraining"},
    {
        "pipeline.fit",
        "pipeline.finetune",
        "pipeline.pretrain",
        "pipeline.predict",
        "pipeline.transformer",
        "pipeline.export",
    },
    {
        "pipeline.rank",
        "pipeline.units",
        "pipeline.drift",
        "pipeline.similar",
        "pipeline.duplicates",
        "pipeline.suspects",
    },
    {"pipeline.comparing"},
    {"pipeline.reporting"},
    {"pipeline.compare", "pipeline.demo"},
    {"pipeline.lecturing"},
    {"pipeline.lecture"},
    {"pipeline.commands"},
    {"cli"},
]
RANK = {unit: rank for rank, units in enumerate(RANKS) for unit in units}
PIPELINE_BASICS = RANKS[1]
MAY_IMPORT_AT_MODULE_LEVEL = {
    "torch": (
        "pipeline.backbones",
        "pipeline.engines",
        "pipeline.finetuning",
        "pipeline.pretraining",
        "pipeline.lecturing",
        "pipeline.export",
    ),
    "torchvision": ("pipeline.backbones", "pipeline.engines"),
    "timm": ("pipeline.backbones", "pipeline.engines", "pipeline.finetuning"),
    "openvino": ("pipeline.engines",),
    "h5py": ("features_cache",),
    "sklearn": (
        "pipeline.evaluation",
        "pipeline.heads",
        "pipeline.transformer",
        "pipeline.reporting",
        "pipeline.lecturing",
    ),
}
FILES = [ROOT / "cli.py", *sorted(ROOT.glob("pipeline/**/*.py")), *sorted(ROOT.glob("features_cache/**/*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str | None:
    return next((unit for unit in RANK if module == unit or module.startswith(unit + ".")), None)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module and whether it is imported when the file itself is."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            top = False
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            base = node.module or ""
            deeper = [f"{base}.{alias.name}" for alias in node.names]
            found.extend((name if unit_of(name) else base, top) for name in deeper)
        inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), True)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_backwards_only(path: Path) -> None:
    here = unit_of(module_name(path))
    if here is None:
        assert module_name(path) == "pipeline", "every module has a rank in this test"
        assert not imports(path), "pipeline/__init__.py exports nothing"
        return
    for module, _ in imports(path):
        there = unit_of(module)
        if there and there != here:
            backwards = RANK[there] < RANK[here] or {here, there} <= PIPELINE_BASICS
            assert backwards, f"{here} may not import {there}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_libraries_are_imported_only_where_they_belong(path: Path) -> None:
    here = module_name(path)
    for module, top in imports(path):
        homes = MAY_IMPORT_AT_MODULE_LEVEL.get(module.split(".")[0])
        if homes and top:
            assert here.startswith(homes), f"{here} imports {module} at module level"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_h5py_stays_inside_the_store(path: Path) -> None:
    if not module_name(path).startswith("features_cache"):
        assert "h5py" not in {module.split(".")[0] for module, _ in imports(path)}


def test_the_top_level_is_what_the_project_promises() -> None:
    names = {
        path.name for path in ROOT.iterdir() if not path.name.startswith(".") and not path.name.endswith(".egg-info")
    }
    fixed = {"pipeline", "features_cache", "cli.py", "tests", "pyproject.toml", "README.md"}
    assert fixed <= names
    left_behind = {"build", "thawline-cache", "thawline-demo", "thawline-predictions"}
    assert names - fixed - left_behind <= {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks", "docs"}


INTERFACES = {
    "the functions of a zoo": r"pipeline\.backbones\.zoo_\w+",
    "each claim of the lecture is measured by a function of one name": r"pipeline\.lecturing\.\w+",
    "a command is named like the stage that it runs": r"pipeline\.commands\.\w+",
}
"""Modules whose public names others share, since they implement the same interface."""


def test_public_names_stand_for_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for path in FILES:
        module = module_name(path)
        if any(re.fullmatch(pattern, module) for pattern in INTERFACES.values()):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_other_packages_import_the_store_and_not_its_modules() -> None:
    deep = [
        module_name(path)
        for path in FILES
        if not module_name(path).startswith("features_cache")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("features_cache.")
    ]
    assert deep == []
