"""Zoo of timm's networks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from huggingface_hub.utils import HFValidationError, get_session
from timm.data import resolve_data_config
from timm.models import PretrainedCfg, create_model, get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models._hub import load_model_config_from_path
from torch import nn

from pipeline.backbones.weights import downloading, hub_file
from pipeline.errors import BackboneError, first_line
from pipeline.spec import Preprocessing, Size

ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")
"""How names begin that stand for a repository or a folder with a network's description and weights, as timm has them.
Such a name is also the tag of its weights."""
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_DESCRIPTION = "config.json"
_CONNECT_S = 10.0


def names() -> list[str]:
    """Return the names of all networks of this zoo."""
    return list(timm.list_models())


def tags(name: str) -> tuple[str, ...]:
    """Return the tags of the pretrained weights of `name`, the default first."""
    found = [config.tag for config in get_arch_pretrained_cfgs(name).values() if config.has_weights and config.tag]
    default = _config(name, None).tag
    return tuple(sorted(found, key=lambda tag: tag != default))


def cached(name: str, tag: str) -> bool:
    """Tell whether the weights `tag` of `name` are in a local cache."""
    return _cached_file(_config(name, tag)) is not None


def weights_paths(name: str, tag: str) -> list[Path]:
    """Return the file that names the newest revision in the hub's cache, the files of it, and that of torch's hub."""
    if tag.startswith(ELSEWHERE):
        folder = _folder(tag)
        return [folder.parent.parent / "refs" / "main", *(folder / file for file in (_DESCRIPTION, *_HUB_FILES))]
    config, paths = _config(name, tag), []
    if config.hf_hub_id:
        folder = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{config.hf_hub_id.replace('/', '--')}")
        newest = folder / "refs" / "main"
        revision = newest.read_text() if newest.is_file() else ""
        paths = [newest, *(folder / "snapshots" / revision / file for file in _hub_files(config))]
    return paths + ([hub_file(config.url)] if isinstance(config.url, str) else [])


def _hub_files(config: PretrainedCfg) -> tuple[str, ...]:
    return (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES


def architecture(name: str) -> str:
    """Return which network a name that begins as in `ELSEWHERE` stands for; raises `BackboneError` if it is none."""
    folder = _folder(name)
    try:
        return str(load_model_config_from_path(folder)[1])
    except Exception as error:  # of any kind, for a file from elsewhere
        raise BackboneError(
            f"{name}: expected the {_DESCRIPTION} of a network of timm in {folder} ({first_line(error)})"
        ) from error


def arguments(tag: str) -> str:
    """Return as JSON what the description behind `tag` changes in a network beside its weights; '' if nothing.

    Those of timm's own tags follow from the name. The number of classes shows in the weights.
    """
    if not tag.startswith(ELSEWHERE):
        return ""
    given = dict(load_model_config_from_path(_folder(tag))[2])
    given.pop("num_classes", None)
    return json.dumps(given, sort_keys=True) if given else ""


def _folder(name: str) -> Path:
    """Return the folder that a name stands for; a repository is downloaded unless the hub's cache has it."""
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        return Path(place).absolute()
    repository, _, revision = place.partition("@")
    try:
        found = huggingface_hub.try_to_load_from_cache(repository, _DESCRIPTION, revision=revision or None)
    except HFValidationError as error:
        raise BackboneError(f"{name}: expected a repository, hf-hub:ORG/NAME ({first_line(error)})") from error
    if not isinstance(found, str):
        with downloading(name):
            _reach_hub()
            found = huggingface_hub.hf_hub_download(repository, _DESCRIPTION, revision=revision or None)
            held = set(huggingface_hub.list_repo_files(repository, revision=revision or None))
            weights = next(file for file in _HUB_FILES if file in held)
            huggingface_hub.hf_hub_download(repository, weights, revision=revision or None)
    return Path(found).parent


def _reach_hub() -> None:
    """Fail at once without a network: the hub's client would repeat a failed request for most of a minute."""
    get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_CONNECT_S)


def _config(name: str, tag: str | None) -> PretrainedCfg:
    if tag is not None and tag.startswith(ELSEWHERE):
        found = load_model_config_from_path(_folder(tag))[0]
        try:
            return PretrainedCfg(**found)
        except TypeError as error:
            raise BackboneError(
                f"{tag}: its config.json is not one that this timm reads ({first_line(error)})"
            ) from error
    return get_pretrained_cfg(f"{name}.{tag}" if tag else name) or PretrainedCfg()


def _cached_file(config: PretrainedCfg) -> Path | None:
    if config.hf_hub_id:
        for file in _hub_files(config):
            found = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file)
            if isinstance(found, str):
                return Path(found)
    if isinstance(config.url, str) and hub_file(config.url).is_file():
        return hub_file(config.url)
    return None


def build(name: str, size: Size | None, classes: int | None) -> nn.Module:
    """Return the network without pretrained weights."""
    options: dict[str, Any] = {"num_classes": classes} if classes else {}
    return create_model(name, pretrained=False, **options, **_sized(name, None, size))


def pretrained(name: str, tag: str, size: Size | None) -> nn.Module:
    """Return the network with the weights `tag`, from the local caches or downloaded."""
    config = _config(name, tag)
    options = _sized(name, tag, size)
    if tag.startswith(ELSEWHERE):
        try:
            return create_model(f"local-dir:{_folder(tag)}", pretrained=True, **options)
        except Exception as error:  # as in `architecture`
            raise BackboneError(f"{tag} cannot be loaded as {name} ({first_line(error)})") from error
    with downloading(name):
        local = _cached_file(config)
        if local is not None and not config.custom_load:
            # With a given file timm does not ask the server whether there is a newer one.
            options["pretrained_cfg_overlay"] = {"file": str(local)}
        elif local is None and config.hf_hub_id:
            _reach_hub()
        return create_model(f"{name}.{tag}", pretrained=True, **options)


def _sized(name: str, tag: str | None, size: Size | None) -> dict[str, Any]:
    if size is None or not _config(name, tag).fixed_input_size:
        return {}
    return {"img_size": size}


def preprocessing(name: str, tag: str | None) -> Preprocessing:
    """Return how the weights `tag` (None for the default) expect images to be prepared.

    Raises `BackboneError` if timm pads images for this network.
    """
    config = resolve_data_config({}, pretrained_cfg=_config(name, tag).to_dict())
    _, height, width = config["input_size"]
    if config["crop_mode"] not in ("center", "squash"):
        raise BackboneError(
            f"{name} wants the crop mode '{config['crop_mode']}', but only 'center' and 'squash' are supported; use "
            "another network"
        )
    rows, columns = (math.floor(side / config["crop_pct"]) for side in (height, width))
    return Preprocessing(
        size=(height, width),
        resize=min(rows, columns) if config["crop_mode"] == "center" else (rows, columns),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def classifiers(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the classifiers; some networks have several, whose scores they combine."""
    found = _config(name, None).classifier
    named, modules = found if isinstance(found, tuple | list) else (found,), dict(module.named_modules())
    return tuple(path for path in named if isinstance(path, str) and path in modules)
