"""The feature store: one HDF5 file per source and backbone, safe against kills, readable by any HDF5 tool.

``X, y = open_cache("photos-resnet50-0a1b2c3d.h5").xy("penultimate", "train")`` reads one; FORMAT.md describes it.
"""

from features_cache.atomic import atomic_write, scratch_folder
from features_cache.catalog import Catalog, check_twins, file_name, is_superseded, same_listing, superseded_files
from features_cache.convert import as_float32, digest_keys, parse_json
from features_cache.errors import (
    AmbiguousCacheError,
    CacheError,
    CacheLockedError,
    DamagedCacheError,
    ThawlineError,
    explained,
    nearest,
    nearest_beside,
)
from features_cache.export import export_features
from features_cache.grow import Donors, grow, same_rows
from features_cache.layout import DONE, PENDING, TEXT, UNREADABLE, LayerInfo, Rows
from features_cache.lock import WriterLock
from features_cache.parted import PartedCache, open_part
from features_cache.parts import (
    PLAN_SUFFIX,
    Part,
    PartPlan,
    UriRange,
    divide,
    is_try,
    open_plan,
    plan_of,
    published_path,
)
from features_cache.prune import drop_redundant, prune, superseded
from features_cache.publish import etag_of, register_store, store_of
from features_cache.reader import CacheFile, open_cache
from features_cache.rowfile import open_own
from features_cache.tries import begin_try, drop_tries, publish_try, tries_of
from features_cache.verify import VerifyReport, repair, verify
from features_cache.writer import CacheWriter

__all__ = [
    "DONE",
    "PENDING",
    "PLAN_SUFFIX",
    "TEXT",
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
    "Part",
    "PartPlan",
    "PartedCache",
    "Rows",
    "ThawlineError",
    "UriRange",
    "VerifyReport",
    "WriterLock",
    "as_float32",
    "atomic_write",
    "begin_try",
    "check_twins",
    "digest_keys",
    "divide",
    "drop_redundant",
    "drop_tries",
    "etag_of",
    "explained",
    "export_features",
    "file_name",
    "grow",
    "is_superseded",
    "is_try",
    "nearest",
    "nearest_beside",
    "open_cache",
    "open_own",
    "open_part",
    "open_plan",
    "parse_json",
    "plan_of",
    "prune",
    "publish_try",
    "published_path",
    "register_store",
    "repair",
    "same_listing",
    "same_rows",
    "scratch_folder",
    "store_of",
    "superseded",
    "superseded_files",
    "tries_of",
    "verify",
]
