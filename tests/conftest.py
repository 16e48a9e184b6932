from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_photos(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of class folders: noisy pictures whose colour tells the class."""

    def make(classes: tuple[str, ...] = ("blue", "green", "red"), each: int = 8, name: str = "photos") -> Path:
        generator = np.random.default_rng(7)
        root = tmp_path / name
        for number, class_name in enumerate(classes):
            (root / class_name).mkdir(parents=True)
            for index in range(each):
                pixels = generator.integers(0, 120, (40, 48, 3))
                pixels[..., number % 3] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(root / class_name / f"{index}.png")
        return root

    return make
