"""Our folder among the user's cache folders, for what can be made anew."""

from __future__ import annotations

from pathlib import Path


def user_folder(part: str) -> Path:
    """Return a folder of ours, which may not exist yet; raises `RuntimeError` where there is no place for it."""
    try:
        from platformdirs import user_cache_path  # late, since a checkout may lack it
    except ImportError as error:
        raise RuntimeError("platformdirs is not installed") from error
    path = user_cache_path("thawline") / part
    if not path.is_absolute():  # what older versions of platformdirs return
        raise RuntimeError("no home directory; set XDG_CACHE_HOME")
    return path
