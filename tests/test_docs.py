"""Examples run as they stand: of README and docs page by page, in a folder with photos, and of docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.heads import linear

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("features_cache", "pipeline")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = ("python3 -m venv", "bash .ci/run", "python benchmarks/")
"""What CI runs itself, and measurements that take minutes."""


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words and not line.startswith(NOT_RUN):
            yield words


@pytest.fixture
def folder(tmp_path: Path, write_photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # converting networks for OpenVINO would take most of the time, and test_engines does it
    monkeypatch.setitem(sys.modules, "pipeline.engines.openvino_engine", None)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # no worker processes for a few tiny fits
    monkeypatch.setattr(linear, "C_GRID", linear.C_GRID[::11])  # 5 values take the same way as 45
    write_photos(tmp_path / "photos", ("cat", "dog"), each=12)
    write_photos(tmp_path / "new_photos", ("cat", "dog"), each=5, seed=8)
    with chdir(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, folder: Path, thawline: Callable[..., Any]) -> None:
    for block in blocks(page):
        if block.language == "toml":
            name = block.text.splitlines()[0].removeprefix("# ")
            (folder / name).write_text(block.text)
        elif block.language == "sh":
            for program, *arguments in commands(block.text):
                assert program == "thawline", f"{program}: an example that no test runs"
                finished = thawline(*arguments)
                assert finished.returncode == 0, f"thawline {shlex.join(arguments)}: {finished.stderr}"
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), {})
        else:
            assert block.language == "text", f"{page.name}: a block of {block.language} that no test runs"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str, folder: Path) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed
