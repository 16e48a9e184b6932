"""Which depth reads edges, textures, parts and objects best?"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.extract import extract
from pipeline.fit import fit
from pipeline.lecturing.claim import Findings, Setting, line_chart, seeds_figure
from pipeline.lecturing.stimuli import STIMULI, stimulus_source
from pipeline.results import FitResult
from pipeline.spec import DEFAULT_BACKBONE

_ZEILER = "Zeiler and Fergus 2014; Yosinski et al. 2014"


def measure_claim(setting: Setting) -> Findings:
    """Fit linear probes on every stage, and compare the depths that validation chooses."""
    each = 12 if setting.quick else 40
    sources = {name: stimulus_source(name, each) for name in STIMULI} | {"objects": setting.sample}
    depths, accuracies, layers = {}, {}, []
    for name, source in sources.items():
        (found,) = extract(
            source, layers=("stages", "penultimate"), output=setting.folder / name, progress=setting.progress
        )
        layers = list(found.layers)
        report = fit(found.path, layers, ["ridge"], setting.seeds, jobs=1, progress=setting.progress)
        by_layer = [[one for one in report.results if one.layer == layer] for layer in layers]
        depths[name] = np.array([_best(results) for results in zip(*by_layer, strict=True)]) / (len(layers) - 1)
        accuracies[name] = np.array([[100 * one.accuracy for one in results] for results in by_layer]).T
    pairs, one = list(pairwise(sources)), report.results[0]
    overlap = one.n_val / one.n_train
    figures = [
        seeds_figure(
            f"depth that reads {later} best, minus that of {earlier}", depths[later] - depths[earlier],
            "later layers", _ZEILER, expected=1, tests=len(pairs), overlap=overlap,
        )
        for earlier, later in pairs
    ]  # fmt: skip
    figures += [
        seeds_figure(f"depth that reads {name} best, 0 to 1", depth, overlap=overlap) for name, depth in depths.items()
    ]
    chart = line_chart(
        "Which depth reads what?",
        "Test accuracy of a linear probe (ridge) by layer: means over seeds, bands from the lowest to the highest.",
        np.arange(len(layers)).tolist(),
        accuracies,
        ("layer", "test accuracy, %"),
        ticks=layers,
    )
    notes = [
        f"{DEFAULT_BACKBONE}; {each} made images of each of eight orientations (edges), textures and parts, with "
        f"noise; objects are {len(setting.sample.items)} images of {setting.source.name}. {len(setting.seeds)} seeds "
        "draw splits; the best depth of each is chosen on its validation images, the lower one of equals. "
        "Intervals allow for splits that share images."
    ]
    return Findings(figures, [chart], notes)


def _best(results: tuple[FitResult, ...]) -> int:
    """Return the index of the layer of best validation accuracy; the first of equals."""
    return int(np.argmax([result.validation_accuracy or 0.0 for result in results]))
