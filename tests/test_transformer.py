from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sklearn.utils.estimator_checks as checks
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from timm.models import create_model

from pipeline.backbones.graph import tap
from pipeline.backbones.registry import load
from pipeline.errors import ThawlineError
from pipeline.images.transform import prepare
from pipeline.transformer import ImageFeatures

TINY = {"backbone": "timm/test_resnet@random:0", "precision": "fp32", "size": 64}
CHECKS = [
    checks.check_estimator_cloneable,
    checks.check_estimator_repr,
    checks.check_estimator_tags_renamed,
    checks.check_valid_tag_types,
    checks.check_no_attributes_set_in_init,
    checks.check_do_not_raise_errors_in_init_or_set_params,
    checks.check_parameters_default_constructible,
    checks.check_get_params_invariance,
    checks.check_set_params,
    checks.check_mixin_order,
]


@pytest.fixture
def paths(make_photos: Callable[..., Path]) -> list[Path]:
    return sorted(make_photos().rglob("*.png"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_scikit_learns_checks(check: Callable[..., None]) -> None:
    """Those that feed no numbers: scikit-learn itself leaves the others out for estimators without 2-D input."""
    estimator = ImageFeatures(**TINY)
    if check is checks.check_mixin_order:
        check("ImageFeatures", estimator)
    else:
        check("ImageFeatures", estimator)


def test_features_are_those_of_the_tapped_network(paths: list[Path]) -> None:
    backbone = load(TINY["backbone"], size=64)
    pixels = np.stack([prepare(path.read_bytes(), backbone.preprocessing) for path in paths])
    with torch.inference_mode():
        wanted = torch.cat(tap(backbone, ["layer2", "input"], "max")(torch.from_numpy(pixels)), dim=1).numpy()
    features = ImageFeatures(**TINY, layer="layer2+input", pool="max", batch_size=5).transform(paths)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, wanted, rtol=1e-3, atol=1e-4)


def test_paths_photos_and_arrays_are_the_same(paths: list[Path]) -> None:
    transformer = ImageFeatures(**TINY).fit(paths)
    wanted = transformer.transform(paths)
    photos = [Image.open(path) for path in paths]
    arrays = np.stack([np.asarray(photo) for photo in photos])
    mixed = [str(paths[0]), photos[1], arrays[2]]
    for same in (photos, arrays, [str(path) for path in paths], np.array(list(map(str, paths)), dtype=object)):
        assert np.array_equal(transformer.transform(same), wanted)
    np.testing.assert_allclose(transformer.transform(mixed), wanted[:3], rtol=1e-3, atol=1e-5)
    grey = np.asarray(photos[0].convert("L"))
    assert np.array_equal(transformer.transform([grey]), transformer.transform([np.stack([grey] * 3, axis=2)]))


def test_names_and_pandas_free_output(paths: list[Path]) -> None:
    transformer = ImageFeatures(**TINY, layer="logits+penultimate")
    names = transformer.get_feature_names_out()
    assert names.dtype == object
    assert [names[0], names[999], names[1000], names[-1]] == ["fc_0", "fc_999", "penultimate_0", "penultimate_127"]
    assert transformer.transform(paths[:1]).shape == (1, len(names))


def test_fit_changes_nothing_and_instances_travel(paths: list[Path]) -> None:
    transformer = ImageFeatures(**TINY)
    before = dict(vars(transformer))
    wanted = transformer.fit_transform(paths)
    assert vars(transformer) == before
    for other in (clone(transformer), pickle.loads(pickle.dumps(transformer))):
        assert np.array_equal(other.transform(paths), wanted)
    assert len(pickle.dumps(transformer)) < 2000
    other = clone(transformer).set_params(pool="max")
    assert not np.array_equal(other.transform(paths), wanted)


def test_it_works_where_scikit_learn_puts_it(paths: list[Path]) -> None:
    labels = [path.parent.name for path in paths]
    pipeline = make_pipeline(ImageFeatures(**TINY, layer="input"), LogisticRegression(max_iter=1000))
    assert cross_val_score(pipeline, paths, labels, cv=3).mean() > 0.9
    assert cross_val_score(pipeline, np.array(list(map(str, paths))), labels, cv=3, n_jobs=2).mean() > 0.9
    search = GridSearchCV(pipeline, {"imagefeatures__pool": ["avg", "max"]}, cv=2).fit(paths, labels)
    assert search.predict(paths[:1])[0] == labels[0]


def test_a_rewritten_weights_file_is_loaded_again(tmp_path: Path, paths: list[Path]) -> None:
    file = tmp_path / "mine.pth"
    features = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(create_model("test_resnet").state_dict(), file)
        features.append(ImageFeatures(f"timm/test_resnet@{file}", size=64).transform(paths[:1]))
    assert not np.array_equal(*features)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"backbone": "test_resnt"}, "unknown backbone 'test_resnt'; did you mean test_resnet"),
        ({"layer": "layer9"}, "no layer 'layer9'"),
        ({"pool": "mean"}, "unknown pooling 'mean'"),
        ({"precision": "fp64"}, "unknown precision 'fp64'"),
        ({"engine": "jax"}, "unknown engine 'jax'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_fit_checks_the_parameters(paths: list[Path], parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ThawlineError, match=message):
        ImageFeatures(**TINY | parameters).fit(paths)


@pytest.mark.parametrize("method", ["fit", "transform"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images: expected a list of paths, PIL images or uint8 arrays"),
        ("photo.png", "not a single str: put it in a list"),
        ([1.5], "expected paths, .*; item 0 is a float"),
        ([np.zeros((2, 2), np.float32)], r"item 0 is a float32 array of shape \(2, 2\)"),
        ([np.zeros((4, 4, 2), np.uint8)], r"item 0 is a uint8 array of shape \(4, 4, 2\)"),
        (np.zeros((3, 3), np.uint8), r"item 0 is a uint8 array of shape \(3,\)"),
    ],
)
def test_other_inputs_are_refused(method: str, images: object, message: str) -> None:
    with pytest.raises(ThawlineError, match=message):
        getattr(ImageFeatures(**TINY), method)(images)


def test_an_unreadable_image_is_named(tmp_path: Path, paths: list[Path]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:100])
    transformer = ImageFeatures(**TINY).fit([broken])
    for bad, message in (
        (broken, "broken.png cannot be used"),
        (tmp_path / "gone.png", "gone.png cannot be used.*no such"),
    ):
        with pytest.raises(ThawlineError, match=message):
            transformer.transform([paths[0], bad])
    with pytest.raises(ThawlineError, match="cannot be used as an image"):
        transformer.transform([Image.open(broken)])
