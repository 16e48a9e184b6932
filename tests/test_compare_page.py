"""The report in a real browser."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.compare import compare

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


@pytest.fixture(scope="module")
def page(report: Path, browser: Any) -> Any:
    browser.open(report)
    return browser


def column(page: Any, name: str) -> list[str]:
    """What stands in one column of the rows that are shown."""
    script = """(name) => {
      const place = [...document.querySelectorAll('#results th')].findIndex(th => th.textContent.trim() === name);
      return [...document.querySelectorAll('#results tbody tr')].filter(row => !row.hidden)
        .map(row => row.cells[place].dataset.value ?? row.cells[place].textContent.trim()); }"""
    return list(page.run(f"({script})({json.dumps(name)})"))


def choose(page: Any, selector: str, value: str, event: str) -> None:
    page.run(
        f"{{ const field = document.querySelector({json.dumps(selector)}); field.value = {json.dumps(value)};"
        f"field.dispatchEvent(new Event({json.dumps(event)}, {{bubbles: true}})); }}"
    )


def click(page: Any, name: str) -> str:
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


def test_names_are_text_not_markup(page: Any) -> None:
    assert page.run("document.body.textContent.includes(" + json.dumps(NASTY) + ")")
    assert page.run("document.body.textContent.includes('<script>boom()')"), "the plan too"
    assert not page.run("[...document.images].some(image => image.getAttribute('src') === 'x')")


def test_nothing_is_requested_and_nothing_complains(page: Any) -> None:
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    requested = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in requested), requested
    assert sum(url.startswith("file:") for url in requested) == 1, "the page itself"
    kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in page.events if event["method"] in kinds] == []


def test_columns_sort_both_ways_and_unknown_numbers_stay_last(page: Any) -> None:
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


def test_words_and_menus_filter_together(page: Any) -> None:
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


def test_the_keyboard_reaches_every_control(page: Any) -> None:
    page.run("document.querySelector('#results th button').focus()")
    before = page.run("document.querySelector('#results th').getAttribute('aria-sort')")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    assert page.run("document.querySelector('#results th').getAttribute('aria-sort')") != before
    unreachable = """[...document.querySelectorAll('.scroll')].filter(
      box => box.scrollWidth > box.clientWidth && box.tabIndex < 0).length"""
    assert page.run(unreachable) == 0


def test_pictures_have_words_and_charts_their_numbers(page: Any) -> None:
    assert page.run("[...document.querySelectorAll('svg')].every(svg => svg.getAttribute('aria-label').length > 20)")
    assert page.run("[...document.images].every(image => image.alt)")
    assert page.run("document.querySelectorAll('svg').length") >= 5
    assert page.run("[...document.querySelectorAll('svg')].every(svg => svg.parentElement.querySelector('details td'))")
    assert page.run("document.querySelectorAll('.thumbs img').length") > 2, "mistakes and the duplicate are shown"
    assert page.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    text = page.run("document.body.textContent")
    assert "bro<b>ken.png" in text, "what is unreadable is named"
    assert "test/red/twin.png" in text, "so is what stands on both sides"


def test_a_phone_scrolls_in_one_direction_only(page: Any) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert page.run("document.documentElement.scrollWidth") <= 360
    page.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(page: Any, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert (
        page.run("getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(244, 246, 248)",
            "dark": "rgb(13, 19, 27)",
        }[scheme]
    )
    assert page.poor_contrast() == []
