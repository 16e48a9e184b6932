"""Pages of which everything is in one file: template, style, script and pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image


def render_page(name: str, **values: Any) -> str:
    """Return the page of ``NAME.html.j2``, with ``NAME.js`` if there is one; all pages share ``report.css``."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = here / f"{name}.js"
    return environment.get_template(f"{name}.html.j2").render(
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=script.read_text(encoding="utf-8") if script.exists() else "",
        **values,
    )


def data_url(image: Image.Image) -> str:
    """Return a picture as a WebP data URL."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=72)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
