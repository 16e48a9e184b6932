"""What works with each family of timm and torchvision: ``python benchmarks/families.py --output families.jsonl``.

Takes the smallest network of every family, with random weights, and compares in float32:

- features: every stage, penultimate and logits against plain forward hooks, whole activations, at most 1e-5 relative;
- openvino: the pooled features of the OpenVINO engine against those of torch, at most 1e-3 relative;
- thaw line: how many layers it can follow; trunk and thawed part at the middle one against the whole, bit for bit;
- onnx: penultimate and logits in ONNX Runtime against torch, at most 1e-3 relative.

Each family runs in a process of its own, and each check has a time limit; seconds are of one processor. What the output
file has already is not done again. ``python benchmarks/families.py --network timm/convit_tiny`` checks one network in
this process.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from features_cache import ThawlineError
from pipeline.backbones.aliases import LOGITS, PENULTIMATE
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import find_tap, resolved_aliases
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import normalisation, tap
from pipeline.backbones.thaw_line import find_line, possible_lines, split, top_input
from pipeline.backbones.trace import hooked
from pipeline.export import INPUT, onnx_program
from pipeline.spec import NO_POOL

LIMIT_S = 600
BOUNDS = {"features": 1e-5, "openvino": 1e-3, "thaw line": float("inf"), "onnx": 1e-3}
CHECKS = tuple(BOUNDS)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="Keep the results in this file, and go on with it.")
@click.option("--network", help="Check only this one, in this process, and print JSON.")
@click.option("--check", "checks", type=click.Choice(CHECKS), multiple=True, default=CHECKS, help="Do only this one.")
def main(output: Path | None, network: str | None, checks: Sequence[str]) -> None:
    """Print a table of all families, and the counts."""
    if network:
        for found in check(network, checks):
            print(json.dumps(found))
        return
    output = output or Path(tempfile.mkdtemp()) / "families.jsonl"
    lines = output.read_text().splitlines() if output.exists() else []
    rows: dict[str, dict[str, Any]] = {row["family"]: row for row in map(json.loads, lines)}
    for name, members in families().items():
        row = rows.setdefault(name, {"family": name})
        left = [one for one in checks if one not in row and "error" not in row]
        if left:
            row.setdefault("network", min(members, key=weight))
            before = row.get("seconds", 0.0)
            row |= run(row["network"], left)
            row["seconds"] = round(before + row.get("seconds", 0.0), 1)
            with output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, file=sys.stderr, flush=True)
    report(list(rows.values()))


def families() -> dict[str, list[str]]:
    """Return the networks of each family, by the name of the module that defines it; timm's test networks, if any."""
    import timm
    import torchvision

    members: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        members[f"timm {timm.models.model_entrypoint(name).__module__.rpartition('.')[2]}"].append(f"timm/{name}")
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        members[f"torchvision {module}"].append(f"torchvision/{name}")
    return {family: [name for name in names if "/test_" in name] or names for family, names in sorted(members.items())}


def weight(name: str) -> float:
    """Return the number of parameters of a network, infinity if it cannot be built."""
    try:
        with torch.device("meta"):
            zoo, bare = name.split("/")
            if zoo == "timm":
                import timm

                module = timm.create_model(bare)
            else:
                import torchvision

                module = torchvision.models.get_model(bare, weights=None)
        return sum(item.numel() for item in module.parameters())
    except Exception:  # a network that cannot even be built is the last choice
        return float("inf")


def run(network: str, checks: Sequence[str]) -> dict[str, Any]:
    """Check one network in a process of its own."""
    context = multiprocessing.get_context("fork")  # libraries are imported only once
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=send_checks, args=(sending, network, checks))
    child.start()
    sending.close()
    row: dict[str, Any] = {}
    for name in ("error", *checks):  # it first tells what was loaded
        if not receiving.poll(LIMIT_S):
            row[name] = f"not done in {LIMIT_S} s"
            break
        try:
            row |= receiving.recv()
        except EOFError:
            row[name] = "its process ended early"
            break
        if "error" in row:
            break
    child.kill()
    child.join()
    return row


def send_checks(sending: Connection, network: str, checks: Sequence[str]) -> None:
    """Send what `check` yields."""
    for found in check(network, checks):
        sending.send(found)


def check(network: str, checks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield what the network is or why it cannot be loaded, then for each check a difference or a count, or why not."""
    torch.manual_seed(0)
    try:
        backbone = load_backbone(f"{network}@random:0")
        yield {"layers": len(backbone.traced.shapes), "traced": backbone.traced.graph is not None}
    except Exception as error:
        yield {"error": reason(error)}
        return
    height, width = backbone.preprocessing.size
    pixels = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    for name in checks:
        found: float | str
        try:
            found = HOW[name](backbone, pixels)
        except Exception as error:  # whatever fails is what this benchmark is there to tell
            found = reason(error)
        yield {name: found, "seconds": round(time.process_time(), 1)}


def reason(error: Exception) -> str:
    """Return what an error says, with its type if it is not one of thawline, which users would not be told."""
    return str(error) if isinstance(error, ThawlineError) else f"{type(error).__name__}: {error}"[:200]


def layers_of(backbone: Backbone) -> list[str]:
    """Return the stages, penultimate and logits, as far as there are any."""
    return list(
        dict.fromkeys(name for names in resolved_aliases(backbone).values() for name in names if name != "input")
    )


def features(backbone: Backbone, pixels: Tensor) -> float:
    """Return the largest relative difference to what plain hooks see."""
    modules = dict(backbone.module.named_modules())
    layers = [name for name in layers_of(backbone) if name in modules or name == PENULTIMATE]
    seen: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, value: Any) -> None:
            seen.setdefault(name, value.clone())
            if name in backbone.classifiers:
                read.setdefault(name, args[0].clone())

        return hook

    scale, shift = normalisation(backbone.preprocessing)
    with torch.inference_mode():
        names = {*layers, *backbone.classifiers} - {PENULTIMATE, LOGITS}
        with hooked(backbone.module, {name: keep(name) for name in names}):
            answer = backbone.module(pixels.permute(0, 3, 1, 2).float() * scale + shift)
        if read:
            vectors: list[Tensor] = []  # classifiers may read the same one
            for name in backbone.classifiers:
                if not any(torch.equal(read[name], other) for other in vectors):
                    vectors.append(read[name])
            seen[PENULTIMATE] = torch.cat([averaged(one) for one in vectors], 1)
        pooled = {
            name: "avg" if name == PENULTIMATE else NO_POOL for name in layers
        }  # none would take the map before it
        found = {name: tap(backbone, [name], pool)(pixels)[0] for name, pool in pooled.items()}
        if LOGITS in resolved_aliases(backbone):
            found[LOGITS], seen[LOGITS] = tap(backbone, [LOGITS])(pixels)[0], answer
    worst = 0.0
    for name, one in found.items():
        item = find_tap(backbone.traced, name)
        wanted = seen[name].permute(0, 3, 1, 2) if item and item.layout.kind == "map_last" else seen[name]
        worst = max(worst, difference(one, wanted.flatten(1)))
    return worst


def averaged(read: Tensor) -> Tensor:
    """Return the vectors (n, d) of what a classifier reads: vectors, tokens (n, tokens, d) or maps (n, d, h, w)."""
    return read.mean(1) if read.ndim == 3 else read.flatten(2).mean(2) if read.ndim == 4 else read


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def openvino(backbone: Backbone, pixels: Tensor) -> float | str:
    """Return the largest relative difference of the engine's features to torch's."""
    from pipeline.engines.engine import build_engine
    from pipeline.engines.select import resolve

    network = tap(backbone, layers_of(backbone))
    engine = build_engine(network, resolve("openvino", "cpu", "fp32"), len(pixels))
    if engine.notes:
        return engine.notes[0]
    arrays = engine.start(pixels.numpy())()
    with torch.inference_mode():
        return max(difference(torch.from_numpy(a), b) for a, b in zip(arrays, network(pixels), strict=True))


def thaw_line(backbone: Backbone, pixels: Tensor) -> int | str:
    """Return how many layers the line can follow, if trunk and thawed part together are the whole, bit for bit."""
    lines = list(possible_lines(backbone))
    if not lines:
        find_line(backbone, PENULTIMATE)  # raises what a user is told
    scale, shift = normalisation(backbone.preprocessing)
    images = pixels.permute(0, 3, 1, 2).float() * scale + shift
    trunk, body = split(backbone, find_line(backbone, lines[len(lines) // 2]))
    _, whole = split(backbone, None)
    assert trunk is not None
    with torch.inference_mode():
        same = torch.equal(body(trunk(images)), whole(images))
    return len(lines) if same else f"differs at {lines[len(lines) // 2]} of {top_input(backbone).shape}"


def onnx(backbone: Backbone, pixels: Tensor) -> float:
    """Return the largest relative difference of ONNX Runtime's features to torch's."""
    import onnxruntime  # type: ignore[import-untyped]

    network = tap(backbone, [name for name in (PENULTIMATE, LOGITS) if name in resolved_aliases(backbone)])
    names = [f"out{index}" for index in range(len(network.layers))]
    program = onnx_program(network, network.size, names)
    with tempfile.TemporaryDirectory() as folder:
        program.save(path := Path(folder) / "network.onnx")
        session = onnxruntime.InferenceSession(path)
    with torch.inference_mode():
        arrays = zip(session.run(None, {INPUT: pixels.numpy()}), network(pixels), strict=True)
        return max(difference(torch.from_numpy(a), b) for a, b in arrays)


HOW: dict[str, Callable[[Backbone, Tensor], float | str]] = {
    "features": features,
    "openvino": openvino,
    "thaw line": thaw_line,
    "onnx": onnx,
}


def report(rows: list[dict[str, Any]]) -> None:
    """Print a line for each family as a table in Markdown, why checks were not passed, and how many were."""
    reasons: list[str] = []
    print(f"| family | network | layers | {' | '.join(CHECKS)} | seconds |\n" + "|---" * (len(CHECKS) + 4) + "|")
    for row in rows:
        cells = [row["family"], row["network"].partition("/")[2], row.get("layers", "–")]
        for name in CHECKS:
            found = row.get("error") or row.get(name, "–")
            if isinstance(found, str) and found != "–":
                reasons += [] if found in reasons else [found]
                found = f"({reasons.index(found) + 1})"
            cells.append(f"{found:.0e}" if isinstance(found, float) else found)
        print(f"| {' | '.join(map(str, [*cells, round(row['seconds'])]))} |")
    print()
    for number, why in enumerate(reasons, 1):
        print(f"{number}. {why}")
    for name in CHECKS:
        passed = sum(isinstance(row.get(name), int | float) and row[name] <= BOUNDS[name] for row in rows)
        print(f"\n{name}: {passed} of {sum(name in row or 'error' in row for row in rows)} families")


if __name__ == "__main__":
    main()
