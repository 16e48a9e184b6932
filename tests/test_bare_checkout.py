"""The checkout on a machine where thawline is not installed and some of what it depends on is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from features_cache import open_cache

ROOT = Path(__file__).resolve().parents[1]
MISSING = ("openvino", "platformdirs", "skops", "thawline")
HIDE = f"""
import importlib.metadata
from importlib.machinery import PathFinder

find_spec, from_name = PathFinder.find_spec, importlib.metadata.Distribution.from_name

def find_present(name, path=None, target=None):
    return None if name.partition(".")[0] in {MISSING} else find_spec(name, path, target)

def from_present(name):
    if name in {MISSING}:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)

PathFinder.find_spec, importlib.metadata.Distribution.from_name = find_present, from_present
"""
"""What Python runs first of all: it hides these packages and their versions."""


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python cli.py`` on such a machine."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )

    return run


def test_a_bare_checkout_extracts_and_fits(
    bare: Callable[..., subprocess.CompletedProcess[str]], make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    photos = make_photos()
    options = ("--backbone", "timm/test_resnet@random:0", "--device", "cpu", "--precision", "fp32", "--json")
    extracted = bare("extract", photos, "--output", tmp_path / "cache", *options)
    assert extracted.returncode == 0, extracted.stderr
    (found,) = json.loads(extracted.stdout)["caches"]
    assert (found["engine"], found["done"]) == ("torch", 24)
    assert any("OpenVINO" in note and "torch computes" in note for note in found["notes"])
    (run,) = open_cache(found["path"]).runs
    assert run["versions"]["openvino"] == run["versions"]["thawline"] == "none"
    assert run["versions"]["torch"] != "none"
    fitted = bare("fit", tmp_path / "cache", "--json")
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(fitted.stdout)["results"][0]["n_test"] > 0


def test_a_bare_checkout_tells_that_it_has_no_version(bare: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    told = bare("--version")
    assert (told.returncode, told.stdout) == (0, "thawline, version none\n"), told.stderr
