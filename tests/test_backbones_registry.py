from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from timm.data import create_transform, resolve_data_config
from timm.models import create_model, get_pretrained_cfg
from torchvision.transforms import CenterCrop, Resize

from features_cache import open_cache
from pipeline.backbones import zoo_embedded as embedded
from pipeline.backbones import zoo_torchvision as torchvision_zoo
from pipeline.backbones.known import Known, recall
from pipeline.backbones.registry import check_weights, list_backbones, load_backbone, sketch
from pipeline.backbones.taps import tap
from pipeline.backbones.weights import weights_digest
from pipeline.errors import BackboneError
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.pretrain import pretrain
from pipeline.results import ExtractResult
from pipeline.spec import json_fields
from pipeline.user_folder import user_folder

TINY = "timm/test_resnet"  # 0.5 million parameters


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and empty local caches of weights in the returned folder: ``checkpoints`` and ``hub``."""

    def refuse(*_args: object, **_options: object) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


# Names


@pytest.mark.parametrize(
    ("asked", "name", "handle", "weights"),
    [
        ("resnet18@random:0", "torchvision/resnet18", "resnet18@random:0", "random:0"),
        ("torchvision/resnet18@random:12", "torchvision/resnet18", "resnet18@random:12", "random:12"),
        ("timm/resnet18@random:0", "timm/resnet18", "timm/resnet18@random:0", "random:0"),
        ("test_resnet@random:0", "timm/test_resnet", "test_resnet@random:0", "random:0"),
        ("efficientnet_lite0", "embedded/efficientnet_lite0", "efficientnet_lite0", "imagenet"),
        ("embedded/efficientnet_lite0@imagenet", "embedded/efficientnet_lite0", "efficientnet_lite0", "imagenet"),
        ("timm/efficientnet_lite0@random:0", "timm/efficientnet_lite0", "timm/efficientnet_lite0@random:0", "random:0"),
    ],
)
def test_names_are_looked_for_in_the_order_of_the_zoos(asked: str, name: str, handle: str, weights: str) -> None:
    backbone = load_backbone(asked)
    assert (backbone.name, backbone.handle, backbone.weights) == (name, handle, weights)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("resnet", r"unknown backbone 'resnet'; did you mean resnet\d+"),
        ("timm/vgg20", r"unknown backbone 'timm/vgg20'; did you mean vgg\d\d"),
        ("torchvision/inception_v4", "unknown backbone 'torchvision/inception_v4'"),
        ("hub/resnet18", "unknown zoo 'hub' in 'hub/resnet18': expected one of embedded, torchvision, timm, lecture"),
        ("resnet18@IMAGENET", r"unknown weights 'IMAGENET' for resnet18; did you mean IMAGENET1K_V1\?"),
        ("test_resnet@r161_in1k", r"unknown weights 'r161_in1k' for test_resnet; did you mean r160_in1k\?"),
        ("resnet18@random", "random weights need a seed of at most nine digits, such as random:0, not 'random'"),
        ("resnet18@random:-1", "not 'random:-1'"),
        ("resnet18@nowhere.pth", "no weights file nowhere.pth"),
        (
            "botnet50ts_256",
            "there are no pretrained weights for botnet50ts_256; use botnet50ts_256@FILE.safetensors or",
        ),
        ("deepseek_vit_412m@random:0", "wants the crop mode 'border', but only 'center' and 'squash'"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(asked: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(asked)
    assert "\n" not in str(caught.value)


def test_the_list_tells_which_weights_are_here(offline: Path) -> None:
    (offline / "checkpoints").mkdir()
    (offline / "checkpoints" / "resnet50-11ad3fa6.pth").touch()
    rows = {row.name: row for row in list_backbones("resnet50")}
    assert rows["resnet50"].weights == ("IMAGENET1K_V2", "IMAGENET1K_V1")
    assert rows["resnet50"].local == ("IMAGENET1K_V2",)
    assert rows["timm/resnet50"].weights[0] == get_pretrained_cfg("resnet50").tag
    assert rows["timm/resnet50"].local == ("tv2_in1k",), "the same file under timm's name"
    assert "wide_resnet50_2" in rows, "a bare pattern is a part of a name"
    assert {row.name for row in list_backbones("vgg1?")} == {
        *(f"vgg{depth}" for depth in (11, 13, 16, 19)),
        *(f"timm/vgg{depth}" for depth in (11, 13, 16, 19)),
    }
    assert [row.name for row in list_backbones("embedded/*")] == [f"efficientnet_lite{number}" for number in range(3)]
    assert {row.zoo for row in list_backbones()} == {"embedded", "torchvision", "timm", "lecture"}
    with pytest.raises(BackboneError, match="no backbone matches 'resnext500'; did you mean"):
        list_backbones("resnext500")


# Seeds and state


def test_random_weights_are_reproducible_and_leave_the_callers_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    digests = [load_backbone(f"{TINY}@random:{seed}").weights_digest for seed in (0, 1, 0)]
    load_backbone("efficientnet_lite0")
    assert torch.equal(torch.rand(4), expected)
    assert digests[0] == digests[2] != digests[1]


def test_a_backbone_is_frozen() -> None:
    module = load_backbone(f"{TINY}@random:0").module
    assert not any(part.training for part in module.modules())
    assert not any(item.requires_grad for item in module.parameters())


# Preprocessing


@pytest.mark.parametrize("name", ["resnet50", "vgg19", "efficientnet_b3", "vit_b_16", "convnext_tiny"])
def test_preprocessing_is_torchvisions(name: str) -> None:
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    found = torchvision_zoo.preprocessing(name, None)
    assert [*found.size] == preset.crop_size * 2
    assert [found.resize] == preset.resize_size
    assert found.interpolation == preset.interpolation.value
    assert ([*found.mean], [*found.std]) == (preset.mean, preset.std)


@pytest.mark.parametrize(
    "name", ["inception_v4", "timm/resnet50", "timm/convnext_tiny", "timm/vit_base_patch16_clip_224"]
)
def test_preprocessing_is_timms(name: str) -> None:
    config = resolve_data_config({}, pretrained_cfg=get_pretrained_cfg(name.removeprefix("timm/")).to_dict())
    steps = create_transform(**config).transforms
    found = sketch(name).preprocessing
    resize = next(step for step in steps if isinstance(step, Resize))
    crop = next(step for step in steps if isinstance(step, CenterCrop))
    assert [found.resize] == ([resize.size] if isinstance(resize.size, int) else [tuple(resize.size)])
    assert found.size == tuple(crop.size)
    assert found.interpolation == resize.interpolation.value
    assert (found.mean, found.std) == (config["mean"], config["std"])


def test_weights_bring_their_own_preprocessing() -> None:
    assert torchvision_zoo.preprocessing("resnet50", "IMAGENET1K_V1").resize == 256
    assert torchvision_zoo.preprocessing("resnet50", "IMAGENET1K_V2").resize == 232


@pytest.mark.parametrize(
    ("name", "size", "resize"),
    [("resnet18@random:0", 112, 128), ("efficientnet_lite0", 256, 293), (f"{TINY}@random:0", 64, 67)],
)
def test_size_scales_the_resize_with_it(name: str, size: int, resize: int) -> None:
    backbone = load_backbone(name, size=size)
    assert backbone.preprocessing.size == (size, size)
    assert backbone.preprocessing.resize == resize


def test_networks_of_one_size_refuse_or_are_built_for_another() -> None:
    with pytest.raises(BackboneError, match="vit_b_16 takes images of 224 pixels only"):
        sketch("vit_b_16", size=256)
    assert sketch("timm/test_vit", size=96).traced.shapes["blocks.0"] == (37, 64)
    assert sketch("vit_h_14").preprocessing.size == (518, 518), "built for the size of its default weights"
    with pytest.raises(BackboneError, match="a number of pixels from 1 to 4096, or HEIGHTxWIDTH, not 0"):
        sketch("resnet18", size=0)
    with pytest.raises(BackboneError, match=r"squeezenet1_1 does not run on 10x10 images \(.+\); sizes that work: 32"):
        sketch("squeezenet1_1", size=10)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("timm/test_vit", 100, "test_vit takes multiples of 16 pixels, not 100; sizes that work: 96, 128"),
        ("timm/levit_128s", 200, r"levit_128s does not run on 200x200 images \(.+\); sizes that work: 192, 224"),
        ("timm/twins_svt_small", 200, r"twins_svt_small cannot be built for 200x200 images \(img_size .+\)"),
    ],
)
def test_sizes_that_do_not_work_are_one_line_with_some_that_do(
    name: str, size: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BackboneError, match=message):
        sketch(name, size)
    assert capfd.readouterr().err == "", "torch would log the stack"


def test_position_embeddings_of_a_file_are_resampled_as_timm_does(tmp_path: Path) -> None:
    plain = create_model("test_vit")
    path = save(plain.state_dict(), tmp_path / "vit.safetensors")
    images = torch.rand(2, 3, 96, 96)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    wanted = create_model("test_vit", img_size=96, **options).eval()
    with torch.inference_mode():
        torch.testing.assert_close(load_backbone(f"test_vit@{path}", size=96).module(images), wanted(images))


# Weights from files


def save(state: dict[str, object], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: item.contiguous() for name, item in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def tiny_state(classes: int = 1000) -> dict[str, torch.Tensor]:
    return create_model("test_resnet", num_classes=classes).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_file_of_weights(tmp_path: Path, suffix: str) -> None:
    state = tiny_state()
    path = save(state, tmp_path / f"mine{suffix}")
    backbone = load_backbone(f"{TINY}@{path}")
    assert backbone.weights == path.name
    assert backbone.handle == f"test_resnet@{path.name}"
    assert all(torch.equal(item, state[name]) for name, item in backbone.module.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{name}": item for name, item in state.items()},
        lambda state: {"model": {"state_dict": {f"module.{name}": item for name, item in state.items()}}},
        lambda state: {name: item for name, item in state.items() if "num_batches_tracked" not in name},
    ],
    ids=["state_dict", "model", "module.", "all", "no counters"],
)
def test_wrapped_state_dicts_are_understood(tmp_path: Path, wrap: object) -> None:
    state = tiny_state()
    backbone = load_backbone(f"{TINY}@{save(wrap(state), tmp_path / 'mine.pth')}")
    assert torch.equal(backbone.module.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


@pytest.mark.parametrize("name", [TINY, "torchvision/squeezenet1_1", "efficientnet_lite0"])
def test_the_classifier_takes_the_files_number_of_classes(tmp_path: Path, name: str) -> None:
    plain = {
        TINY: lambda: create_model("test_resnet", num_classes=7),
        "torchvision/squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=7),
        "efficientnet_lite0": lambda: create_model("tf_efficientnet_lite0", num_classes=7),
    }[name]()
    backbone = load_backbone(f"{name}@{save(plain.state_dict(), tmp_path / 'seven.safetensors')}")
    assert backbone.module.get_submodule(backbone.classifiers[0]).weight.shape[0] == 7


def test_auxiliary_heads_in_a_file_are_left_out(tmp_path: Path) -> None:
    plain = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    backbone = load_backbone(f"googlenet@{save(plain.state_dict(), tmp_path / 'mine.safetensors')}")
    assert not any(name.startswith("aux") for name in backbone.module.state_dict())


# Pretrained weights


@pytest.mark.parametrize("name", ["resnet18", "torchvision/googlenet", "test_resnet", "timm/resnet10t@c3_in1k"])
def test_without_network_and_weights_one_line_names_the_ways_out(offline: Path, name: str) -> None:
    with pytest.raises(
        BackboneError, match=r"no weights for .*: not on this machine, and the download failed"
    ) as caught:
        load_backbone(name)
    bare = name.partition("@")[0].rpartition("/")[2]
    assert f"or use efficientnet_lite0, {bare}@FILE.safetensors or {bare}@random:0" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("resnet18", "resnet18-f37072fd.pth", {}),
        ("googlenet", "googlenet-1378be20.pth", {"aux_logits": True, "init_weights": False}),
    ],
)
def test_weights_in_torch_hubs_cache_need_no_network(
    offline: Path, name: str, file: str, options: dict[str, bool]
) -> None:
    plain = torchvision.models.get_model(name, weights=None, **options)
    (offline / "checkpoints").mkdir()
    torch.save(plain.state_dict(), offline / "checkpoints" / file)
    backbone = load_backbone(name)
    assert (backbone.weights, backbone.handle) == ("IMAGENET1K_V1", name)
    assert torch.equal(backbone.module.fc.weight, plain.fc.weight)
    assert not getattr(backbone.module, "transform_input", False)
    assert not any(path.startswith("aux") for path, _ in backbone.module.named_modules())


def test_weights_in_the_hubs_cache_need_no_network(offline: Path) -> None:
    state = tiny_state()
    repository = offline / "hub" / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save(state, repository / "snapshots" / "abc" / "model.safetensors")
    assert list_backbones("timm/test_resnet")[0].local == ("r160_in1k",)
    backbone = load_backbone("test_resnet")
    assert (backbone.weights, backbone.handle) == ("r160_in1k", "test_resnet")
    assert torch.equal(backbone.module.fc.weight, state["fc.weight"])


def describe(folder: Path, classes: int = 1000) -> dict[str, torch.Tensor]:
    """Write a network as timm publishes it; return its weights."""
    plain = create_model("test_resnet", num_classes=classes)
    folder.mkdir(parents=True)
    config = {"architecture": "test_resnet", "num_classes": classes, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "config.json").write_text(json.dumps(config))
    save(plain.state_dict(), folder / "model.safetensors")
    return plain.state_dict()


def test_a_folder_that_timm_wrote_is_a_backbone(offline: Path) -> None:
    state = describe(offline / "mine", classes=7)
    name = f"local-dir:{offline / 'mine'}"
    backbone = load_backbone(name)
    assert (backbone.name, backbone.handle) == ("timm/test_resnet", name)
    assert backbone.weights_digest == weights_digest(state)
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3)
    assert sketch(name).traced.shapes["fc"] == (7,)
    check_weights(name)


def test_a_relative_folder_is_another_network_in_another_working_directory(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for index in range(2):
        describe(offline / str(index) / "net")
        monkeypatch.chdir(offline / str(index))
        assert recall("local-dir:net", None) is None
        backbone = load_backbone("local-dir:net")
        digests.append(backbone.weights_digest)
        own = json_fields(backbone.preprocessing)
    assert recall("local-dir:net", None) == Known(digests[1], 1, own)
    monkeypatch.chdir(offline / "0")
    assert recall("local-dir:net", None) == Known(digests[0], 1, own)
    assert digests[0] != digests[1]


@pytest.fixture
def net(offline: Path) -> Path:
    """The folder of a network as timm publishes it."""
    describe(offline / "net")
    return offline / "net"


def redescribe(folder: Path, **changes: Any) -> str:
    """Change the description of a network but not its weights; return the network's name."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return f"local-dir:{folder}"


def extracted(photos: Path, *names: str, output: Path) -> list[ExtractResult]:
    return extract(photos, names, output=output, size=64, precision="fp32", engine="torch")


def mean_of(result: ExtractResult) -> float:
    """The mean of the first channel in the preprocessing of the features that a result names."""
    mean: float = open_cache(result.path).layers["penultimate"].spec["preprocessing"]["mean"][0]
    return mean


def test_features_of_an_older_preprocessing_are_no_answer(
    net: Path, make_photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, cache = make_photos(each=1), net.parent / "cache"
    for mean, computed in ((0.5, 3), (0.4, 3), (0.5, 0)):
        name = redescribe(net, pretrained_cfg={"mean": [mean] * 3})
        results = [*extracted(photos, name, output=cache), *extracted(photos, name, output=cache)]
        assert [(mean_of(result), result.computed) for result in results] == [(mean, computed), (mean, 0)]
    monkeypatch.setattr("pipeline.extract.FeatureExtractor", None)
    (result,) = extracted(photos, name, output=cache)  # answered without the network
    assert mean_of(result) == 0.5


def test_an_old_note_without_preprocessing_is_made_again(net: Path) -> None:
    name = f"local-dir:{net}"
    load_backbone(name)
    kept = recall(name, None)
    assert kept is not None
    (path,) = [one for one in user_folder("weights").glob("*.json") if kept.weights_digest in one.read_text()]
    note = json.loads(path.read_text())
    del note["preprocessing"]
    path.write_text(json.dumps(note))
    assert recall(name, None) is None
    load_backbone(name)
    assert recall(name, None) == kept


def test_networks_that_differ_in_preprocessing_alone_are_both_extracted(
    net: Path, make_photos: Callable[..., Path]
) -> None:
    other = net.with_name("other")
    shutil.copytree(net, other)
    names = redescribe(net, pretrained_cfg={"mean": [0.5] * 3}), redescribe(other, pretrained_cfg={"mean": [0.1] * 3})
    results = extracted(make_photos(each=1), *names, output=net.parent / "cache")
    assert [(result.backbone, mean_of(result)) for result in results] == [(names[0], 0.5), (names[1], 0.1)]


def test_a_description_that_changes_the_network_changes_its_digest(net: Path, make_photos: Callable[..., Path]) -> None:
    photos, cache, other = make_photos(each=1), net.parent / "cache", net.with_name("other")
    shutil.copytree(net, other)
    names = redescribe(net), redescribe(other, model_args={"num_classes": 1000, "global_pool": "max"})
    results = [extracted(photos, name, output=cache)[0] for name in names]
    plain, pooled = (open_cache(result.path).matrix("penultimate") for result in results)
    assert [result.computed for result in results] == [3, 3]
    assert (plain[:] < pooled[:]).any()
    backbones = [load_backbone(name) for name in names]
    assert len({backbone.weights_digest for backbone in backbones}) == 2
    assert len({tap(backbone, ["penultimate"]).identity for backbone in backbones}) == 2  # of converted networks
    redescribe(other, model_args={"num_classes": 1000})  # shows in the weights
    assert load_backbone(names[1]).weights_digest == backbones[0].weights_digest


def test_what_is_built_by_its_description_cannot_be_trained_and_saved(
    net: Path, make_photos: Callable[..., Path]
) -> None:
    name, photos, saved = redescribe(net, model_args={"output_stride": 8}), make_photos(), net.parent / "t.safetensors"
    with pytest.raises(
        BackboneError, match=r"built with the model_args .*output_stride.* a saved network would lose them"
    ):
        finetune(photos, name, size=32, epochs=1, engine="torch", output=net.parent / "cache", save=saved)
    with pytest.raises(BackboneError, match="a saved network would lose them"):
        pretrain(photos, name, task="rotation", save=saved, init="pretrained", output=net.parent / "cache", size=32)
    assert not saved.exists()


def test_a_description_that_timm_does_not_read_is_one_line(net: Path) -> None:
    name = redescribe(net, pretrained_cfg={"pool_of_the_future": 1})
    with pytest.raises(BackboneError, match=r"config\.json is not one that this timm reads .*pool_of_the_future"):
        load_backbone(name)


@pytest.mark.parametrize("call", [load_backbone, sketch, check_weights])
@pytest.mark.parametrize("name", ["local-dir:/x", "local-dir:", "local-dir:/x.pth", "hf-hub:", "hf-hub:a/b/c"])
def test_a_folder_that_is_not_there_is_one_line(offline: Path, call: Callable[[str], Any], name: str) -> None:
    with pytest.raises(BackboneError) as caught:
        call(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(BackboneError):
        extract("digits", [name], output=offline / "cache")


def test_a_repository_in_the_hubs_cache_is_a_backbone(offline: Path) -> None:
    repository = offline / "hub" / "models--someone--net"
    state = describe(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name in ("hf-hub:someone/net", "hf_hub:someone/net", "hf-hub:someone/net@abc"):
        assert load_backbone(name).weights_digest == weights_digest(state)


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k"])
def test_timms_own_names_stand_for_the_same_weights(offline: Path, name: str) -> None:
    state = tiny_state()
    repository = offline / "hub" / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    save(state, repository / "snapshots" / "abc" / "model.safetensors")
    backbone = load_backbone(name)
    assert (backbone.name, backbone.handle) == ("timm/test_resnet", "test_resnet")
    assert backbone.weights_digest == load_backbone("test_resnet").weights_digest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50.a1_in2k", "unknown weights 'a1_in2k' for resnet50; did you mean a1_in1k"),
        ("local-dir:nowhere", r"local-dir:nowhere: expected the config\.json of a network of timm in .*nowhere"),
        ("hf-hub:nobody/nothing", "no weights for hf-hub:nobody/nothing: not on this machine, and the download failed"),
    ],
)
def test_names_of_elsewhere_that_do_not_exist_are_one_line(offline: Path, name: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


def test_a_broken_file_in_the_cache_is_one_line(offline: Path) -> None:
    (offline / "checkpoints").mkdir()
    (offline / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"half a downlo")
    with pytest.raises(BackboneError, match="no weights for resnet18"):
        load_backbone("resnet18")


# Weights that change behind a name


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backbones that were loaded since."""
    loaded: list[str] = []

    def load(name: str, size: int | None = None, white: int | None = None) -> object:
        loaded.append(name)
        return load_backbone(name, size, white)

    monkeypatch.setattr("pipeline.backbones.registry.load_backbone", load)
    return loaded


def in_torch_hub(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    (folder / "checkpoints").mkdir(exist_ok=True)
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(state, folder / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    return "squeezenet1_1"


def in_the_hub(folder: Path, seed: int) -> str:
    """A newer revision for each seed."""
    torch.manual_seed(seed)
    repository = folder / "hub" / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / f"revision{seed}").mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(f"revision{seed}")
    save(tiny_state(), repository / "snapshots" / f"revision{seed}" / "model.safetensors")
    return "test_resnet"


def by_url(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    (folder / "checkpoints").mkdir(exist_ok=True)
    file = str(get_pretrained_cfg("lcnet_050").url).rsplit("/", 1)[-1]
    torch.save(create_model("lcnet_050").state_dict(), folder / "checkpoints" / file)
    return "lcnet_050"


def in_a_file(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    return f"{TINY}@{save(tiny_state(), folder / 'mine.safetensors')}"


@pytest.mark.parametrize("put", [in_torch_hub, in_the_hub, by_url, in_a_file])
def test_replaced_weights_are_noticed_by_the_same_request(
    put: Callable[[Path, int], str], offline: Path, loads: list[str], make_photos: Callable[..., Path]
) -> None:
    photos, cache, how = make_photos(each=1), offline / "cache", {"size": 32, "engine": "torch", "precision": "fp32"}

    def features(seed: int | None) -> tuple[int, np.ndarray]:
        name = put(offline, seed) if seed is not None else asked[0]
        asked.append(name)
        (result,) = extract(photos, [name], output=cache, **how)
        return result.computed, open_cache(result.path).features("penultimate", np.arange(3))

    asked: list[str] = []
    (computed, first), (again, same) = features(0), features(None)
    assert (computed, again, len(loads)) == (3, 0, 1), "the second request needs no network"
    assert np.array_equal(first, same)
    computed, other = features(1)
    assert (computed, len(loads)) == (3, 2)
    assert np.array_equal(other, extract_anew(photos, asked[0], offline, how))
    assert not np.array_equal(other, first)
    assert (features(None)[0], len(loads)) == (0, 3), "the network was loaded by `extract_anew` only"


def extract_anew(photos: Path, name: str, folder: Path, how: dict[str, Any]) -> np.ndarray:
    (result,) = extract(photos, [name], output=folder / "anew", **how)
    return open_cache(result.path).features("penultimate", np.arange(3))


def test_a_cache_made_elsewhere_is_checked_against_the_weights_once(
    loads: list[str], make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request() -> int:
        how = {"size": 32, "engine": "torch", "precision": "fp32"}
        return extract(photos, ["test_resnet@random:5"], output=tmp_path / "cache", **how)[0].computed

    photos = make_photos(each=1)
    assert request() == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    assert (request(), request(), loads) == (0, 0, ["test_resnet@random:5"] * 2)
    record = next((tmp_path / "another user").rglob("weights/*.json"))
    for damaged in ("null", '{"setting": 3', record.read_text().replace("heads", "tails")):
        record.write_text(damaged)
        assert request() == 0
    assert len(loads) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos / "red" / "0.png" / "no folder"))
    assert (request(), len(loads)) == (0, 6), "nothing can be noted, so the network is loaded every time"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: Path("~"))
    assert (request(), len(loads)) == (0, 7), "as where there is no home directory"


def test_tagged_weights_that_are_no_numbers_are_refused(offline: Path) -> None:
    name = in_torch_hub(offline, 0)
    path = offline / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    torch.save(torch.load(path) | {"features.0.bias": torch.full((64,), torch.nan)}, path)
    with pytest.raises(BackboneError, match=r"squeezenet1_1 holds 64 NaN or .* first in features.0.bias"):
        load_backbone(name)


def test_what_the_embedded_weights_stand_for_is_their_file() -> None:
    path = embedded.weights_file("efficientnet_lite0")
    assert embedded.weights_paths("efficientnet_lite0", "imagenet") == [path]
