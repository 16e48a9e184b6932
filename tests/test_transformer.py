from __future__ import annotations

import multiprocessing
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.utils import estimator_checks, get_tags

from features_cache import ThawlineError, open_cache
from pipeline.engines.engine import claim_process
from pipeline.errors import BackboneError, EngineError, SourceError, UnreadableImageError
from pipeline.extract import extract
from pipeline.transformer import ImageFeatures

SMALL = {"layer": "blocks.1", "size": 32, "precision": "fp32", "device": "cpu"}
TORCH = SMALL | {"engine": "torch"}
"""What needs no conversion, for networks that one test alone runs."""
DIM = 24


def pictures(count: int = 6, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 40, 36, 3), dtype=np.uint8))


def test_a_picture_gives_the_same_features_however_it_is_given(tmp_path: Path) -> None:
    (picture,) = pictures(1)
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    features = ImageFeatures(**SMALL).transform([path, str(path), picture, Image.fromarray(picture), Image.open(path)])
    assert features.shape == (5, DIM)
    assert features.dtype == np.float32
    assert np.ptp(features, axis=0).max() == 0
    assert features.std() > 0


def test_a_column_of_paths_is_taken_in_any_form(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    names = []
    for number, picture in enumerate(pictures(2)):
        names.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(picture).save(names[-1])
    frame = pandas.DataFrame({"path": names, "label": ["a", "b"]})
    features = ImageFeatures(**SMALL)
    expected = features.transform(names)
    columns = (frame["path"], frame[["path"]], frame["path"].to_numpy(), frame[["path"]].to_numpy(), np.array(names))
    for column in (*columns, np.array(names)[:, None], [[name] for name in names]):
        np.testing.assert_array_equal(features.fit_transform(column), expected)
    selected = ColumnTransformer([("deep", features, ["path"])]).fit_transform(frame)
    np.testing.assert_array_equal(selected, expected)
    with pytest.raises(SourceError, match="one column of paths, got 2: path, label"):
        features.fit(frame)
    with pytest.raises(SourceError, match=r"item 0 is a object array of shape \(2,\)"):
        features.fit(frame.to_numpy())


def test_a_grey_array_is_its_rgb_picture() -> None:
    grey = pictures(1)[0][..., 0]
    features = ImageFeatures(**SMALL).transform([grey, np.stack([grey] * 3, axis=-1)])
    np.testing.assert_array_equal(features[0], features[1])


def test_features_are_those_of_extract(make_photos: Any, tmp_path: Path) -> None:
    photos = make_photos(each=2)
    (result,) = extract(photos, layers=["blocks.1"], pool="gem", output=tmp_path / "c", size=32, precision="fp32")
    cache = open_cache(result.path)
    paths = [photos / uri for uri in cache.uris]
    np.testing.assert_allclose(
        ImageFeatures(**SMALL, pool="gem").transform(paths), cache.matrix("blocks.1"), rtol=1e-5, atol=1e-6
    )


def test_more_images_than_a_batch_stay_in_order() -> None:
    images = pictures(21)
    together = ImageFeatures(**SMALL).transform(images)
    for place in (0, 7, 8, 15, 16, 20):
        alone = ImageFeatures(**SMALL).transform(images[place : place + 1])
        np.testing.assert_allclose(together[place], alone[0], rtol=1e-4, atol=1e-5)


def test_layers_joined_by_a_plus_stand_side_by_side() -> None:
    images = pictures(2)
    joined = ImageFeatures(**TORCH | {"layer": "blocks.1+input"}).fit_transform(images)
    parts = [ImageFeatures(**TORCH | {"layer": layer}).transform(images) for layer in ("blocks.1", "input")]
    np.testing.assert_allclose(joined, np.hstack(parts), rtol=1e-5, atol=1e-6)


def test_nothing_gives_no_rows_of_the_right_width() -> None:
    assert ImageFeatures(**SMALL).fit_transform([]).shape == (0, DIM)


def test_parameters_changed_later_count() -> None:
    features = ImageFeatures(**TORCH).fit(pictures())
    assert features.set_params(layer="blocks.0").fit_transform(pictures()).shape == (6, 16)
    assert len(features.get_feature_names_out()) == 16


def test_a_weights_file_written_again_is_read_again(tmp_path: Path) -> None:
    import torch

    from pipeline.backbones.registry import load_backbone

    path = tmp_path / "weights.pth"
    results = []
    for seed in (0, 1):
        torch.save(load_backbone(f"efficientnet_lite0@random:{seed}").module.state_dict(), path)
        results.append(ImageFeatures(f"efficientnet_lite0@{path}", **TORCH).transform(pictures(1)))
    assert not np.allclose(results[0], results[1])


# Within scikit-learn


def test_a_pipeline_learns_and_is_cross_validated() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(24) % 2
    images = [
        np.where(label, 150, 0).astype(np.uint8) + rng.integers(0, 100, (20, 20, 3), dtype=np.uint8) for label in y
    ]
    scores = cross_val_score(make_pipeline(ImageFeatures(**SMALL), LogisticRegression(max_iter=500)), images, y, cv=3)
    blind = cross_val_score(make_pipeline(ImageFeatures(**SMALL), DummyClassifier()), images, y, cv=3)
    assert scores.min() == 1
    assert blind.max() < 0.7


def test_a_fitted_pipeline_survives_a_pickle_without_the_network() -> None:
    images = pictures()
    model = make_pipeline(ImageFeatures(**SMALL), LogisticRegression(max_iter=500)).fit(images, [0, 1] * 3)
    data = pickle.dumps(model)
    assert len(data) < 10_000
    np.testing.assert_array_equal(pickle.loads(data).predict_proba(images), model.predict_proba(images))
    assert pickle.loads(data)[0].get_feature_names_out().size == DIM


def test_a_union_names_its_features() -> None:
    union = FeatureUnion([("deep", ImageFeatures(**SMALL)), ("raw", ImageFeatures(**TORCH | {"layer": "input"}))])
    assert union.fit_transform(pictures(2)).shape == (2, DIM + 3072)
    names = union.get_feature_names_out()
    assert names[0] == "deep__blocks.1_0"
    assert names[-1] == "raw__input_3071"


def test_set_output_is_understood() -> None:
    features = ImageFeatures(**SMALL).set_output(transform="default").fit_transform(pictures(2))
    assert isinstance(features, np.ndarray)
    pytest.importorskip("pandas")
    frame = ImageFeatures(**SMALL).set_output(transform="pandas").fit_transform(pictures(2))
    assert list(frame.columns) == list(ImageFeatures(**SMALL).fit(pictures(1)).get_feature_names_out())


def test_features_and_their_names_need_no_fit() -> None:
    fresh = ImageFeatures(**SMALL)
    assert fresh.transform(pictures(2)).shape == (2, DIM)
    assert list(fresh.get_feature_names_out())[:2] == ["blocks.1_0", "blocks.1_1"]
    assert fresh.fit(pictures(1)).n_features_out_ == DIM


def test_threads_may_share_a_network() -> None:
    images = pictures(12)
    expected = ImageFeatures(**SMALL).transform(images)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: ImageFeatures(**SMALL).transform(images), range(4)))
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # by newer Pythons
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_a_process_forked_after_use_is_told_at_once(engine: str) -> None:
    images = pictures(2)
    features = ImageFeatures(**SMALL | {"engine": engine})
    features.transform(images)

    def use(answers: Any) -> None:
        for call in (features.transform, ImageFeatures(**TORCH | {"layer": "blocks.0"}).fit):
            try:
                answers.put(str(call(images)))
            except EngineError as error:
                answers.put(str(error))

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=use, args=(answers,))
    child.start()
    child.join(30)
    assert child.exitcode == 0, "it waits"
    for _ in range(2):
        assert "forked" in (told := answers.get())
        assert "spawn" in told
    assert features.transform(images).shape == (2, DIM), "the parent goes on"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_forked_before_use_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engines.engine._process", None)
    child = multiprocessing.get_context("fork").Process(target=claim_process)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    claim_process()


def test_tags_say_what_it_takes() -> None:
    tags = get_tags(ImageFeatures())
    assert not tags.requires_fit
    assert not tags.input_tags.two_d_array
    assert tags.input_tags.string
    assert tags.target_tags.required is False


def test_importing_and_making_one_loads_no_torch() -> None:
    code = "import sys; from pipeline.transformer import ImageFeatures; ImageFeatures(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


class OnMatrices(ImageFeatures):
    """Takes the matrices that scikit-learn's checks are made of: every row becomes a picture of one line."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = False  # or the checks would flatten their matrices
        return tags

    def fit(self, X: Any, y: object = None) -> OnMatrices:
        super().fit(self._pictures(X))
        return self

    def transform(self, X: Any) -> np.ndarray:
        return super().transform(self._pictures(X))

    def _pictures(self, X: Any) -> list[np.ndarray]:
        return [np.clip(np.asarray(row) * 20 + 128, 0, 255).astype(np.uint8).reshape(1, -1) for row in np.asarray(X)]


# Checks of the estimator's form, on the class itself. All others of scikit-learn's feed float matrices, which are not
# images; those of them that look at behaviour rather than at the validation of a matrix run on the subclass above.
# Left out are those that index columns of X, which paths do not have, and the ones about matrices alone: dtypes,
# sparse, complex, object, NaN, 1d, one feature, n_features_in_, feature names, sample weights and array API; and
# `check_fit_check_is_fitted`, since there is nothing to be fitted.
FORM = [
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_get_params_invariance",
    "check_set_params",
    "check_mixin_order",
    "check_n_features_in_after_fitting",
]
BEHAVIOUR = [
    "check_fit_score_takes_y",
    "check_estimators_overwrite_params",
    "check_dont_overwrite_parameters",
    "check_estimators_fit_returns_self",
    "check_readonly_memmap_input",
    "check_positive_only_tag_during_fit",
    "check_pipeline_consistency",
    "check_estimators_pickle",
    "check_f_contiguous_array_estimator",
    "check_transformer_data_not_an_array",
    "check_transformer_general",
    "check_transformers_unfitted_stateless",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
    "check_dict_unchanged",
    "check_fit_idempotent",
    "check_fit2d_1sample",
]


@pytest.mark.parametrize("check", FORM)
def test_scikit_learns_checks_of_the_form(check: str) -> None:
    getattr(estimator_checks, check)("ImageFeatures", ImageFeatures(**SMALL))


@pytest.mark.parametrize("check", BEHAVIOUR)
def test_scikit_learns_checks_of_the_behaviour(check: str) -> None:
    getattr(estimator_checks, check)("OnMatrices", OnMatrices(**TORCH | {"layer": "blocks.0"}))


def test_a_clone_is_as_good() -> None:
    fitted = ImageFeatures(**SMALL).fit(pictures())
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    np.testing.assert_array_equal(copy.transform(pictures()), fitted.transform(pictures()))


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("gone.jpg", None, "no such file"), ("empty.jpg", b"", "empty file"), ("text.png", b"hello", "not an image")],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=rf"item 2 \({re.escape(str(path))}\).*{reason}"):
        ImageFeatures(**SMALL).transform([*pictures(2), path])


def test_a_truncated_pillow_image_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(pictures(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with (
        Image.open(path) as image,
        pytest.raises(UnreadableImageError, match=r"item 1 cannot be used as an image: .*truncated"),
    ):
        ImageFeatures(**SMALL).transform([*pictures(1), image])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "not a single str: put it in a list"),
        (Path("photo.jpg"), "put it in a list"),
        (Image.new("RGB", (4, 4)), "put it in a list"),
        (np.zeros((3, 8)), r"item 0 is a float64 array of shape \(8,\)"),
        (np.zeros((8, 8, 3), np.uint8), r"shape \(8, 8, 3\) may be one colour image.*put it in a list"),
        (np.zeros((3, 8, 8, 4), np.uint8), r"item 0 is a uint8 array of shape \(8, 8, 4\)"),
        (np.zeros((3, 8, 8)), "item 0 is a float64 array"),
        ([np.zeros((0, 8, 3), np.uint8)], "item 0 is a uint8 array"),
        ([np.zeros((8, 8), np.uint8), None], "item 1 is a NoneType"),
        ([b"bytes"], "item 0 is a bytes"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "transform"])
def test_what_is_no_image_is_refused_by_fit_and_transform(images: Any, message: str, method: str) -> None:
    with pytest.raises(SourceError, match=message):
        getattr(ImageFeatures(**SMALL), method)(images)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"backbone": "efficientnet_lite00"}, BackboneError, "efficientnet_lite0"),
        ({"layer": "blocks.11"}, BackboneError, "no layer 'blocks.11'"),
        ({"pool": "average"}, BackboneError, "pooling 'average'"),
        ({"size": 0}, BackboneError, "size"),
        ({"precision": "fp8"}, EngineError, "fp8"),
        ({"engine": "jax"}, EngineError, "jax"),
        ({"device": "gpu"}, EngineError, "gpu"),
    ],
)
def test_fit_finds_a_wrong_parameter(parameters: dict[str, Any], error: type[ThawlineError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        ImageFeatures(**{**SMALL, **parameters}).fit(pictures(1))
    assert "\n" not in str(caught.value)
