from __future__ import annotations

import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cli


def pytest_configure() -> None:
    """Leave one thread to each of the processes that run tests, of torch and in what they start."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep converted models out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        yield


@pytest.fixture(scope="session")
def write_photos() -> Callable[..., Path]:
    """Write a folder of class folders: noisy pictures whose colour tells the class."""

    def write(root: Path, classes: tuple[str, ...] = ("blue", "green", "red"), each: int = 8, seed: int = 7) -> Path:
        generator = np.random.default_rng(seed)
        for number, class_name in enumerate(classes):
            (root / class_name).mkdir(parents=True)
            for index in range(each):
                pixels = generator.integers(0, 120, (40, 48, 3))
                pixels[..., number % 3] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(root / class_name / f"{index}.png")
        return root

    return write


@pytest.fixture(scope="session")
def bad_exif() -> Callable[[int], bytes]:
    """Make a JPEG that is turned by its EXIF data, which break off after so many bytes of the second entry."""

    def make(kept: int) -> bytes:
        turned = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
        exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + turned + b"\x10\x01\x02\0\xff\xff\xff\xff"[:kept]
        file = io.BytesIO()
        Image.new("RGB", (40, 20), (kept, 0, 0)).save(file, "JPEG", exif=exif)
        return file.getvalue()

    return make


@pytest.fixture
def file_limit() -> Iterator[None]:
    """Let the system refuse files of more than 4 kB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def make_photos(tmp_path: Path, write_photos: Callable[..., Path]) -> Callable[..., Path]:
    """Write such a folder under a test's own."""

    def make(classes: tuple[str, ...] = ("blue", "green", "red"), each: int = 8, name: str = "photos") -> Path:
        return write_photos(tmp_path / name, classes, each)

    return make


@dataclass
class Finished:
    """What a command printed and returned."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one document on stdout of a command that did not fail."""
        assert self.returncode == 0, self.stderr
        return json.loads(self.stdout)

    def assert_one_line(self, *parts: str) -> None:
        """Check that the command failed as every library error does."""
        assert self.returncode == 1, self.stderr
        assert self.stdout == ""
        assert self.stderr.count("\n") == 1, self.stderr
        for part in parts:
            assert part in self.stderr


@pytest.fixture
def thawline(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run a command as a user would, but in this process, which has its libraries loaded already."""

    def run(*arguments: object, cwd: Path = Path()) -> Finished:
        code, out, err = 0, io.StringIO(), io.StringIO()
        on_interrupt = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr("sys.argv", ["thawline", *map(str, arguments)])
        with redirect_stdout(out), redirect_stderr(err), chdir(cwd):
            try:
                cli.main()
            except SystemExit as exit_:
                code = int(exit_.code or 0)
            finally:
                signal.signal(signal.SIGINT, on_interrupt)  # a command that was interrupted ignores what follows
        return Finished(code, out.getvalue(), err.getvalue())

    return run
