from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from features_cache import atomic_write, scratch_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def umask() -> Iterator[None]:
    """A umask that lets a group read."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as draft:
        assert draft.name == "a.txt"
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append((os.fstat(handle).st_ino, path.exists())))
    with atomic_write(path) as draft:
        draft.write_text("new")
    assert seen == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@pytest.mark.usefixtures("umask")
def test_rights_are_those_of_any_new_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as draft:
        draft.unlink()
        os.close(os.open(draft, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_folder_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "a.txt") as draft:
        draft.write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_folders_of_killed_processes_are_deleted_and_no_others(tmp_path: Path) -> None:
    code = (
        "import os, sys; from features_cache import scratch_folder\n"
        "folder = scratch_folder(sys.argv[1]); print(folder.name, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    killed, living = subprocess.Popen(command, **pipes), subprocess.Popen(command, **pipes)
    left, used = Path(killed.stdout.readline().strip()), Path(living.stdout.readline().strip())
    (left / "rows").write_bytes(b"rows")
    killed.kill()
    killed.communicate()
    machine = left.name.split("-")[1]
    others = [
        left.with_name(left.name.replace(machine, "0" * len(machine))),
        left.with_name(f".thawline-{machine}-{killed.pid}"),
        tmp_path / "photos",
    ]
    for other in others:
        other.mkdir()
    link = left.with_name(left.name + "x")
    link.symlink_to(tmp_path / "photos")
    with scratch_folder(tmp_path) as folder:
        assert set(tmp_path.iterdir()) == {*others, used, link, Path(folder)}
    assert used.is_dir()
    living.communicate("\n")
    assert not used.exists()
