from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from features_cache import atomic_write


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
