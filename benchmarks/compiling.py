"""What `--engine compile` gains on this CPU, and what freezing the weights would add to that: batches in memory.

Eager, compiled, and compiled with torch's option `freezing`, which makes weights constants of the graph, take turns in
one process. A gain is the median over rounds of the ratio to eager in the same round, so that whatever else runs slows
all three.

    python benchmarks/compiling.py [--backbone NAME]... [--rounds 15]
"""

from __future__ import annotations

import statistics
import time

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import tap
from pipeline.engines.engine import build_engine, stream
from pipeline.engines.select import resolve
from pipeline.engines.torch_engine import TorchEngine

WAYS = ("eager", "compiled", "compiled, frozen")
BATCHES = 4


def built(name: str, way: str) -> TorchEngine:
    """Return an engine that will compile, if at all, on its first batch."""
    engine = build_engine(
        tap(load_backbone(name), ["penultimate"]), resolve("torch" if way == "eager" else "compile", "cpu"), 8
    )
    assert isinstance(engine, TorchEngine)
    if way == "compiled, frozen":
        network = engine._network.requires_grad_(False)
        engine._call = torch.compile(network, dynamic=False, options={"freezing": True})
    return engine


def seconds(engine: TorchEngine, batches: list[np.ndarray]) -> float:
    """Return how long the batches took."""
    began = time.perf_counter()
    for _ in stream(engine, batches):
        pass
    return time.perf_counter() - began


def measure(name: str, rounds: int) -> list[tuple[str, ...]]:
    """Return a row of the table for each way."""
    shape = (8, *load_backbone(name).preprocessing.size, 3)
    batches = [np.random.default_rng(number).integers(0, 256, shape, np.uint8) for number in range(BATCHES)]
    engines = {way: built(name, way) for way in WAYS}
    for engine in engines.values():
        seconds(engine, batches[:1])  # compiles
    taken = [{way: seconds(engine, batches) for way, engine in engines.items()} for _ in range(rounds)]
    rows: list[tuple[str, ...]] = []
    for way in WAYS:
        rate = statistics.median(8 * BATCHES / times[way] for times in taken)
        gain = statistics.median(times["eager"] / times[way] for times in taken)
        rows.append((name, way, f"{rate:.1f}", f"{gain:.2f}"))
    return rows


@click.command()
@click.option("-b", "--backbone", "names", multiple=True, default=["resnet18@random:0", "resnet50@random:0"])
@click.option("--rounds", type=int, default=15)
def main(names: tuple[str, ...], rounds: int) -> None:
    """Print a table."""
    table = Table("backbone", "way", "images/s", "of eager")
    for name in names:
        for row in measure(name, rounds):
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
