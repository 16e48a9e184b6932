"""How long a whole `thawline compare` takes, and how little of that is its own.

The plan is two backbones x their stages x two heads x shots (1, 5, 20, all) x three seeds, and, with `--finetune`, two
fine-tunes on cached trunks. Overhead is the share of the run's time outside the stages `extract`, `fit` and `finetune`;
`idle` is the larger share in which no image is extracted, no head fitted (one a core) and no network trained: starts of
torch and of workers, and loading of networks, are in that too. Then the same command again, in a process of its
own, with nothing to do.

    python benchmarks/compare.py SOURCE [--finetune] [--seeds 3]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import joblib

from pipeline.compare import compare

PLAN = """\
source = {source}
seed = {seeds}
shots = {shots}

[[extract]]
backbone = ["efficientnet_lite0", "efficientnet_lite1"]
layer = "stages"

[[fit]]
head = ["logreg", "centroid"]
"""
FINETUNE = """
[[finetune]]
freeze = ["all", "blocks.4"]
shots = "all"
seed = 0
"""


@contextmanager
def timed_stages(spent: dict[str, float]) -> Iterator[None]:
    """Add the time inside each stage to `spent`, that of a stage called by another to the other alone."""
    inside: list[str] = []
    stages = {name: import_module(f"pipeline.{name}") for name in spent}
    plain = {name: getattr(module, name) for name, module in stages.items()}

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            inside.append(name)
            try:
                return plain[name](*args, **kwargs)
            finally:
                inside.pop()
                spent[name] += 0.0 if inside else time.perf_counter() - began

        return call

    for name, module in stages.items():
        setattr(module, name, timed(name))
    try:
        yield
    finally:
        for name, module in stages.items():
            setattr(module, name, plain[name])


def measure(plan: Path, run: Path) -> dict[str, Any]:
    """Run the plan and return where its seconds went."""
    started = time.perf_counter()
    stages = dict.fromkeys(("extract", "fit", "finetune"), 0.0)
    with timed_stages(stages):
        report = compare(plan, run)
    whole = time.perf_counter() - started
    provenance = json.loads((run / "run.json").read_text())
    extraction = sum(entry["seconds"] for entry in provenance["extractions"].values())
    heads = sum(each.result.seconds for each in report.results if each.result.kind == "head")
    tunes = sum(each.result.seconds for each in report.results if each.result.kind == "finetune")
    cores = joblib.cpu_count()
    busy = extraction + heads / cores + tunes
    return {
        "results": len(report.results),
        "failures": len(report.failures),
        "seconds": whole,
        "extraction": extraction,
        "fits": heads,
        "cores": cores,
        "finetunes": tunes,
        "stages": stages,
        "overhead": 1 - sum(stages.values()) / whole,
        "idle": 1 - busy / whole,
        "report_bytes": (run / "report.html").stat().st_size,
    }


def rerun(plan: Path, run: Path) -> float:
    """Return the seconds of the command with nothing to do, the start of Python included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cli", "compare", str(plan), "-o", str(run)], check=True, capture_output=True)
    return time.perf_counter() - started


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--finetune", is_flag=True, help="Fine-tune on cached trunks too.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--shots", multiple=True, default=("1", "5", "20", "all"), show_default=True)
def main(source: Path, finetune: bool, seeds: int, shots: tuple[str, ...]) -> None:
    """Measure a comparison over SOURCE."""
    with tempfile.TemporaryDirectory() as folder:
        plan, run = Path(folder) / "plan.toml", Path(folder) / "run"
        numbers = json.dumps([int(count) if count.isdigit() else count for count in shots])
        text = PLAN.format(source=json.dumps(str(source.resolve())), seeds=list(range(seeds)), shots=numbers)
        plan.write_text(text + (FINETUNE if finetune else ""))
        found = measure(plan, run)
        found["rerun"] = rerun(plan, run)
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
