"""The templates of pages, and what they share: one style sheet, escaped names, pictures as data URLs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

_HERE = Path(__file__).parent


def render_template(name: str, **values: Any) -> str:
    """Return the page that a template makes of `values`; it gets the style sheet, and names are escaped."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(style=text_of_file("report.css"), **values)


def text_of_file(name: str) -> str:
    """Return the text of a file beside the templates."""
    return (_HERE / name).read_text(encoding="utf-8")


def data_url(image: Image.Image) -> str:
    """Return a picture as a WebP data URL."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=72)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
