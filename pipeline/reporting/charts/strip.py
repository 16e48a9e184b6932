"""A row of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from PIL.Image import Image

from pipeline.reporting.charts.style import INK


def image_strip(axes: Sequence[Axes], images: Sequence[Image], titles: Sequence[str]) -> None:
    """Show one image on each of `axes` under its title; axes left over stay empty."""
    for place in axes:
        place.axis("off")
    for place, image, title in zip(axes, images, titles, strict=False):
        place.imshow(np.asarray(image), cmap="gray")
        place.set_title(title, fontsize=9, color=INK)
