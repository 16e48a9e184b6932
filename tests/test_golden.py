"""The numbers that today's rules give for small made inputs.

If one of these tests fails, the same job now gives other numbers, so that results, checkpoints and features kept from
before are no longer valid. If the change is meant, raise the version that the message names, in `pipeline/spec.py`, and
update the golden numbers in the same commit. The tolerances leave room for other CPUs and library versions.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features_cache import CacheWriter, LayerInfo, Rows
from pipeline.finetune import finetune
from pipeline.fit import fit
from pipeline.heads.registry import FAMILIES
from pipeline.images.resize import prepare
from pipeline.spec import DECODE_POLICY, TRAINING_RULES, Preprocessing

GOLDEN_TRAINING_RULES = 8
GOLDEN_DECODE_POLICY = 2
RAISE = "the numbers changed: raise {} in pipeline/spec.py and update the golden numbers here"
FIT: dict[str, Any] = {
    "logreg/l2, all": [{"C": 0.056234}, 0.79167, 0.83333, 0.79497, 0.96413, 0.64539],
    "logreg/l2, 8": [{"C": 17.783}, 0.83333, 0.625, 0.83704, 0.59064, 0.60028],
    "linear_svm/l2, all": [{"C": 1e-06}, 0.70833, 0.77778, 0.7037, None, None],
    "linear_svm/l2, 8": [{"C": 3.1623}, 0.79167, 0.66667, 0.79799, None, None],
    "rbf_svm/l2, all": [{"C": 0.1, "gamma": 0.12551}, 0.70833, 0.83333, 0.7037, None, None],
    "rbf_svm/l2, 8": [{"C": 1.0, "gamma": 0.50221}, 0.79167, 0.625, 0.79799, None, None],
    "knn/l2, all": [{"k": 50}, 0.70833, 0.83333, 0.70556, 0.83623, 0.68207],
    "knn/l2, 8": [{"k": 3}, 0.58333, 0.625, 0.5711, 0.7623, None],
    "centroid/l2, all": [{}, 0.79167, 0.77778, 0.79497, None, None],
    "centroid/l2, 8": [{}, 0.79167, 0.625, 0.79799, None, None],
    "ridge/l2, all": [{"alpha": 1000000.0}, 0.79167, 0.83333, 0.79497, None, None],
    "ridge/l2, 8": [{"alpha": 0.17783}, 0.79167, 0.625, 0.79497, None, None],
    "logreg/standard, all": [{"C": 0.17783}, 0.79167, 0.77778, 0.79799, 0.6493, None],
    "logreg/standard, 8": [{"C": 1.7783}, 0.70833, 0.58333, 0.71529, 0.68354, 0.6708],
    "knn/none, all": [{"k": 50}, 0.70833, 0.83333, 0.70556, 0.83623, 0.68207],
    "knn/none, 8": [{"k": 3}, 0.58333, 0.625, 0.5711, 0.7623, None],
    "logreg/l2, 3-fold, balanced": [{"C": 0.56234}, 0.69167, 0.8, 0.69136, 1.0697, 0.89168],
}
FINETUNE: dict[str, Any] = {
    "all": [[[1.0961, 1.0895], [1.0876, 1.0858]], 291, 1.0861],
    "layer3": [[[0.68533, 1.0848], [0.14308, 1.0581]], 268131, 1.0579],
    "none": [[[0.92988, 1.028], [0.2068, 1.0085]], 372979, 1.0048],
}
PIXELS: dict[str, str] = {
    "colours": "5a1cf5801cf1a51cedc91ce95a4be4804bd9a54bcec94bc45a80d28080bfa580adc9809a5ab4bf80b4a5a5b48bc9b471",
    "grey": "0a0a0a0e0e0e1212121616161b1b1b2626263131313b3b3b2d2d2d4040405252526565654040405a5a5a7474748e8e8e",
    "transparent": "d6c6fcb97bf6a51cedc91ce9d6d2f8b996e8a54bcec94bc4d6dff4b9b5d8a580adc9809ad6ecefb9d3c7a5b48bc9b471",
    "palette": "5b1ff4811ef0a01fecce1ee75a4ce4824bd9a04ccfce4bc35a81d1817fc0a081aece7f9a53aec888a9a4a1b48dcfb171",
    "16 bit": "5a5a5a7f7f7fa4a4a4c9c9c95a5a5a7f7f7fa4a4a4c9c9c95a5a5a7f7f7fa4a4a4c9c9c95a5a5a7f7f7fa4a4a4c9c9c9",
    "cmyk": "5a1df5801df1a51dedc91de95a4be5804bdaa54bcfc94bc45a80d28080bfa580adc9809a5ab4bf80b4a5a5b48bc9b471",
    "turned": "5ae2af5ab4bf5a80d15b4be580e28d80b4a58080bf804bd9a5e26ca5b48ba580ada54ccec9e24cc9b471ca809aca4bc4",
    "reduced": "5b1cf57f1cf1a51cedca1ce95b4be4804bdaa54bcfca4bc45b80d28080bfa580adca809a5bb4bf80b4a5a5b48bcab471",
    "bilinear": "5a1cf5801cf1a51cedc91ce95a4be4804bd9a54bcec94bc45a80d28080bfa580adc9809a5ab4bf80b4a5a5b48bc9b471",
    "bicubic": "5a18f67f18f3a518efca18ec5a4ae57f4adaa54acfca4ac45a80d27f80bfa580adca809a5ab5bf7fb5a5a5b58acab56f",
    "lanczos": "5b17f78017f3a417f0ca17ed5b4ae4804adaa44acfca4ac45b7fd1807fbfa47fadca7f9a5bb5bf80b5a5a4b58bcab570",
    "nearest": "591af6801af2a61aeec81aeb594ee4804ed8a64eccc84ec25983d18083bea683aac8839959b7bf80b7a3a6b788c8b770",
    "squeezed": "2424fa5f24f2a024e9da24e0245ff15f5fdca05fc4da5fae24a0e85fa0c3a0a09bdaa07624dbe05fdbada0db76dadb43",
}


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """A cache file of 120 rows whose three classes overlap."""
    n, dim = 120, 12
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 3
    values = 0.5 * generator.standard_normal((3, dim))[labels] + generator.standard_normal((n, dim))
    layer = LayerInfo("top", dim, "float32", {"layer": "top", "pool": "avg"}, "top")
    zeros = np.zeros(n, np.int64)
    rows = Rows([f"{row:03d}.png" for row in range(n)], labels.astype(np.int64), [""] * n, [""] * n, zeros, zeros)
    handles = {"source": "made", "backbone": "net", "pool": "avg"}
    request = {"backbone": "net", "layers": ["top"], "pool": "avg", "size": None, "precision": "auto", "aliases": {}}
    path = tmp_path / "made.h5"
    digests = np.zeros((n, 16), np.uint8)
    digests[:, 0] = np.arange(n)
    with CacheWriter.create(path, rows, ("a", "b", "c"), [layer], handles, request) as writer:
        writer.begin_run({})
        writer.write(np.arange(n), {"top": values.astype(np.float32)}, digests)
    return path


def numbers(result: Any) -> list[Any]:
    """Chosen parameters, accuracy, validation accuracy, macro F1, log-loss, log-loss after calibration."""
    names = ("params", "accuracy", "validation_accuracy", "macro_f1", "log_loss", "log_loss_calibrated")
    return [getattr(result, name) for name in names]


def assert_golden(found: dict[str, Any], golden: dict[str, Any]) -> None:
    """Compare floats to 0.1 %, everything else exactly."""
    assert found.keys() == golden.keys()
    for name, expected in golden.items():
        assert _close(found[name], expected), f"{name}: {found[name]}, {RAISE.format('TRAINING_RULES')}"


def _close(found: Any, golden: Any) -> bool:
    if isinstance(golden, dict):
        return found.keys() == golden.keys() and all(_close(found[key], value) for key, value in golden.items())
    if isinstance(golden, list):
        return len(found) == len(golden) and all(map(_close, found, golden))
    return bool(found == (pytest.approx(golden, rel=1e-3, abs=0) if isinstance(golden, float) else golden))


def test_the_golden_numbers_are_those_of_todays_rules() -> None:
    update = "update the golden numbers and their version here, in the commit that raises {}"
    assert GOLDEN_TRAINING_RULES == TRAINING_RULES, update.format("TRAINING_RULES")
    assert GOLDEN_DECODE_POLICY == DECODE_POLICY, update.format("DECODE_POLICY")


def test_every_head_gives_its_golden_numbers(features: Path) -> None:
    heads = [*FAMILIES, "logreg/standard", "knn/none"]
    report = fit(features, heads=heads, shots=["all", 8], jobs=1, device="cpu")
    found = {f"{result.head}, {result.shots}": numbers(result) for result in report.results}
    balanced = fit(features, heads=["logreg"], cv=3, balanced=True, jobs=1, device="cpu").results[0]
    assert_golden(found | {"logreg/l2, 3-fold, balanced": numbers(balanced)}, FIT)


def test_fine_tuning_gives_its_golden_numbers(write_photos: Callable[..., Path], tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", each=10)
    found = {}
    for freeze in ("all", "layer3", "none"):
        report = finetune(
            photos, "test_resnet@random:0", freeze=freeze, epochs=2, size=32, engine="torch", device="cpu",
            precision="fp32", batch_size=8, lr=1e-4, output=tmp_path / "cache",
        )  # fmt: skip
        (result,) = report.results
        losses = [[epoch["train_loss"], epoch["valid_loss"]] for epoch in result.history]
        found[freeze] = [losses, result.trainable_parameters, result.log_loss]
    assert_golden(found, FINETUNE)


def picture(mode: str) -> Image.Image:
    """A smooth picture, 61 wide and 40 high, with another gradient in each channel."""
    y, x = np.mgrid[0:1:40j, 0:1:61j]
    red, green, blue, alpha = x, y, 1 - x * y, 0.25 + 0.75 * (x > 0.5)
    channels = {"L": [x * y], "RGB": [red, green, blue], "RGBA": [red, green, blue, alpha]}[mode]
    return Image.fromarray((255 * np.stack(channels, axis=-1)).round().astype(np.uint8).squeeze())


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def files() -> dict[str, bytes]:
    """One file for each rule of the decode policy."""
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = Image.fromarray((np.linspace(0, 1, 61) * np.ones((40, 1)) * 65_535).astype(np.uint16))
    large = picture("RGB").resize((610, 400), Image.Resampling.BILINEAR)
    return {
        "colours": encoded(picture("RGB"), "PNG"),
        "grey": encoded(picture("L"), "PNG"),
        "transparent": encoded(picture("RGBA"), "PNG"),
        "palette": encoded(picture("RGB").quantize(16), "PNG"),
        "16 bit": encoded(wide, "PNG"),
        "cmyk": encoded(picture("RGB").convert("CMYK"), "JPEG", quality=95),
        "turned": encoded(picture("RGB"), "JPEG", quality=95, exif=turned),
        "reduced": encoded(large, "JPEG", quality=95),
    }


def pixels() -> dict[str, np.ndarray]:
    """Every file at 4 × 4 pixels, and one file in every way of resizing."""
    half = (0.5, 0.5, 0.5)
    ways = {name: Preprocessing((4, 4), 5, name, half, half) for name in ("bilinear", "bicubic", "lanczos", "nearest")}
    ways["squeezed"] = Preprocessing((4, 4), (4, 4), "bilinear", half, half)
    found = {name: prepare(data, ways["bilinear"]) for name, data in files().items()}
    return found | {way: prepare(files()["colours"], preprocessing) for way, preprocessing in ways.items()}


def test_decoding_and_resizing_give_their_golden_pixels() -> None:
    found = pixels()
    assert found.keys() == PIXELS.keys()
    for name, image in found.items():
        golden = np.frombuffer(bytes.fromhex(PIXELS[name]), np.uint8).reshape(4, 4, 3)
        gap = np.abs(image.astype(int) - golden).max()
        assert gap <= 1, f"{name} is off by {gap}: {RAISE.format('DECODE_POLICY')}"
