"""The page of `units`: for each layer and unit, the images that excite it most."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from features_cache import atomic_write, explained
from pipeline.reporting.page.pictures import SIDE
from pipeline.reporting.page.template import data_url, render_page
from pipeline.results import UnitResult
from pipeline.units import LEVEL, UnitsReport


def write_units(path: Path, report: UnitsReport) -> None:
    """Write the page to `path`; a file of that name is replaced. Raises `CacheError` if it cannot be written."""
    with explained(path, "write"), atomic_write(path) as draft:
        draft.write_text(render_units(report), encoding="utf-8")


def render_units(report: UnitsReport) -> str:
    """Return the page, which loads nothing from elsewhere."""
    pairs = zip(report.units, report.crops, strict=True)
    layers = [
        {
            "name": name,
            **report.layers[name],
            "units": [_shown(unit, crops) for unit, crops in members],
        }
        for name, members in groupby(pairs, lambda pair: pair[0].layer)
    ]
    return render_page("units", report=report, layers=layers, side=SIDE)


def _shown(unit: UnitResult, crops: list[NDArray[np.uint8]]) -> dict[str, Any]:
    images = [
        {"data": data_url(Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BICUBIC)), "of": example}
        for example, crop in zip(unit.examples, crops, strict=True)
    ]
    sides = [example.box[2] - example.box[0] for example in unit.examples]
    selective = unit.p_value is not None and unit.p_value <= LEVEL
    return {"unit": unit, "images": images, "side": round(float(np.median(sides))), "selective": selective}
