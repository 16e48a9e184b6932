"""Layers that give tokens, from extraction to heads and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from features_cache import CacheFile, Catalog, export_features, open_cache
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.taps import normalisation
from pipeline.backbones.trace import hooked
from pipeline.errors import FitError
from pipeline.evaluation.rows import select
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.fit import fit
from pipeline.images.loader import load_images
from pipeline.images.sources.registry import open_source
from pipeline.rank import rank
from pipeline.spec import LayerSpec

NET, LAYER = "test_vit@random:0", "blocks.3"
Photos = Callable[..., Path]


def cached(photos: Path, folder: Path, pool: str) -> CacheFile:
    (result,) = extract(photos, [NET], [LAYER, "penultimate"], pool, folder, precision="fp32", engine="torch")
    return open_cache(result.path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, write_photos: Callable[..., Path]) -> Path:
    return write_photos(tmp_path_factory.mktemp("tokens") / "photos", each=6)


@pytest.fixture(scope="module")
def seen(photos: Path) -> tuple[np.ndarray, np.ndarray]:
    """What a plain hook sees of the layer (n, tokens, d), and what timm's own classifier reads (n, d)."""
    backbone = load_backbone(NET)
    source = open_source(photos)
    (batch,) = load_images(source, np.arange(len(source.items)), [backbone.preprocessing], len(source.items), 1)
    pixels = torch.from_numpy(np.stack([image.pixels[0] for image in batch if image.pixels is not None]))
    scale, shift = normalisation(backbone.preprocessing)
    images = pixels.permute(0, 3, 1, 2) * scale + shift
    found: list[torch.Tensor] = []
    network: Any = backbone.module
    with torch.inference_mode(), hooked(network, {LAYER: lambda _module, _args, value: found.append(value)}):
        read = network.forward_head(network.forward_features(images), pre_logits=True)
    return found[0].numpy(), read.numpy()


def test_each_pooling_is_what_its_name_says(photos: Path, seen: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    tokens, read = seen
    side = round((tokens.shape[1] - 1) ** 0.5)
    wanted = {
        "cls": tokens[:, 0],
        "avg": tokens[:, 1:].mean(1),
        "cls+avg": np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], 1),
        "flatten": tokens[:, 1:].transpose(0, 2, 1).reshape(len(tokens), -1),
        "none": tokens.reshape(len(tokens), -1),
    }
    assert side**2 == tokens.shape[1] - 1
    prints = set()
    for pool, features in wanted.items():
        file = cached(photos, tmp_path, pool)
        np.testing.assert_allclose(file.matrix(LAYER), features, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file.matrix("penultimate"), read, rtol=1e-4, atol=1e-5)
        spec = LayerSpec.from_json(file.layers[LAYER].spec)
        assert (spec.pool, spec.prefix_tokens) == (pool, 1)
        assert spec.fingerprint == file.layers[LAYER].fingerprint
        assert "prefix_tokens" not in file.layers["penultimate"].spec
        prints |= {spec.fingerprint, replace(spec, prefix_tokens=None).fingerprint}  # None: as before there was cls
    assert len(prints) == 2 * len(wanted)


def test_whole_activations_are_exported_in_their_shape(
    photos: Path, seen: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    file = cached(photos, tmp_path, "none")
    assert file.layers[LAYER].shape == seen[0].shape[1:]
    assert file.layers["penultimate"].shape == ()
    for suffix in (".npy", ".safetensors", ".parquet"):
        export_features(file, LAYER, tmp_path / f"tokens{suffix}")
    listed = pq.read_table(tmp_path / "tokens.parquet")["features"].combine_chunks().to_numpy_ndarray()
    for found in (np.load(tmp_path / "tokens.npy"), load_file(tmp_path / "tokens.safetensors")["features"], listed):
        np.testing.assert_allclose(found, seen[0], rtol=1e-4, atol=1e-5)


def test_a_map_with_channels_last_is_kept_with_channels_first(photos: Path, tmp_path: Path) -> None:
    options = {"precision": "fp32", "engine": "torch", "size": 64}
    net = "swin_t@random:0"
    (whole,) = extract(photos, [net], ["features.1"], "none", tmp_path, **options)
    (means,) = extract(photos, [net], ["features.1"], "avg", tmp_path, **options)
    file = open_cache(whole.path)
    assert file.layers["features.1"].shape == (96, 16, 16)
    maps = np.asarray(file.matrix("features.1")).reshape(-1, 96, 16, 16)
    np.testing.assert_allclose(maps.mean((2, 3)), open_cache(means.path).matrix("features.1"), rtol=1e-4, atol=1e-5)


def test_heads_read_pooled_features_only(photos: Path, tmp_path: Path) -> None:
    cached(photos, tmp_path, "none")
    with pytest.raises(FitError, match=r"blocks\.3 was extracted with pool none, which keeps whole activations"):
        fit(tmp_path)
    pooled = cached(photos, tmp_path, "avg")
    assert {result.pool for result in fit(tmp_path).results} == {"avg"}
    assert {score.pool for score in rank(tmp_path).ranking} == {"avg"}
    assert {file.path for layer in select(Catalog(tmp_path)) for file, _ in layer.parts} == {pooled.path}


def test_the_thaw_line_may_follow_tokens(photos: Path, tmp_path: Path) -> None:
    report = finetune(photos, NET, freeze=LAYER, output=tmp_path, epochs=1, precision="fp32", engine="torch")
    network: Any = load_backbone(NET).module
    above = [*network.blocks[4:].parameters(), *network.norm.parameters(), *network.fc_norm.parameters()]
    top = 3 * (network.num_features + 1)
    assert report.results[0].trainable_parameters == sum(item.numel() for item in above) + top
    (file,) = (tmp_path / "finetune").glob("*.h5")
    assert open_cache(file).layers[LAYER].shape == seen_shape(network)


def seen_shape(network: Any) -> tuple[int, int]:
    return network.patch_embed.num_patches + network.num_prefix_tokens, network.embed_dim
