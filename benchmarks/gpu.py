"""Whether the CUDA path is right, and how fast it is: one call on a machine with a GPU, in under six minutes.

Each step runs in a process of its own within a time limit, and an error in one part of a step leaves the other parts,
so that whatever fails, the table has the rest; the exit code is 1 then. The processes are forked from one that has
imported everything and never touches the device. Photos are repeated, each copy with other bytes
after its end, until there are enough of them. With ``--device cpu`` small networks and few photos take the same way,
which shows that every step works but for the device.

    PYTHONPATH=. python benchmarks/gpu.py PHOTOS [--json FILE] [--device cpu]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import numpy as np
import torch
from extract import Photos, decode_rate, without_classifier
from finetune import tutorial
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from features_cache import open_cache
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import tap
from pipeline.engines.engine import stream
from pipeline.engines.select import Resolved, has_bf16
from pipeline.engines.torch_engine import TorchEngine
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.heads.logreg import Logreg, Loss
from pipeline.images.loader import default_workers, load_images
from pipeline.images.sources.registry import open_source
from pipeline.provenance import machine
from pipeline.spec import Preprocessing

LAYER = "penultimate"
SECONDS_IN_ALL = 345
"""On a GPU; the small form may take as long as it likes."""

loaded = cache(load_backbone)
"""For those who leave the network as it is."""


@dataclass(frozen=True)
class Setting:
    """What is measured, and on what.

    Parameters
    ----------
    photos : Path
        Folder of class folders.
    device : str
        ``"cuda"``, ``"cuda:INDEX"``, or ``"cpu"`` for the small form.
    """

    photos: Path
    device: str

    @property
    def cuda(self) -> bool:
        """Whether this is the real form."""
        return self.device != "cpu"

    def choose(self, real: Any, small: Any) -> Any:
        """Return what fits the form."""
        return real if self.cuda else small

    @property
    def networks(self) -> list[str]:
        """The networks whose speed is measured."""
        real = ["efficientnet_lite0", "resnet50@random:0", "vgg19@random:0", "vit_small_patch14_dinov2@random:0"]
        return list(self.choose(real, ["timm/test_resnet@random:0"]))

    @property
    def batches(self) -> list[int]:
        """The batch sizes."""
        return list(self.choose([64, 128, 256, 512], [4, 8]))

    @property
    def batch(self) -> int:
        """The batch size that is taken by default."""
        return self.resolved("fp32").batch_size

    @property
    def fast(self) -> str:
        """The precision that is fast: bf16, but on a CPU that only emulates it."""
        return "bf16" if has_bf16(self.device) else "fp32"

    def resolved(self, precision: str, engine: str = "torch") -> Resolved:
        """Return how to compute."""
        return Resolved(engine, self.device, precision)


class Line(NamedTuple):
    """A line of the table; `right` is None where nothing is checked."""

    what: str
    value: float
    unit: str
    note: str = ""
    right: bool | None = None


Lines = Iterator[Line]


# 1: correctness


def device_name(setting: Setting) -> Lines:
    """Say what is measured."""
    if setting.cuda:
        card = torch.cuda.get_device_properties(setting.device)
        libraries = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
        yield Line(card.name, card.total_memory / 2**30, "GiB", libraries)
    yield Line("cores that this process may use", default_workers(), "", f"torch {torch.__version__}")


def features_of(name: str, resolved: Resolved, pixels: np.ndarray) -> np.ndarray:
    """Return the features (n, d) of uint8 pixels (n, h, w, 3)."""
    engine = TorchEngine(tap(loaded(name), [LAYER]), resolved, resolved.batch_size)
    batches = [pixels[start : start + resolved.batch_size] for start in range(0, len(pixels), resolved.batch_size)]
    return np.concatenate([features for (features,) in stream(engine, batches)])


def pixels_of(setting: Setting, rule: Preprocessing, count: int) -> np.ndarray:
    """Return the first photos, decoded as `extract` does."""
    (images,) = load_images(open_source(setting.photos), range(count), [rule], count)
    return np.stack([image.pixels[0] for image in images if image.pixels is not None])


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of one array with that of the other."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.asarray((first * second).sum(axis=1) / norms)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def agreement(setting: Setting, name: str) -> Lines:
    """Compare the features of the device with those of the CPU in float32."""
    pixels = pixels_of(setting, loaded(name).preprocessing, setting.choose(48, 12))
    expected = features_of(name, Resolved("torch", "cpu", "fp32"), pixels)
    off = difference(features_of(name, setting.resolved("fp32"), pixels), expected)
    yield Line(f"{name}: fp32 against the CPU", off, "largest relative difference", "at most 0.001", off <= 1e-3)
    alike = cosines(features_of(name, setting.resolved(setting.fast), pixels), expected)
    note = f"at least 0.998; least {alike.min():.4f}"
    yield Line(
        f"{name}: {setting.fast} against the CPU", float(alike.mean()), "mean cosine", note, bool(alike.mean() >= 0.998)
    )


def begun_on_the_cpu(setting: Setting, name: str) -> Lines:
    """Begin a cache on the CPU and finish it on the device."""
    uris = [item.uri for item in open_source(setting.photos).items][: setting.choose(32, 12)]
    plain = partial(extract, setting.photos, [name], [LAYER], precision="fp32", engine="torch")
    with tempfile.TemporaryDirectory() as folder:
        begun, straight = Path(folder) / "begun", Path(folder) / "straight"
        plain(output=begun, device="cpu", only=uris[::2])
        (result,) = plain(output=begun, device=setting.device, only=uris)
        (expected,) = plain(output=straight, device="cpu", only=uris)
        found, wanted = (open_cache(one.path) for one in (result, expected))
        devices = [run["device"] for run in found.runs]
        off = difference(found.matrix(LAYER)[: len(uris)], wanted.matrix(LAYER)[: len(uris)])
    right = off <= 1e-3 and result.done == len(uris) and devices == ["cpu", setting.device]
    yield Line(f"{name}: begun on {', finished on '.join(devices)}", off, "largest relative difference", "", right)


# 2: the model alone


def images_per_second(call: Callable[[], object], images: int, setting: Setting) -> float:
    """Return the median rate of `call`, which computes so many images, over three times that it is repeated."""

    def seconds(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            call()
        if setting.cuda:
            torch.cuda.synchronize(setting.device)
        return time.perf_counter() - began

    seconds(3)
    times = min(100, max(2, int(0.25 / seconds(1))))
    return statistics.median(images * times / seconds(times) for _ in range(3))


def on_device(setting: Setting, name: str, resolved: Resolved, batch: int) -> tuple[TorchEngine, Tensor]:
    """Return an engine, and random pixels (batch, h, w, 3) in the device's memory."""
    backbone = loaded(name)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, *backbone.preprocessing.size, 3), dtype=torch.uint8, generator=generator)
    return TorchEngine(tap(backbone, [LAYER]), resolved, batch), pixels.to(setting.device)


def eager_rates(setting: Setting, name: str) -> Lines:
    """Measure bf16 and float32, and say what the default batch size reaches of the best."""
    rates, fast = {}, setting.fast
    for batch in setting.batches:
        engine, pixels = on_device(setting, name, setting.resolved(fast), batch)
        rates[batch] = images_per_second(partial(engine.features, pixels), batch, setting)
        yield Line(f"{name}: {fast}, batch {batch}", rates[batch], "images/s")
    best = max(rates, key=lambda batch: rates[batch])
    share = 100 * rates[setting.batch] / rates[best]
    yield Line(f"{name}: batch {setting.batch}, the default", share, f"% of the best, {best}")
    engine, pixels = on_device(setting, name, setting.resolved("fp32"), setting.batch)
    rate = images_per_second(partial(engine.features, pixels), setting.batch, setting)
    yield Line(f"{name}: fp32, batch {setting.batch}", rate, "images/s")
    engine, pixels = on_device(setting, name, setting.resolved(fast), setting.batch)
    torch.backends.cudnn.benchmark = True
    rate = images_per_second(partial(engine.features, pixels), setting.batch, setting)
    torch.backends.cudnn.benchmark = False
    note = f"{rate / rates[setting.batch]:.2f} times {fast} without"
    yield Line(f"{name}: {fast}, cudnn.benchmark, batch {setting.batch}", rate, "images/s", note)


def graph_rates(setting: Setting, name: str) -> Lines:
    """Measure CUDA graphs where the launches of small batches may be what takes time."""
    for batch in setting.batches[:2]:
        engine, pixels = on_device(setting, name, setting.resolved("bf16"), batch)
        eager = images_per_second(partial(engine.features, pixels), batch, setting)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            engine.features(pixels)
        rate = images_per_second(graph.replay, batch, setting)
        yield Line(f"{name}: bf16, CUDA graph, batch {batch}", rate, "images/s", f"{rate / eager:.2f} times eager")


def compiled_rate(setting: Setting, name: str) -> Lines:
    """Measure what is compiled, and the time that compiling takes."""
    engine, pixels = on_device(setting, name, setting.resolved(setting.fast), setting.batch)
    eager = images_per_second(partial(engine.features, pixels), setting.batch, setting)
    engine, pixels = on_device(setting, name, setting.resolved(setting.fast, "compile"), setting.batch)
    began = time.perf_counter()
    engine.features(pixels)
    note = f"{time.perf_counter() - began:.0f} s to compile"
    rate = images_per_second(partial(engine.features, pixels), setting.batch, setting)
    what = f"{name}: {setting.fast}, compiled, batch {setting.batch}"
    yield Line(what, rate, "images/s", f"{rate / eager:.2f} times eager; {note}")


# 3: from files to a cache


def plain_rate(setting: Setting, backbone: Backbone) -> float:
    """Return images/s of the recipe that most people write: a DataLoader with workers, bf16 autocast.

    The network of `backbone` is on the device afterwards.
    """
    paths = [setting.photos / item.uri for item in open_source(setting.photos).items]
    workers = setting.choose(8, 2)
    loader = DataLoader(Photos(paths, backbone), 128, num_workers=workers, pin_memory=setting.cuda)
    kind = torch.device(setting.device).type
    with without_classifier(backbone) as network:
        network.to(setting.device)(torch.zeros(1, 3, *backbone.preprocessing.size, device=setting.device))
        began = time.perf_counter()
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=setting.fast == "bf16"):
            batches = [network(batch.to(setting.device, non_blocking=True)).float().cpu() for batch in loader]
        with tempfile.TemporaryFile() as file:
            np.save(file, torch.cat(batches).numpy())
        return len(paths) / (time.perf_counter() - began)


def end_to_end(setting: Setting, name: str) -> Lines:
    """Measure `extract`, the plain recipe, and what decoding and the model allow."""
    how: dict[str, Any] = {"engine": "torch", "device": setting.device, "precision": setting.fast}
    call = partial(extract, setting.photos, [name], [LAYER], **how)
    uris = [item.uri for item in open_source(setting.photos).items]
    with tempfile.TemporaryDirectory() as folder:
        call(output=Path(folder) / "warm", only=uris[: 2 * setting.batch])
        (result,) = call(output=Path(folder) / "cache")
    rate = result.images_per_second
    backbone = load_backbone(name)
    decode = decode_rate(setting.photos, backbone)
    engine, pixels = on_device(setting, name, setting.resolved(setting.fast), setting.batch)
    model = images_per_second(partial(engine.features, pixels), setting.batch, setting)
    plain = plain_rate(setting, backbone)
    allowed = f"decoding alone {decode:.0f}, model alone {model:.0f}"
    yield Line(f"{name}: extract", rate, "images/s", f"bound by {result.bound}; {allowed}; {len(uris)} files")
    yield Line(f"{name}: plain recipe", plain, "images/s", f"extract is {rate / plain:.1f} times as fast")
    yield Line(f"{name}: extract", 100 * rate / min(decode, model), "% of what the slower of the two allows")
    yield Line(f"{name}: extract", 100 * rate / model, "% of the model alone")


# 4: decoding


def on_threads(setting: Setting, name: str) -> Lines:
    """Measure reading and decoding on the CPU."""
    rate = decode_rate(setting.photos, loaded(name))
    yield Line("decoding on CPU threads", rate, "images/s", f"{default_workers()} cores")


def decoded(data: Sequence[Tensor], device: str, rule: Preprocessing | None) -> list[Tensor]:
    """Decode JPEGs on a device, and resize and crop them there by `rule`."""
    images = decode_jpeg(list(data), mode=ImageReadMode.RGB, device=device)
    if rule is None:
        return list(images)
    mode, side = InterpolationMode(rule.interpolation), rule.resize
    sizes = [side] if isinstance(side, int) else list(side)
    return [center_crop(resize(image, sizes, interpolation=mode, antialias=True), list(rule.size)) for image in images]


def on_the_device(setting: Setting, name: str) -> Lines:
    """Measure torchvision's decoder on the device, and what it changes in the features."""
    backbone, count = loaded(name), setting.choose(256, 16)
    rule = backbone.preprocessing
    paths = [setting.photos / item.uri for item in open_source(setting.photos).items][:count]
    data = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths]
    for what, wanted in (("alone", None), ("with resizing", rule)):
        rate = images_per_second(partial(decoded, data, setting.device, wanted), count, setting)
        yield Line(f"torchvision's decoder on {setting.device}, {what}", rate, "images/s")
    theirs = torch.stack(decoded(data, setting.device, rule)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    ours = pixels_of(setting, rule, count)
    levels = float(np.abs(theirs.astype(int) - ours.astype(int)).mean())
    yield Line(f"{name}: pixels, against the CPU's decoder", levels, "grey levels, mean difference")
    alike = cosines(*(features_of(name, setting.resolved("fp32"), pixels) for pixels in (theirs, ours)))
    yield Line(f"{name}: features, against them", float(alike.mean()), "mean cosine", f"least {alike.min():.4f}")


# 5: training


def tuning_rates(setting: Setting, name: str, line: str) -> Lines:
    """Measure an epoch of training everything, and of what is above a line, beside a plain loop that trains all."""
    plain = tutorial(setting.photos, name, setting.device, setting.choose(8, 2))
    for freeze in ("none", line):
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"output": folder, "engine": "torch", "device": setting.device}
            report = finetune(setting.photos, name, freeze=freeze, epochs=2, **options)
        (result,) = report.results
        rate = result.n_train / result.history[-1]["seconds"]
        note = f"{rate / plain:.1f} times the plain loop; second epoch, which reads pictures or activations again"
        yield Line(f"{name}: finetune, freeze {freeze}", rate, "images/s", note)
    note = "bf16 autocast, trains everything; its workers decode meanwhile" if setting.cuda else ""
    yield Line(f"{name}: plain loop", plain, "images/s", note)


def rows_of(count: int, classes: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 rows (count, dim) about the means of classes, and the classes."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, classes, count)
    means = generator.standard_normal((classes, dim), np.float32) / 10
    return means[y] + generator.standard_normal((count, dim), np.float32), y


def fit_seconds(setting: Setting, rows: int, classes: int, dim: int) -> Lines:
    """Measure a whole fit of logistic regression for one C, on the CPU and on the device."""
    x, y = rows_of(rows, classes, dim)
    seconds, labels = {}, []
    for device in (None, setting.device):
        Logreg(device).fit({"C": 1e-4}, x[:1000], y[:1000])
        began = time.perf_counter()
        labels.append(Logreg(device).fit({"C": 1e-4}, x, y).estimator.predict(x[:5000]))
        seconds[device or "the CPU"] = time.perf_counter() - began
    same = float((labels[0] == labels[1]).mean())
    for place, taken in seconds.items():
        note = f"{100 * same:.2f} % of the labels are the CPU's" if place == setting.device else "BLAS on all cores"
        yield Line(f"fit {rows}x{dim}, {classes} classes on {place}", taken, "s", note, same >= 0.999)


def gradient_seconds(setting: Setting, rows: int, classes: int, dim: int) -> Lines:
    """Measure one value and gradient of the loss, of which a fit takes hundreds."""
    x, y = rows_of(rows, classes, dim)
    weights = np.random.default_rng(1).standard_normal((classes, dim + 1)) / 100
    gradients = {}
    for device in (None, setting.device):
        loss = Loss(x, y, None, device)
        loss.value_and_gradient(weights, 1e-3)
        began = time.perf_counter()
        _, gradients[device] = loss.value_and_gradient(weights, 1e-3)
        taken = time.perf_counter() - began
        off = difference(gradients[device], gradients[None])
        what = f"value and gradient {rows}x{dim}, {classes} classes on {device or 'the CPU'}"
        yield Line(what, taken, "s", f"{off:.1g} off, relative" if device else "", off <= 1e-3)


# 6: too large a batch


@contextmanager
def little_memory(setting: Setting) -> Iterator[None]:
    """Leave 2 GiB of the card's memory; in the small form, room for 8 images."""
    if setting.cuda:
        total = torch.cuda.get_device_properties(setting.device).total_memory
        torch.cuda.set_per_process_memory_fraction(2**31 / total)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    real = TorchEngine.features

    def features(self: TorchEngine, images: Tensor) -> list[Tensor]:
        if len(images) > 8:
            raise torch.OutOfMemoryError("the small form has room for 8 images")
        return real(self, images)

    with patch.object(TorchEngine, "features", features):
        yield


def too_large_a_batch(setting: Setting, name: str) -> Lines:
    """Extract in batches that do not fit."""
    uris = [item.uri for item in open_source(setting.photos).items][: setting.choose(1024, 32)]
    call = partial(extract, setting.photos, [name], [LAYER], precision="fp32", engine="torch", device=setting.device)
    with tempfile.TemporaryDirectory() as folder:
        (expected,) = call(output=Path(folder) / "plain", batch_size=8, only=uris)
        with little_memory(setting):
            (found,) = call(output=Path(folder) / "large", batch_size=len(uris), only=uris)
        arrays = [open_cache(result.path).matrix(LAYER)[: len(uris)] for result in (found, expected)]
        off = difference(*arrays)
    halved = [note for note in found.notes if "do not fit" in note]
    what = f"{name}: batch {len(uris)}, halved {len(halved)} times"
    yield Line(what, off, "largest relative difference", "; ".join(halved[-1:]), bool(halved) and off <= 1e-3)


# The steps, each in a process


class Step(NamedTuple):
    """Parts of which each may fail alone, and the seconds that they may take together."""

    seconds: int
    parts: Callable[[Setting], list[partial[Lines]]]


def _for_networks(measure: Callable[[Setting, str], Lines]) -> Callable[[Setting], list[partial[Lines]]]:
    return lambda setting: [partial(measure, setting, name) for name in setting.networks]


def _correctness(setting: Setting) -> list[partial[Lines]]:
    real = ["efficientnet_lite0", "resnet50@random:0", "vit_small_patch14_dinov2@random:0"]
    names = setting.choose(real, ["efficientnet_lite0", "timm/test_vit@random:0"])
    whole = partial(begun_on_the_cpu, setting, names[-1])
    return [partial(device_name, setting), *(partial(agreement, setting, name) for name in names), whole]


def _decoding(setting: Setting) -> list[partial[Lines]]:
    name = setting.choose("efficientnet_lite0", "timm/test_resnet@random:0")
    return [partial(on_threads, setting, name), partial(on_the_device, setting, name)]


def _tuning(setting: Setting) -> list[partial[Lines]]:
    real, small = ("efficientnet_lite0", "blocks.4"), ("timm/test_efficientnet@random:0", "blocks.1")
    return [partial(tuning_rates, setting, *setting.choose(real, small))]


def _heads(setting: Setting) -> list[partial[Lines]]:
    whole = partial(fit_seconds, setting, *setting.choose((50_000, 10, 1280), (2_000, 10, 128)))
    return [whole, partial(gradient_seconds, setting, *setting.choose((100_000, 1000, 1280), (2_000, 50, 128)))]


STEPS = {
    "1 correctness": Step(60, _correctness),
    "6 too large a batch": Step(30, lambda setting: [partial(too_large_a_batch, setting, setting.networks[-1])]),
    "3 files to cache": Step(80, _for_networks(end_to_end)),
    "2 model alone": Step(80, _for_networks(eager_rates)),
    "4 decoding": Step(30, _decoding),
    "5 fine-tuning": Step(50, _tuning),
    "5 heads": Step(50, _heads),
    "2 model, CUDA graphs": Step(30, lambda setting: _for_networks(graph_rates)(setting) if setting.cuda else []),
    "2 model, compiled": Step(150, _for_networks(compiled_rate)),
}
"""In the order in which they run: what takes most of the time, and is needed least, comes last."""


def measure(step: str, setting: Setting, into: Path, errors: Path) -> None:
    """Run the parts of a step in this process, a child, and write each line as soon as it is known."""
    os.setsid()  # ends together with all that it starts
    with errors.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if ":" in setting.device:
        torch.cuda.set_device(setting.device)
    with into.open("w") as file:

        def write(entry: dict[str, Any]) -> None:
            file.write(json.dumps({"step": step, **entry}) + "\n")
            file.flush()

        for part in STEPS[step].parts(setting):
            try:
                for line in part():
                    write(line._asdict())
            except Exception:
                what = " ".join([part.func.__name__, *map(str, part.args[1:])])
                write(failure(what, traceback.format_exc(limit=-4)))


def failure(what: str, trace: str) -> dict[str, Any]:
    """Return the line of what could not be measured."""
    last = trace.strip().splitlines()[-1] if trace.strip() else ""
    return Line(what, float("nan"), "", last[:200], right=False)._asdict() | {"value": None, "traceback": trace}


def run_step(step: str, setting: Setting, seconds: float | None) -> list[dict[str, Any]]:
    """Run a step in a process of its own, ended with all that it started when its time is over; return its lines."""
    with tempfile.TemporaryDirectory() as folder:
        into, errors = Path(folder) / "lines", Path(folder) / "errors"
        into.touch()
        errors.touch()
        child = multiprocessing.get_context("fork").Process(target=measure, args=(step, setting, into, errors))
        child.start()
        try:
            child.join(seconds)
            ended = f"not finished within {seconds} s" if child.is_alive() else f"ended with {child.exitcode}"
        finally:
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            child.kill()  # where it has not even got to a group of its own
            child.join()
        lines = [json.loads(line) for line in into.read_text().splitlines() if line.endswith("}")]
        if child.exitcode:
            lines.append({"step": step, **failure(step, f"{errors.read_text()[-1500:]}\n{ended}")})
        return lines


def repeat_photos(source: Path, folder: Path, count: int) -> None:
    """Write `count` files into ten class folders: the photos of `source`, again and again, no two of equal bytes."""
    items = [item.uri for item in open_source(source).items]
    if not items:
        raise click.UsageError(f"{source} holds no photos")
    for number, uri in enumerate(islice(cycle(items), count)):
        path = folder / str(number % 10) / f"{number:06d}{Path(uri).suffix}"
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(source / uri, path)
        with path.open("ab") as file:
            file.write(number.to_bytes(8, "little"))


def table_of(lines: list[dict[str, Any]]) -> Table:
    """Return the lines as one table."""
    table = Table("step", "what", "value", "unit", "note", "", box=None)
    for line in sorted(lines, key=lambda line: str(line["step"])):
        value = "–" if line["value"] is None else f"{line['value']:.4g}"
        mark = {None: "", True: "right", False: "WRONG"}[line["right"]]
        table.add_row(line["step"], line["what"], value, line["unit"], line["note"], mark)
    return table


@click.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all lines here.")
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:N, or cpu for the small form.")
@click.option("--step", "steps", multiple=True, type=click.Choice(list(STEPS)), help="Only this one; repeat.")
def main(photos: Path, json_file: Path | None, device: str, steps: tuple[str, ...]) -> None:
    """Check and measure the CUDA path with the photos of a folder."""
    began = time.monotonic()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), device)
        repeat_photos(photos, setting.photos, setting.choose(6_000, 40))
        for name in steps or STEPS:
            left = max(0, round(SECONDS_IN_ALL - (time.monotonic() - began)))
            lines += run_step(name, setting, min(STEPS[name].seconds, left) if setting.cuda else None)
            click.echo(f"{name}: done after {time.monotonic() - began:.0f} s", err=True)
    report = {"machine": machine(), "device": device, "seconds": round(time.monotonic() - began), "lines": lines}
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1))
    Console(width=200).print(table_of(lines))
    sys.exit(any(line["right"] is False for line in lines))


if __name__ == "__main__":
    main()
