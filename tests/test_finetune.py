from __future__ import annotations

import copy
import errno
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from features_cache import CacheError, atomic
from pipeline import invalidation
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.thaw_line import find_line, possible_lines, split
from pipeline.errors import BackboneError, FitError
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.finetuning import checkpoint, data, loop, run
from pipeline.finetuning.groups import parameter_groups
from pipeline.finetuning.inputs import DecodedImages, Subset, batch_count
from pipeline.finetuning.loop import Trained, train
from pipeline.finetuning.network import ThawedNetwork
from pipeline.finetuning.objective import Classification, class_weights
from pipeline.finetuning.recipe import Recipe, make_recipe
from pipeline.fit import fit
from pipeline.images.resize import prepare
from pipeline.images.sources.registry import open_source
from pipeline.spec import View

NET, TINY = "resnet18@random:0", "test_resnet@random:0"
OPTIONS: dict[str, Any] = {"size": 32, "engine": "torch", "device": "cpu", "precision": "fp32", "batch_size": 8}
Photos = Callable[..., Path]


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_backbone(NET, 32)


def tune(photos: Path, output: Path, **options: Any) -> Any:
    return finetune(photos, TINY, output=output, **{"freeze": "layer3", "epochs": 2, **OPTIONS, **options})


def losses(report: Any, place: int = 0) -> list[float]:
    return [epoch["train_loss"] for epoch in report.results[place].history]


def train_on_pixels(
    photos: Path, backbone: Any, freeze: str, path: Path, recipe: Recipe
) -> tuple[ThawedNetwork, Trained]:
    source = open_source(photos)
    rows = np.arange(len(source.items))
    labels = np.array([item.label for item in source.items])
    subset = Subset(DecodedImages(source, backbone.preprocessing, "none"), rows, labels, recipe.batch_size, 0)
    network = ThawedNetwork(backbone, freeze, "linear", 3)
    silent = lambda *call: None  # noqa: E731
    return network, train(network, recipe, 1e-3, subset, None, Classification(), path, 0, "cpu", silent, "test")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (NET, "layer2"),
        (NET, "layer4"),
        ("efficientnet_lite0@random:0", "blocks.4"),
        ("googlenet@random:0", "inception4b"),
        ("test_vit@random:0", "blocks.3"),
    ],
)
def test_trunk_and_top_are_bit_equal_to_the_whole(name: str, line: str) -> None:
    loaded = load_backbone(name, 64)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    trunk, body = split(loaded, find_line(loaded, line))
    assert trunk is not None
    classify = loaded.module.get_submodule(loaded.classifiers[0])
    with torch.inference_mode():
        features = body(trunk(x))
        assert torch.equal(classify(features.flatten(1)), loaded.module(x))


def test_only_layers_that_every_path_crosses_can_be_the_line(backbone: Any) -> None:
    known = possible_lines(backbone)
    assert {"layer1", "layer2", "layer3", "layer4"} <= set(known)
    assert "layer2.0.conv1" not in known
    with pytest.raises(BackboneError, match=r"some paths bypass it.*layer1"):
        find_line(backbone, "layer2.0.conv1")
    with pytest.raises(BackboneError, match="did you mean layer3"):
        find_line(backbone, "layr3")


def test_what_is_frozen_stays_bit_identical_and_the_rest_learns(
    make_photos: Photos, backbone: Any, tmp_path: Path
) -> None:
    whole = copy.deepcopy(backbone.module.state_dict())
    network, _ = train_on_pixels(make_photos(), backbone, "layer3", tmp_path / "run.pt", Recipe(epochs=2, batch_size=8))
    assert all(torch.equal(item, whole[name]) for name, item in backbone.module.state_dict().items())
    assert network.trunk is not None
    assert all(torch.equal(item, whole[name]) for name, item in network.trunk.state_dict().items())
    learnt = dict(network.body.state_dict())
    assert all(name.startswith("layer4") for name in learnt)
    assert not any(torch.equal(item, whole[name]) for name, item in learnt.items())


def test_the_trunk_stays_frozen_whatever_is_called(backbone: Any) -> None:
    network = ThawedNetwork(backbone, "layer2", "linear", 2).train()
    assert network.trunk is not None
    assert not any(part.training for part in network.trunk.modules())
    assert all(part.training for part in network.body.modules())
    network(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).sum().backward()
    assert all(item.grad is None for item in network.trunk.parameters())


def test_cached_activations_train_like_the_whole_network(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos()
    report = tune(photos, tmp_path / "cached", seeds=[3], epochs=1)
    reader = DecodedImages(open_source(photos), load_backbone(TINY, 32).preprocessing, "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CachedActivations", lambda *_: reader)
        whole = tune(photos, tmp_path / "whole", seeds=[3], epochs=1)
    assert losses(whole) == pytest.approx(losses(report), rel=1e-4)
    assert whole.results[0].history[0]["valid_loss"] == pytest.approx(
        report.results[0].history[0]["valid_loss"], rel=1e-3
    )


def test_splits_are_those_of_fit_and_seeds_reproduce(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos()
    runs = [tune(photos, tmp_path / name, seeds=[0, 1], shots=[2, "all"], freeze="all") for name in ("a", "b")]
    extract(photos, [TINY], output=tmp_path / "fit", size=32, engine="torch", device="cpu", precision="fp32")
    rival = fit(tmp_path / "fit", seeds=[0, 1], shots=[2, "all"], jobs=1)
    for found, expected in zip(runs[0].predictions, rival.predictions, strict=True):
        np.testing.assert_array_equal(found.uris, expected.uris)
        np.testing.assert_array_equal(found.y_true, expected.y_true)
    counts = [(r.seed, r.shots, r.n_train, r.n_val, r.n_test) for r in runs[0].results]
    assert counts == [(r.seed, r.shots, r.n_train, r.n_val, r.n_test) for r in rival.results]
    for one, other in zip(runs[0].predictions, runs[1].predictions, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert losses(runs[0]) != losses(runs[0], 2)
    validated = [result.validation_accuracy for result in runs[0].results]
    assert validated[::2] == [None, None]
    ranks = {index: (validated[index], -runs[0].results[index].validation_log_loss) for index in (1, 3)}
    assert runs[0].best == max(ranks, key=ranks.__getitem__), "most shots, then validation"
    best = runs[0].results[1]
    assert validated[1] == best.history[best.params["best_epoch"] - 1]["valid_acc"]


@pytest.mark.parametrize("change", [{"size": 48}, {"store": "float16"}])
def test_a_finished_run_is_not_taken_for_another(make_photos: Photos, tmp_path: Path, change: dict[str, Any]) -> None:
    photos = make_photos()
    first = tune(photos, tmp_path / "shared", freeze="layer4", epochs=1)
    found = tune(photos, tmp_path / "shared", freeze="layer4", epochs=1, **change)
    alone = tune(photos, tmp_path / "alone", freeze="layer4", epochs=1, **change)
    assert losses(found) == losses(alone) != losses(first)


def test_weights_drawn_here_are_not_taken_for_the_same_that_are_named(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos()
    how: dict[str, Any] = {"freeze": "none", "epochs": 1, "warmup": 0, "lr": 1e-3, **OPTIONS}
    drawn = finetune(photos, "test_resnet", init="random", output=tmp_path / "shared", **how)
    named = finetune(photos, TINY, output=tmp_path / "shared", **how)
    alone = finetune(photos, TINY, output=tmp_path / "alone", **how)
    assert losses(named) == losses(alone) != losses(drawn), "they are standardised in another way"


@pytest.mark.parametrize("library", ["torch", "torchvision", "timm"])
def test_a_finished_run_is_trained_anew_with_other_libraries(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    photos, epochs = make_photos(), []

    def trained() -> bool:
        epochs.clear()
        tune(photos, tmp_path, freeze="all", epochs=1, progress=lambda *call: epochs.append(call[-1]))
        return any("epoch 1/1" in state and "train loss" not in state for state in epochs)

    assert trained()
    assert not trained()
    known = invalidation.installed_version
    monkeypatch.setattr(invalidation, "_code", invalidation._code.__wrapped__)
    monkeypatch.setattr(invalidation, "installed_version", lambda name: "0" if name == library else known(name))
    assert trained()


@pytest.mark.parametrize("how", [{"label_smoothing": 0.3}, {"class_weights": True}])
def test_the_log_loss_on_validation_is_that_of_probabilities_not_of_training(
    make_photos: Photos, tmp_path: Path, how: dict[str, Any]
) -> None:
    photos = make_photos()
    (photos / "red" / "7.png").unlink()
    (photos / "red" / "6.png").unlink()
    rows = ["path,label,split"]
    for path in sorted(photos.rglob("*.png")):
        name, own = f"{path.relative_to(tmp_path)}", int(path.stem)
        rows.append(f"{name},{path.parent.name},{'train' if own < 4 else 'val'}")
        if own >= 4:  # so that what is said of test is what is said of validation
            shutil.copy(path, twin := path.with_name(f"twin{own}.png"))
            rows.append(f"{twin.relative_to(tmp_path)},{path.parent.name},test")
    (tmp_path / "given.csv").write_text("\n".join(rows) + "\n")
    report = tune(tmp_path / "given.csv", tmp_path / "cache", freeze="all", lr=0.01, **how)
    result, said = report.results[0], report.predictions[0]
    losses_of = -np.log(said.probabilities[np.arange(10), said.y_true])
    expected = np.mean([losses_of[said.y_true == label].mean() for label in range(3)])
    assert (result.n_val, result.n_test) == (10, 10)
    assert result.log_loss == pytest.approx(losses_of.mean())
    assert result.validation_log_loss == pytest.approx(
        expected if "class_weights" in how else result.log_loss, abs=1e-5
    )
    assert result.validation_log_loss != pytest.approx(result.history[result.params["best_epoch"] - 1]["valid_loss"])


def test_groups_of_test_images_are_told_and_counted_as_by_fit(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos(each=8)
    paths = sorted(photos.rglob("*.png"))
    rows = [f"{path.relative_to(photos.parent)},{path.parent.name},{number // 2}" for number, path in enumerate(paths)]
    (photos.parent / "grouped.csv").write_text("\n".join(["path,label,group", *rows]) + "\n")
    report = tune(photos.parent / "grouped.csv", tmp_path / "cache", freeze="all", epochs=1)
    fitted = fit(tmp_path / "cache" / "finetune", ["penultimate"], jobs=1)
    (note,) = [note for note in report.notes if "groups" in note]
    assert note in fitted.notes
    (tuned,), (frozen,) = report.results, fitted.results
    assert tuned.n_groups is not None
    assert tuned.n_groups == frozen.n_groups < tuned.n_test
    assert f"{tuned.n_test} test rows come from {tuned.n_groups} groups" in note


def test_a_class_that_only_tests_makes_another_run(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos()
    for name in ("red", "green", "blue"):
        for side, numbers in (("train", range(6)), ("test", range(6, 8))):
            (tmp_path / "given" / side / name).mkdir(parents=True, exist_ok=True)
            for number in numbers:
                (photos / name / f"{number}.png").rename(tmp_path / "given" / side / name / f"{number}.png")
    tune(tmp_path / "given", tmp_path / "cache", freeze="layer4", epochs=1)
    (tmp_path / "given" / "test" / "white").mkdir()
    Image.new("RGB", (40, 40), "white").save(tmp_path / "given" / "test" / "white" / "0.png")
    report = tune(tmp_path / "given", tmp_path / "cache", freeze="layer4", epochs=1)
    assert report.results[0].n_test == 7


def test_early_stopping_keeps_the_weights_of_the_best_epoch(make_photos: Photos, tmp_path: Path) -> None:
    report = tune(make_photos(), tmp_path, epochs=12, patience=2, lr=0.02, warmup=0)
    result = report.results[0]
    valid = [epoch["valid_loss"] for epoch in result.history]
    best = int(np.argmin(valid)) + 1
    assert result.params["best_epoch"] == best
    assert result.epochs == len(valid) == min(best + 2, 12)
    state = checkpoint.read_checkpoint(next((tmp_path / "finetune").glob("*.pt")))
    assert state is not None
    assert (state["finished"], state["best_epoch"]) == (True, best)


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    photos = make_photos()
    options = {"epochs": 4, "optimizer": "sgd", "schedule": "plateau"}
    expected = tune(photos, tmp_path / "whole", **options)

    def stop(done: int, total: int, text: str, state: str = "") -> None:
        if "epoch 3" in state:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(photos, tmp_path / "cut", progress=stop, **options)
    epochs: list[str] = []
    found = tune(photos, tmp_path / "cut", progress=lambda *call: epochs.append(call[-1]), **options)
    assert not any("epoch 2/" in state for state in epochs)
    assert losses(found) == losses(expected)
    np.testing.assert_array_equal(found.predictions[0].probabilities, expected.predictions[0].probabilities)


def test_a_run_killed_at_its_early_stop_trains_no_epoch_more(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    photos, options = make_photos(), {"epochs": 12, "patience": 1, "lr": 0.02, "warmup": 0}
    expected = tune(photos, tmp_path / "whole", **options)
    assert expected.results[0].epochs < 12

    def killed(path: Path, state: dict[str, Any]) -> None:
        if state["finished"]:
            raise KeyboardInterrupt
        checkpoint.write_checkpoint(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(photos, tmp_path / "cut", **options)
    assert losses(tune(photos, tmp_path / "cut", **options)) == losses(expected)


def test_a_run_that_is_over_leaves_no_memory_taken_to_the_next(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: weakref.WeakSet[ThawedNetwork] = weakref.WeakSet()
    optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def counting(make: Callable[..., Any], instances: weakref.WeakSet[Any]) -> Callable[..., Any]:
        def made(*given: Any) -> Any:
            instances.add(one := make(*given))
            return one

        return made

    counted = {(run, "ThawedNetwork"): networks, (loop, "make_optimizer"): optimizers}
    for (module, name), instances in counted.items():
        monkeypatch.setattr(module, name, counting(getattr(module, name), instances))
    alive: list[tuple[int, int]] = []
    tune(
        make_photos(),
        tmp_path,
        seeds=[0, 1],
        epochs=1,
        progress=lambda *_: alive.append((len(networks), len(optimizers))),
    )
    assert max(alive) == (1, 1)


def test_float32_convolutions_are_not_rounded_while_a_network_trains(make_photos: Photos, tmp_path: Path) -> None:
    convolutions = torch.backends.cudnn.conv
    before, during = convolutions.fp32_precision, []
    tune(make_photos(), tmp_path, epochs=1, progress=lambda *_: during.append(convolutions.fp32_precision))
    assert "ieee" in during
    assert convolutions.fp32_precision == before


def test_a_full_disk_costs_the_checkpoint_alone(
    make_photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos()
    tune(photos, tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    report = tune(photos, tmp_path, seeds=[5])
    assert any("without a checkpoint" in note and "disk is full" in note for note in report.notes)
    assert report.results[0].epochs == 2


def test_a_checkpoint_that_cannot_take_its_place_is_no_reason_to_stop_either(tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(CacheError, match="cannot write the checkpoint"):
        checkpoint.write_checkpoint(tmp_path / "a.pt", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ({"lr": 1e30, "batch_size": 2}, r"step \d+ of epoch 1, first in \w+.*lower learning rate"),
        ({"lr": 1e38, "batch_size": 32, "epochs": 1}, r"validation loss became nan in epoch 1.*lower learning rate"),
    ],
)
def test_a_loss_that_is_no_number_is_an_error(make_photos: Photos, tmp_path: Path, how: Any, parts: str) -> None:
    photos = make_photos()
    for _ in range(2):  # what failed is not taken for finished
        with pytest.raises(FitError, match=parts):
            tune(photos, tmp_path, optimizer="sgd", warmup=0, **how)


@pytest.mark.parametrize(("below", "above"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_each_side_of_the_line_has_its_own_precision(backbone: Any, below: str, above: str) -> None:
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = ThawedNetwork(backbone, "layer2", "linear", 3)
    with torch.inference_mode():
        exact, _ = network.features(pixels)
        network.trunk_precision, network.precision = below, above
        found, _ = network.features(pixels)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert torch.cosine_similarity(found, exact).min() > 0.99


@pytest.mark.parametrize("top", ["hidden", "direct"])
def test_other_tops_learn_colours(make_photos: Photos, tmp_path: Path, top: str) -> None:
    report = tune(make_photos(each=12), tmp_path, freeze="all", top=top, epochs=15, patience=15, lr=0.01)
    assert report.results[0].accuracy > 0.8


def test_the_seed_draws_a_hidden_layer_too(make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos()
    reports = [tune(photos, tmp_path / name, freeze="all", top="hidden", epochs=1, seeds=[3]) for name in ("a", "b")]
    assert losses(reports[0]) == losses(reports[1])
    np.testing.assert_array_equal(*(report.predictions[0].probabilities for report in reports))


def test_head_first_and_augmentation_run_together(make_photos: Photos, tmp_path: Path) -> None:
    report = tune(make_photos(), tmp_path, head_first=True, augment="crop+flip+colour", freeze="layer4", epochs=1)
    assert len(report.results[0].history) == 1
    assert len(list((tmp_path / "finetune").glob("*.pt"))) == 2


def test_a_view_is_a_function_of_its_number_and_the_image(make_photos: Photos, backbone: Any) -> None:
    data = (make_photos() / "red" / "0.png").read_bytes()
    views = [prepare(data, View(**vars(backbone.preprocessing), augment="crop+flip", view=view)) for view in (0, 0, 1)]
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0] != views[2]).any()
    assert views[0].shape == (32, 32, 3)


def test_rates_fall_by_depth_and_can_be_given_by_layer(backbone: Any) -> None:
    network = ThawedNetwork(backbone, "layer2", "linear", 3)
    groups = parameter_groups(network, 1.0, 0.5, [("layer3.0", 0.1)], 0.01)
    rates = {id(item): group["lr"] for group in groups for item in group["params"]}
    found = {name: rates[id(item)] for name, item in network.named_parameters() if id(item) in rates}
    assert found["new_head.layers.weight"] == 1.0
    assert found["body.layer4.1.conv1.weight"] == 0.5
    assert found["body.layer4.0.conv1.weight"] == 0.25
    assert found["body.layer3.1.bn1.bias"] == 0.125
    assert found["body.layer3.0.conv1.weight"] == pytest.approx(0.1)
    assert all(group["weight_decay"] == 0 for group in groups for item in group["params"] if item.ndim == 1)
    with pytest.raises(FitError, match="no thawed layer 'layer1'"):
        parameter_groups(network, 1.0, 1.0, [("layer1", 0.1)], 0.0)


@given(rows=st.integers(2, 500), size=st.integers(1, 64))
def test_batches_are_even_and_never_one_row_unless_asked(rows: int, size: int) -> None:
    parts = [len(part) for part in np.array_split(np.arange(rows), batch_count(rows, size))]
    assert max(parts) - min(parts) <= 1
    assert max(parts) <= max(size, 3)
    assert min(parts) > 1 or size == 1


def test_an_augmentation_is_the_same_in_any_order() -> None:
    assert make_recipe({"augment": "colour+flip+crop"}) == make_recipe({"augment": "crop+flip+colour"})


def test_class_weights_have_mean_one_over_the_images() -> None:
    counts = np.array([10, 30, 0])
    weights = class_weights(counts).numpy()
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(3 * weights[1])
    assert weights[2] == 0


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ({"lr": -1.0}, "lr: expected a number above 0, got -1.0"),
        ({"optimizer": "adma"}, "optimizer: expected one of adamw, sgd, got 'adma'; did you mean adam"),
        ({"augment": "crop+flop"}, "unknown augmentation 'flop'; did you mean flip"),
        ({"layer_decay": 1.5}, "layer_decay: expected a number above 0, at most 1, got 1.5"),
        ({"epochs": 0}, "epochs: expected a whole number, at least 1, got 0"),
        ({"pateince": 3}, "no option 'pateince'; did you mean patience"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(option: dict[str, Any], parts: str) -> None:
    with pytest.raises(FitError, match=parts):
        make_recipe(option)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--freeze", "layer9"), ("layer9", "layer4")),
        (("--freeze", "layer2.0.conv1"), ("some paths bypass it", "layer2")),
        (("--freeze", "layer3", "--batch-size", "1"), ("batches of one", "batch size of 2")),
        (("--init", "random"), ("init random", "without weights")),
        (("--head-first",), ("head-first",)),
        (("--picture", "nowhere/curves.png"), ("nowhere",)),
        (("--save", "nowhere/model.safetensors"), ("nowhere",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_one_line(
    thawline: Callable[..., Any], make_photos: Photos, tmp_path: Path, arguments: Any, parts: Any
) -> None:
    base = ("finetune", make_photos(), "-b", TINY, "--size", 32, "--engine", "torch", "--store", "float16")
    finished = thawline(*base, "-o", tmp_path / "cache", "--epochs", 1, *arguments, cwd=tmp_path)
    assert finished.returncode == 1, finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("thawline: ")
    assert all(part in last for part in parts)
    assert all(line.startswith("note: ") for line in finished.stderr.splitlines()[:-1])


def test_one_class_is_refused(thawline: Callable[..., Any], make_photos: Photos, tmp_path: Path) -> None:
    photos = make_photos(classes=("red",))
    base = ("finetune", photos, "-b", TINY, "--size", 32, "--engine", "torch", "-o", tmp_path / "cache")
    thawline(*base).assert_one_line("at least two classes")


def test_the_command_saves_a_model_that_predict_takes(
    thawline: Callable[..., Any], make_photos: Photos, tmp_path: Path
) -> None:
    photos, model = make_photos(each=12), tmp_path / "model.safetensors"
    (photos / "red" / "broken.png").write_bytes(b"no image")
    base = ("finetune", photos, "-b", TINY, "--size", 32, "--engine", "torch", "--precision", "fp32")
    how = ("--freeze", "layer4", "--epochs", 15, "--patience", 15, "--lr", 0.01)
    output = thawline(*base, *how, "-o", tmp_path / "cache", "--save", model, "--json")
    document = output.json
    assert "activations at layer4 of 37 images take" in output.stderr
    assert (document["saved"], document["best"]) == (str(model), 0)
    result = document["results"][0]
    assert result["kind"] == "finetune"
    assert result["freeze"] == "layer4"
    assert result["trainable_parameters"] == 96 * 3 + 3
    assert [epoch["epoch"] for epoch in result["history"]] == list(range(1, result["epochs"] + 1))
    assert any("1 unreadable" in note for note in document["notes"])
    picture = tmp_path / "curves.png"
    table = thawline(*base, *how, "-o", tmp_path / "cache", "--picture", picture, "--save", model)
    assert "layer4" in table.stdout
    assert f"model: {model} (seed 0, shots all, validation accuracy" in table.stdout
    assert "activations at" not in table.stderr, "they take no more space"
    with Image.open(picture) as drawn:
        assert drawn.size == (600, 432)
    assert model.stat().st_mode == picture.stat().st_mode
    predictions = thawline("predict", model, photos, "--json").json["predictions"]
    said = {found["uri"]: found for found in predictions}
    assert said["red/broken.png"]["state"] == "unreadable"
    right = [found["label"] == uri.split("/")[0] for uri, found in said.items() if uri != "red/broken.png"]
    assert np.mean(right) > 0.8
    damaged = bytearray(model.read_bytes())
    damaged[-5] ^= 1
    model.write_bytes(damaged)
    thawline("predict", model, photos).assert_one_line("digests differ")
