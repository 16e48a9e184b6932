from __future__ import annotations

import gc
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import time
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


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep what the imports of all test files leave out of the garbage collector, which would go through it in vain."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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


@pytest.fixture(scope="session")
def object_store() -> Iterator[Any]:
    """An S3 server on this machine, as a file system of fsspec."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield fsspec.filesystem("s3")
    server.stop()


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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (color) => { const [r, g, b] = color.map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (element) => { for (let at = element; at; at = at.parentElement) {
    const color = rgba(getComputedStyle(at).backgroundColor); if (color[3] === 255) return color; }
    return [255, 255, 255]; };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (['SCRIPT', 'STYLE', 'OPTION'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element.closest('svg') ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(behind(element).slice(0, 3))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push([walker.currentNode.textContent.trim().slice(0, 30), element.className, ratio]);
  }
  return poor.map(String);
})()"""


class Page:
    """A tab of a headless browser, spoken to in its debugging protocol over two pipes: no library is needed."""

    def __init__(self, folder: Path) -> None:
        theirs, ours = os.pipe()
        back, their_back = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --no-first-run"
        command = f'exec "$0" {flags} --user-data-dir="$1" 3<&{theirs} 4>&{their_back}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), str(folder)],
            pass_fds=(theirs, their_back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(their_back)
        self._to, self._from = os.fdopen(ours, "wb", 0), os.fdopen(back, "rb", 0)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result; what happens meanwhile goes to `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 30
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline
            self.events.append(self._read())

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def poor_contrast(self) -> list[str]:
        """Name the texts that stand out too little from what is behind them."""
        return list(self.run(CONTRAST))

    def press(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(20)
        self._to.close()
        self._from.close()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = self._from.read(1 << 16)
            assert chunk, "the browser ended"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Start Chromium with an empty tab."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    opened = Page(tmp_path_factory.mktemp("chromium"))
    try:
        opened.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
        yield opened
    finally:
        opened.close()
