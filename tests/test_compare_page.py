"""The report in a real browser, driven over Chromium's own pipe: nothing but the standard library is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.compare import compare

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<img src=x onerror=boom()>&\"'{{ 7*7 }}$x^2$"
PLAN = """\
source = "photos"
seed = [0, 1]
shots = [3, "all"]

[[extract]]
backbone = "test_resnet@random:0"
layer = ["layer1", "layer4", "input"]
size = 32
engine = "torch"

[[fit]]
head = ["logreg", "ridge"]
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run over noisy photos with a nasty class name, a duplicate across splits, and a broken file."""
    root = tmp_path_factory.mktemp("page")
    generator = np.random.default_rng(3)
    for split, each in (("train", 12), ("test", 8)):
        for number, name in enumerate((NASTY, "green", "red")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(each):
                pixels = generator.integers(0, 200, (36, 40, 3))
                pixels[..., number] += 3
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}{index}.png")
    shutil.copy(root / "photos/train/red/train0.png", root / "photos/test/red/twin.png")
    (root / "photos/test/red/bro<b>ken.png").write_bytes(b"no image")
    (root / "plan.toml").write_text(PLAN + "# <script>boom()</script>\n")
    return Path(compare(root / "plan.toml", root / "run").files["report"])


class Page:
    """A tab of a headless browser, spoken to in its debugging protocol over two pipes."""

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


@pytest.fixture(scope="module")
def page(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    opened = Page(tmp_path_factory.mktemp("chromium"))
    try:
        opened.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
        opened.open(report)
        yield opened
    finally:
        opened.close()


def column(page: Page, name: str) -> list[str]:
    """What stands in one column of the rows that are shown."""
    script = """(name) => {
      const place = [...document.querySelectorAll('#results th')].findIndex(th => th.textContent.trim() === name);
      return [...document.querySelectorAll('#results tbody tr')].filter(row => !row.hidden)
        .map(row => row.cells[place].dataset.value ?? row.cells[place].textContent.trim()); }"""
    return list(page.run(f"({script})({json.dumps(name)})"))


def choose(page: Page, selector: str, value: str, event: str) -> None:
    page.run(
        f"{{ const field = document.querySelector({json.dumps(selector)}); field.value = {json.dumps(value)};"
        f"field.dispatchEvent(new Event({json.dumps(event)}, {{bubbles: true}})); }}"
    )


def click(page: Page, name: str) -> str:
    """Press a column's button and return the direction that the column then tells."""
    script = """(name) => { const th = [...document.querySelectorAll('#results th')]
      .find(th => th.textContent.trim() === name);
      th.querySelector('button').click(); return th.getAttribute('aria-sort'); }"""
    return str(page.run(f"({script})({json.dumps(name)})"))


def test_the_page_is_small_and_names_nothing_outside(report: Path) -> None:
    text = report.read_text()
    assert len(text) < 3e6
    assert ">nan" not in text.lower()
    found: list[str] = []
    ids: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action"))
            ids.extend(str(value) for name, value in attrs if name == "id")

    Links().feed(text)
    assert found
    assert all(link.startswith(("#", "data:")) for link in found)
    assert len(ids) == len(set(ids)), "charts on one page do not share ids"
    assert {link[1:] for link in found if link.startswith("#")} <= set(ids), "every link leads somewhere"


def test_names_are_text_not_markup(page: Page) -> None:
    assert page.run("document.body.textContent.includes(" + json.dumps(NASTY) + ")")
    assert page.run("document.body.textContent.includes('<script>boom()')"), "the plan too"
    assert not page.run("[...document.images].some(image => image.getAttribute('src') === 'x')")


def test_nothing_is_requested_and_nothing_complains(page: Page) -> None:
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    requested = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in requested), requested
    assert sum(url.startswith("file:") for url in requested) == 1, "the page itself"
    kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in page.events if event["method"] in kinds] == []


def test_columns_sort_both_ways_and_unknown_numbers_stay_last(page: Page) -> None:
    choose(page, "select[data-column=shots]", "", "change")
    for name in ("accuracy", "labels", "log-loss"):
        direction = click(page, name)
        for _ in range(2):
            values = column(page, name)
            known = [float(value) for value in values if value]
            assert known == sorted(known, reverse=direction == "descending")
            assert values[len(known) :] == [""] * (len(values) - len(known))
            direction = click(page, name)
    click(page, "method")
    assert page.run("document.querySelectorAll('#results th[aria-sort]').length") == 1


def test_words_and_menus_filter_together(page: Page) -> None:
    total = page.run("document.querySelectorAll('#results tbody tr').length")
    choose(page, "select[data-column=shots]", "3", "change")
    choose(page, "#words", "LOGREG  layer", "input")
    methods = column(page, "method")
    assert methods
    assert all("logreg" in method and "layer" in method for method in methods)
    assert set(column(page, "labels")) == {"3"}
    assert page.run("document.getElementById('shown').textContent") == f"{len(methods)} of {total} shown"
    choose(page, "#words", "no such thing", "input")
    assert column(page, "method") == []
    choose(page, "#words", "", "input")
    choose(page, "select[data-column=shots]", "", "change")
    assert len(column(page, "method")) == total


def test_the_keyboard_reaches_every_control(page: Page) -> None:
    page.run("document.querySelector('#results th button').focus()")
    before = page.run("document.querySelector('#results th').getAttribute('aria-sort')")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    assert page.run("document.querySelector('#results th').getAttribute('aria-sort')") != before
    unreachable = """[...document.querySelectorAll('.scroll')].filter(
      box => box.scrollWidth > box.clientWidth && box.tabIndex < 0).length"""
    assert page.run(unreachable) == 0


def test_pictures_have_words_and_charts_their_numbers(page: Page) -> None:
    assert page.run("[...document.querySelectorAll('svg')].every(svg => svg.getAttribute('aria-label').length > 20)")
    assert page.run("[...document.images].every(image => image.alt)")
    assert page.run("document.querySelectorAll('svg').length") >= 5
    assert page.run("[...document.querySelectorAll('svg')].every(svg => svg.parentElement.querySelector('details td'))")
    assert page.run("document.querySelectorAll('.thumbs img').length") > 2, "mistakes and the duplicate are shown"
    assert page.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    text = page.run("document.body.textContent")
    assert "bro<b>ken.png" in text, "what is unreadable is named"
    assert "test/red/twin.png" in text, "so is what stands on both sides"


def test_a_phone_scrolls_in_one_direction_only(page: Page) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert page.run("document.documentElement.scrollWidth") <= 360
    page.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(page: Page, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert (
        page.run("getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(244, 246, 248)",
            "dark": "rgb(13, 19, 27)",
        }[scheme]
    )
    assert page.run(CONTRAST) == []
