from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.backbones.pooling import POOLINGS, TOKEN_POOLINGS, Layout, Pool, TokenOrder, layout_of, pooled_dim
from pipeline.errors import BackboneError
from pipeline.spec import POOLS


def grid_means(maps: np.ndarray) -> np.ndarray:
    """2 x 2 means whose windows cover an odd side's middle twice, channel by channel."""
    side = maps.shape[-1]
    low, high = slice(0, -(-side // 2)), slice(side // 2, side)
    cells = [maps[:, :, rows, columns].mean((2, 3)) for rows in (low, high) for columns in (low, high)]
    return np.stack(cells, axis=2).reshape(len(maps), -1)


MAP = Layout("map")
ORACLES = {
    "avg": lambda maps: maps.mean((2, 3)),
    "max": lambda maps: maps.max((2, 3)),
    "avg+max": lambda maps: np.concatenate([maps.mean((2, 3)), maps.max((2, 3))], axis=1),
    "gem": lambda maps: np.cbrt((np.maximum(maps, 1e-6) ** 3).mean((2, 3))),
    "grid2": grid_means,
    "flatten": lambda maps: maps.reshape(len(maps), -1),
    "none": lambda maps: maps.reshape(len(maps), -1),
}
MAPS = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 8)).flatmap(
    lambda size: arrays(np.float32, (size[0], size[1], size[2], size[2]), elements=st.floats(-8, 8, width=32))
)


def test_the_names_known_without_torch_are_those_of_the_table() -> None:
    assert {*POOLINGS, *TOKEN_POOLINGS} == set(POOLS)


@pytest.mark.parametrize("pool", POOLINGS)
@settings(max_examples=25, deadline=None)
@given(maps=MAPS)
def test_pooling_of_maps_equals_numpy(pool: str, maps: np.ndarray) -> None:
    features = Pool(pool, MAP)(torch.from_numpy(maps))
    assert features.dtype == torch.float32
    assert features.shape[1] == pooled_dim(maps.shape[1:], MAP, pool)
    np.testing.assert_allclose(features, ORACLES[pool](maps.astype(np.float64)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", POOLINGS)
def test_memory_order_and_channels_last_shapes_change_nothing(pool: str) -> None:
    maps = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    plain = Pool(pool, MAP)(maps)
    assert torch.allclose(Pool(pool, MAP)(maps.contiguous(memory_format=torch.channels_last)), plain, atol=1e-6)
    assert torch.allclose(Pool(pool, Layout("map_last"))(maps.permute(0, 2, 3, 1).contiguous()), plain, atol=1e-6)
    assert pooled_dim((5, 5, 6), Layout("map_last"), pool) == plain.shape[1]


@pytest.mark.parametrize("pool", POOLS)
def test_vectors_pass(pool: str) -> None:
    vectors = torch.randn(2, 3)
    assert torch.equal(Pool(pool, Layout("vector"))(vectors), vectors)
    assert pooled_dim((3,), Layout("vector"), pool) == 3


@pytest.mark.parametrize("pool", [pool for pool in POOLINGS if pool != "none"])
@given(maps=MAPS, prefix=st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_patch_tokens_are_pooled_like_the_map_they_were_cut_from(pool: str, maps: np.ndarray, prefix: int) -> None:
    n, d, side, _ = maps.shape
    patches = torch.from_numpy(maps).flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.full((n, prefix, d), 1e6), patches], 1)
    layout = Layout("tokens", TokenOrder(prefix), side)
    assert torch.allclose(Pool(pool, layout)(tokens), Pool(pool, MAP)(torch.from_numpy(maps)), atol=1e-6)


def test_the_class_token_is_the_first_of_the_prefix() -> None:
    tokens = torch.randn(2, 5 + 9, 4)
    layout = layout_of((14, 4), TokenOrder(5, has_class=True))
    assert layout == Layout("tokens", TokenOrder(5, has_class=True), 3)
    assert torch.equal(Pool("cls", layout)(tokens), tokens[:, 0])
    joined = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
    assert torch.allclose(Pool("cls+avg", layout)(tokens), joined)
    assert pooled_dim((14, 4), layout, "cls+avg") == 8


def test_half_precision_is_accumulated_in_float32() -> None:
    maps = torch.ones(1, 1, 128, 128, dtype=torch.bfloat16)
    maps[..., 0, 0] = 129.0  # a bfloat16 sum would have lost it
    with torch.autocast("cpu", torch.bfloat16):
        for pool in ("avg", "avg+max"):
            assert Pool(pool, MAP)(maps)[0, 0].item() == pytest.approx(1 + 128 / 128**2, rel=1e-6)
        for pool in POOLINGS:
            assert Pool(pool, MAP)(maps).dtype == torch.float32


CLASS_FIRST = TokenOrder(1, has_class=True)


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (pool, shape)
        for pool in POOLS
        for shape in [(3, 1, 1), (3, 4, 4), (3,), (5, 3)]
        if pool in POOLINGS or len(shape) < 3
    ],
)
def test_features_are_memory_of_their_own(pool: str, shape: tuple[int, ...]) -> None:
    activations = torch.ones(2, *shape)
    layout = layout_of(shape, CLASS_FIRST)
    assert layout is not None
    features = Pool(pool, layout)(activations)
    before = features.clone()
    activations.fill_(7)
    assert torch.equal(features, before)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((10,), "vector"),
        ((197, 768), "tokens"),
        ((64, 7, 7), "map"),
        ((7, 7, 64), "map_last"),
        ((3, 5, 7), None),
        ((2, 3, 4, 4), None),
        ((), None),
    ],
)
def test_shapes_are_read_by_their_equal_sides(shape: tuple[int, ...], layout: str | None) -> None:
    found = layout_of(shape)
    assert (found and found.kind) == layout


@pytest.mark.parametrize(
    ("tokens", "prefix", "side"), [(197, 1, 14), (196, 0, 14), (9, 5, 2), (1, 0, 0), (785, 1, 28), (200, 0, 0)]
)
def test_a_sequence_has_the_prefix_if_its_other_tokens_fill_a_square(tokens: int, prefix: int, side: int) -> None:
    found = layout_of((tokens, 3), TokenOrder(5 if prefix == 5 else 1))
    assert found is not None
    assert (found.order.prefix, found.rows) == (prefix, side)


def test_an_unknown_pooling_names_the_nearest() -> None:
    with pytest.raises(BackboneError, match=r"unknown pooling 'grid'; did you mean grid2\?; expected one of avg, max"):
        Pool("grid", MAP)
