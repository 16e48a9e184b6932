"""The on-disk store of features: one HDF5 file per source and backbone that survives kills and opens anywhere.

``X, y = open_cache("photos-resnet50-0a1b2c3d.h5").xy("penultimate", "train")`` reads one; FORMAT.md describes it.
"""

from features_cache.catalog import Catalog, file_name
from features_cache.convert import digest_keys
from features_cache.errors import (
    AmbiguousCacheError,
    CacheError,
    CacheLockedError,
    DamagedCacheError,
    ThawlineError,
    nearest,
)
from features_cache.export import export
from features_cache.grow import Donors, grow, same_rows
from features_cache.layout import DONE, PENDING, UNREADABLE, LayerInfo, Rows
from features_cache.prune import drop_redundant, prune, superseded
from features_cache.reader import CacheFile, open_cache
from features_cache.verify import Report, repair, verify
from features_cache.writer import CacheWriter

__all__ = [
    "DONE",
    "PENDING",
    "UNREADABLE",
    "AmbiguousCacheError",
    "CacheError",
    "CacheFile",
    "CacheLockedError",
    "CacheWriter",
    "Catalog",
    "DamagedCacheError",
    "Donors",
    "LayerInfo",
    "Report",
    "Rows",
    "ThawlineError",
    "digest_keys",
    "drop_redundant",
    "export",
    "file_name",
    "grow",
    "nearest",
    "open_cache",
    "prune",
    "repair",
    "same_rows",
    "superseded",
    "verify",
]
