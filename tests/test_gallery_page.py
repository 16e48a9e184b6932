"""The pages of `similar`, `duplicates` and `suspects` in a real browser."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features_cache import Catalog
from pipeline.duplicates import duplicates
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.reporting.page.gallery import MOST_PICTURES, duplicates_page, similar_page, suspects_page
from pipeline.results import Conflict, Neighbour, PlantedLabels, Suspect
from pipeline.similar import similar
from pipeline.suspects import SuspectsReport

BACKBONE = "test_resnet@random:0"
NASTY = "<img src=x onerror=boom()>&\"'{{ 7*7 }}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of noisy photos in two classes, one of which has a nasty name."""
    root = tmp_path_factory.mktemp("gallery")
    generator = np.random.default_rng(0)
    for number, name in enumerate((NASTY, "plain")):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(14):
            pixels = generator.integers(0, 150, (100, 130, 3))
            pixels[..., number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / name / f"{index}.png")
    extract(root / "photos", [BACKBONE], ["layer4"], size=32, engine="torch", output=root / "cache")
    return root / "cache"


@pytest.fixture(scope="module")
def similar_html(cache: Path) -> Path:
    names = [f"{name}/{index}.png" for name in (NASTY, "plain") for index in range(14)]
    report = similar(cache, names, count=20)
    path = cache.parent / "similar.html"
    notes = similar_page(report, path)
    assert notes == [f"{path} shows the first 23 of 28, because a page holds {MOST_PICTURES} images"]
    return path


def check_page(browser: Any, path: Path) -> None:
    """Check what holds for every page: small, nothing from outside, names are text, a phone's width, contrast."""
    assert path.stat().st_size < 5e6
    browser.open(path)
    requested = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in requested), requested
    assert sum(url.startswith("file:") for url in requested) == 1, "the page itself"
    kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in browser.events if event["method"] in kinds] == []
    assert browser.run("[...document.images].every(image => image.alt && image.complete && image.naturalWidth > 0)")
    assert not browser.run("[...document.images].some(image => image.getAttribute('src') === 'x')")
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    browser.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
    for scheme in ("dark", "light"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert browser.poor_contrast() == []


def test_neighbours_are_shown(browser: Any, similar_html: Path) -> None:
    check_page(browser, similar_html)
    assert browser.run("document.images.length") == 23 * 21
    assert browser.run("document.body.textContent.includes('5 more are not shown')")
    first = browser.run("document.querySelector('.card').innerText")
    assert first.startswith(f"{NASTY}/0.png")


def test_cards_are_reached_by_keys(browser: Any, similar_html: Path) -> None:
    browser.open(similar_html)
    place = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
    seen = []
    for key in "jjjkk":
        browser.press(key)
        seen.append(browser.run(place))
    assert seen == [0, 1, 2, 1, 0]


@pytest.fixture(scope="module")
def suspects_html(cache: Path) -> Path:
    (found,) = select(Catalog(cache))
    beside = [Neighbour(f"plain/{index}.png", 0.9, "plain") for index in range(3)]
    doubtful = [Suspect(f"{NASTY}/{index}.png", NASTY, "plain", 0.1, 0.9, "", beside) for index in range(5)]
    twins = Conflict(["plain/8.png", f"{NASTY}/8.png"], ["plain", NASTY], NASTY)
    planted = PlantedLabels(0.05, 10, 8, 0.8, 10, 0.8, 0.9)
    file = found.table.files[0]
    report = SuspectsReport([twins], doubtful, planted, 0.9, "layer4", "logreg/l2", [], file, found.table)
    assert suspects_page(report, cache.parent / "suspects.html") == []
    return cache.parent / "suspects.html"


def test_duplicates_are_shown(browser: Any, cache: Path) -> None:
    report = duplicates(cache, threshold=0.9)
    assert report.groups
    assert duplicates_page(report, cache.parent / "copies.html") == []
    check_page(browser, cache.parent / "copies.html")
    assert browser.run("document.querySelectorAll('.card').length") == len(report.groups)
    assert browser.run("document.images.length") == sum(map(len, report.groups))
    assert browser.run("document.body.textContent.includes('similarity of 0.9000 or more')")


SAVED = """(async () => { let blob; const make = URL.createObjectURL;
  URL.createObjectURL = (one) => { blob = one; return make(one); };
  document.getElementById('save').click(); URL.createObjectURL = make; return await blob.text(); })()"""


def test_marks_are_kept_and_saved_as_a_table(browser: Any, suspects_html: Path) -> None:
    check_page(browser, suspects_html)
    browser.run("localStorage.clear()")
    browser.open(suspects_html)
    for key in ("j", "w", "j", "r", "j", "w"):  # an image with two labels, one card each, then a suspect
        browser.press(key)
    assert browser.run("document.getElementById('count').textContent") == "3 of 7 judged, 2 wrong"
    browser.run(
        "{ const select = document.querySelectorAll('.card')[3].querySelector('select'); select.selectedIndex = 0;"
        "select.dispatchEvent(new Event('change', {bubbles: true})); }"
    )
    browser.open(suspects_html)
    assert browser.run("document.getElementById('count').textContent") == "4 of 7 judged, 3 wrong", "marks were kept"
    asked = browser.call("Runtime.evaluate", expression=SAVED, returnByValue=True, awaitPromise=True)
    saved = list(csv.DictReader(io.StringIO(asked["result"]["value"])))
    assert saved == [
        {"uri": "plain/8.png", "label": NASTY},
        {"uri": f"{NASTY}/0.png", "label": "plain"},
        {"uri": f"{NASTY}/1.png", "label": "plain"},
    ]
