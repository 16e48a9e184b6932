from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.backbones.registry import load_backbone
from pipeline.errors import FitError
from pipeline.finetune import finetune
from pipeline.finetuning import loop
from pipeline.finetuning.checkpoint import read_checkpoint
from pipeline.finetuning.groups import depth_groups
from pipeline.finetuning.inputs import Subset
from pipeline.finetuning.loop import take_step
from pipeline.finetuning.network import ThawedNetwork
from pipeline.finetuning.watch import GradientWatch, judge
from pipeline.results import to_json

NET = "timm/test_resnet@random:0"
OPTIONS: dict[str, Any] = {"size": 32, "engine": "torch", "device": "cpu", "precision": "fp32", "batch_size": 8}
WIDTH, CLASSES = 16, 3
Photos = Callable[..., Path]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Toy(nn.Module):
    def __init__(self, depth: int, act: type[nn.Module], gain: float, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(depth)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=gain / WIDTH**0.5)
        self.body = nn.Sequential(*(part for layer in layers for part in (layer, act())))
        self.new_head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.new_head(self.body(x))


class Rows:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def read(self, rows: np.ndarray, view: int | None) -> tuple[Tensor]:
        return (self.x[torch.from_numpy(rows)],)


def subset() -> Subset:
    x = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1))
    labels = np.arange(60) % CLASSES
    x[:, :CLASSES] += 2 * torch.eye(CLASSES)[torch.from_numpy(labels)]
    return Subset(Rows(x), np.arange(60), labels, 20, 0)


def watched(toy: Toy, lr: float, epochs: int = 3, clip: float = 1e9, decay: float = 0.0) -> list[dict[str, Any]]:
    optimizer = torch.optim.SGD(toy.parameters(), lr, weight_decay=decay)
    watch, rows = GradientWatch(toy), subset()
    history = []
    for epoch in range(epochs):
        for inputs, labels in rows.batches(epoch):
            take_step(toy, inputs, labels, nn.CrossEntropyLoss(), optimizer, clip, watch)
        history.append({"gradients": watch.end_epoch()})
    return history


def test_the_record_is_what_a_plain_loop_measures() -> None:
    toy, clip, lr = Toy(2, nn.ReLU, 1.4), 0.05, 1e-2
    with torch.no_grad():
        toy.body[2].bias[:5] = -100.0
    plain = copy.deepcopy(toy)
    history = watched(toy, lr, epochs=2, clip=clip, decay=0.1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=lr, weight_decay=0.1)
    layers = {"0": plain.body[0], "2": plain.body[2], "new_head": plain.new_head}

    def norm(tensors: Iterator[Tensor] | list[Tensor]) -> float:
        return float(np.sqrt(sum(float((item.detach().double() ** 2).sum()) for item in tensors)))

    rows = subset()
    for number, epoch in enumerate(history):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
        active = {"0": torch.zeros(WIDTH, dtype=torch.bool), "2": torch.zeros(WIDTH, dtype=torch.bool)}
        for (x,), y in rows.batches(number):
            before = copy.deepcopy(layers)
            optimizer.zero_grad()
            hidden = plain.body[:2](x)
            active["0"] |= (hidden > 0).any(0)
            active["2"] |= (plain.body[2:](hidden) > 0).any(0)
            nn.functional.cross_entropy(plain(x), y).backward()
            gradients = {name: norm([item.grad for item in layer.parameters()]) for name, layer in layers.items()}
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
            optimizer.step()
            for name, layer in layers.items():
                pairs = zip(layer.parameters(), before[name].parameters(), strict=True)
                found[name].append((gradients[name], norm([new - old for new, old in pairs])))
        assert list(epoch["gradients"]) == list(layers)
        for name, numbers in epoch["gradients"].items():
            gradient, update = np.mean(found[name], axis=0)
            assert numbers["gradient"] == pytest.approx(gradient, rel=1e-5)
            assert numbers["update"] == pytest.approx(update, rel=1e-3)
            assert numbers["weight"] == pytest.approx(norm(layers[name].parameters()), rel=1e-6)
        for name, alive in active.items():
            assert epoch["gradients"][name]["dead"] == pytest.approx(1 - alive.float().mean().item())
    assert history[0]["gradients"]["2"]["dead"] >= 5 / WIDTH


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("act", "gain"), [(nn.ReLU, 2**0.5), (nn.Tanh, 1.0)])
def test_a_healthy_network_gives_no_warning(act: type[nn.Module], gain: float, seed: int) -> None:
    assert judge(watched(Toy(9, act, gain, seed), 0.02)) == []


def test_a_stack_of_sigmoids_vanishes() -> None:
    warning = judge(watched(Toy(9, nn.Sigmoid, 1.0), 0.02))[0]
    assert warning.startswith("gradients vanish on their way down from 16 to 0: ")


def test_a_stack_of_large_weights_explodes_on_the_way_down() -> None:
    warning = judge(watched(Toy(9, Sine, 8.0), 1e-9))[0]
    assert warning.startswith("gradients explode on their way down from 16 to 0: ")


def test_dead_units_are_named_where_they_are() -> None:
    toy = Toy(3, nn.ReLU, 1.4)
    with torch.no_grad():
        toy.body[2].bias[:12] = -100.0
    (warning,) = judge(watched(toy, 0.02))
    assert "75% of the units of 2;" in warning
    with torch.no_grad():
        toy.body[4].bias[:] = -100.0
    assert any("100% of the units of 4 (" in warning for warning in judge(watched(toy, 0.02))), "not what dies with it"


def test_steps_that_float32_rounds_away_are_told() -> None:
    (warning,) = judge(watched(Toy(3, nn.ReLU, 1.4), 1e-12))
    assert warning.startswith("4 of 4 layers stand still, such as 0: ")


def epochs(*gradients: float, update: float = 1e-3, dead: float = 0.0) -> list[dict[str, Any]]:
    names = ("conv1", "conv2", "conv3", "new_head")
    numbers = {"weight": 1.0, "update": update, "dead": dead}
    return [{"gradients": {name: {"gradient": value, **numbers} for name in names}} for value in gradients]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (epochs(1, 9, 99), None),
        (epochs(1, 1e-3, 1e-6), None),
        (epochs(1, 1e-6, 1), None),
        (epochs(1, 10, 101, 1), "gradients explode: in epoch 3 their norm is 202, 101 times that of the first"),
        (epochs(1, float("nan")), "gradients explode: in epoch 2 their norm is nan"),
        (epochs(1, float("inf")), "gradients explode: in epoch 2 their norm is inf"),
        (epochs(1, 1, update=0.29), None),
        (epochs(1, 1, update=0.31), "steps are too long: each changes the weights of the median layer by 31% of"),
        (epochs(1, 1, update=9e-8), "4 of 4 layers stand still"),
        (epochs(1, 1, dead=0.49), None),
        (epochs(1, 1, dead=0.5), "units die: no training image of the last epoch gave a gradient to 50%"),
        (epochs(1, 0, dead=1.0), None),
        (epochs(1, update=9), None),
    ],
)
def test_verdicts_at_their_thresholds(history: list[dict[str, Any]], expected: str | None) -> None:
    found = judge(history)
    assert len(found) == (expected is not None)
    assert not expected or found[0].startswith(expected)


def tune(photos: Path, output: Path, **options: Any) -> Any:
    return finetune(photos, NET, output=output, **{"freeze": "none", "epochs": 2, **OPTIONS, **options})


def best(output: Path) -> dict[str, Tensor]:
    (path,) = (output / "finetune").glob("*.pt")
    state = read_checkpoint(path)
    assert state is not None
    return state["best"]


def test_watching_changes_nothing_and_a_killed_run_has_the_whole_record(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(each=5)
    plain, seen = tune(photos, tmp_path / "plain"), tune(photos, tmp_path / "seen", watch="gradients")
    expected = best(tmp_path / "plain")
    assert all(torch.equal(item, expected[name]) for name, item in best(tmp_path / "seen").items())
    np.testing.assert_array_equal(plain.predictions[0].probabilities, seen.predictions[0].probabilities)
    assert not any("gradients" in epoch for epoch in plain.results[0].history)
    json.dumps(to_json(seen.results[0]), allow_nan=False)

    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)

    def stop(done: int, total: int, text: str, state: str = "") -> None:
        if "epoch 2" in state:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(photos, tmp_path / "cut", watch="gradients", progress=stop)
    found = tune(photos, tmp_path / "cut", watch="gradients")
    records = [[epoch["gradients"] for epoch in report.results[0].history] for report in (seen, found)]
    assert records[0] == records[1]
    assert len(records[0]) == 2


def test_without_validation_images_every_epoch_counts(make_photos: Photos, tmp_path: Path) -> None:
    make_photos(each=2, name="photos/train")
    make_photos(each=3, name="photos/test")
    report = tune(tmp_path / "photos", tmp_path / "cache", patience=1, freeze="all", lr=1.0)
    result = report.results[0]
    assert (result.n_val, result.epochs, result.params["best_epoch"]) == (0, 2, 2)
    assert not any("valid_loss" in epoch for epoch in result.history)
    assert any("without validation images training goes through all epochs" in note for note in report.notes)


def test_the_command_records_judges_and_draws(
    thawline: Callable[..., Any], make_photos: Photos, tmp_path: Path
) -> None:
    base = (
        "finetune",
        make_photos(each=5),
        "-b",
        NET,
        "--size",
        32,
        "--engine",
        "torch",
        "--freeze",
        "none",
        "--lr",
        1e-12,
    )
    picture = tmp_path / "curves.png"
    how = ("-o", tmp_path / "cache", "--epochs", 2, "--seed", 0, "--seed", 1)
    document = thawline(*base, *how, "--watch", "gradients", "--picture", picture, "--json").json
    layer = document["results"][0]["history"][1]["gradients"]["conv1.0"]
    assert layer["gradient"] > 0
    assert layer["dead"] is None
    assert sum("stand still, such as" in note for note in document["notes"]) == 2
    with Image.open(tmp_path / "curves-gradients.png") as drawn:
        assert drawn.width == 1440
        assert len(drawn.convert("L").getcolors()) > 100


def test_depth_is_the_order_of_computation() -> None:
    network = ThawedNetwork(load_backbone("efficientnet_lite0@random:0", 64), "blocks.5", "linear", CLASSES)
    assert list(depth_groups(network)) == ["blocks.6", "conv_head", "new_head"]


def test_only_gradients_can_be_watched(make_photos: Photos, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="watch: expected one of gradients, got 'gradient'; did you mean gradients"):
        tune(make_photos(), tmp_path, watch="gradient")
