"""Tables with images inside: Parquet files, and the Arrow files that Hugging Face's ``save_to_disk`` writes."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.ahead import map_ahead
from pipeline.images.sources.held import Held
from pipeline.images.sources.items import (
    Item,
    Location,
    Packed,
    check_unchanged,
    read_part,
    split_in,
    stamp,
    unreadable,
)
from pipeline.images.sources.manifest import columns_by_meaning, split_of, synonyms_beside
from pipeline.images.sources.remote import LISTED_AT_ONCE, RemotePath, Stamp
from pipeline.tables import MESSAGE_LENGTH, text_of

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_LIMIT = 1 << 32
"""Most bytes of images in one row group or record batch."""

ROWS_A_BYTE = 1000
"""More rows than this for each byte of a file are none: a forged count must not take all memory."""

HELD_BYTES = 1 << 29
"""Bytes of row groups and record batches that are held."""


class _Columns(NamedTuple):
    """The columns of a table that are read, by their names; ``""`` for those that it has not.

    `image` holds the images; they are a field ``bytes`` of it if `inside`, beside a field ``path`` if `named`.
    `classes` are the names that numbers in `label` stand for.
    """

    image: str
    inside: bool
    named: bool
    label: str
    classes: tuple[str, ...]
    split: str
    group: str
    remarks: list[str]

    @property
    def bytes(self) -> str:
        """The column that holds the images, as Parquet names it."""
        return f"{self.image}.bytes" if self.inside else self.image

    @property
    def small(self) -> list[str]:
        """All other columns that are read, as Parquet names them."""
        return [*filter(None, (self.label, self.split, self.group)), *[f"{self.image}.path"] * self.named]


class _Listed(NamedTuple):
    """A table's columns and rows: names of images, labels, splits and groups, and what reads the rows of each chunk."""

    columns: _Columns
    rows: list[tuple[str, str, str, str]]
    chunks: Sequence[tuple[int, Callable[[], Any]]]


def holds_images(path: Location) -> bool:
    """Tell whether a Parquet file has images inside, rather than paths to images."""
    try:
        with _reading(path):
            import pyarrow.parquet as pq

            schema = pq.read_schema(_file(path))
            return "path" not in columns_by_meaning(path, schema.names) and _images_in(schema) != []
    except SourceError:
        return False  # who reads it as a manifest says why


def read_parquet(files: Mapping[str, Location], packed: Packed) -> Iterator[tuple[Item, str]]:
    """Yield the images in Parquet files, see `_read_tables`."""
    return _read_tables(files, packed, _list_parquet)


def read_arrow(files: Mapping[str, Location], packed: Packed) -> Iterator[tuple[Item, str]]:
    """Yield the images in files of Arrow's streaming format, see `_read_tables`."""
    return _read_tables(files, packed, _list_arrow)


def _read_tables(
    files: Mapping[str, Location], packed: Packed, list_file: Callable[[Location], _Listed]
) -> Iterator[tuple[Item, str]]:
    """Yield the images in tables with their classes: an image a row.

    They are in a column that Hugging Face's metadata calls an image, or of structs with a field ``bytes``, or of bytes.
    The label is in the column ``label``, or in the one of class labels; numbers become class names where the
    metadata have them. Uris are ``file/row``, or ``file/row/name`` where the table has names of images.

    Raises
    ------
    SourceError
        A file is no table, has no images, a label is neither text nor a number, or pyarrow is not installed.
    """
    held = Held[Any](HELD_BYTES)
    for uri, table in zip(files, map_ahead(list_file, files.values(), LISTED_AT_ONCE, LISTED_AT_ONCE), strict=True):
        listed, named_split = stamp(files[uri]), split_in(uri)
        packed.remarks = packed.remarks or table.columns.remarks
        for number, (name, label, split, group) in enumerate(table.rows):
            where = f"{uri}/{number:07d}" + f"/{name}" * bool(name)
            item = Item(where, split=split or named_split, group=group, **listed._asdict())
            yield item, label
        ends = [*accumulate(count for count, _ in table.chunks)]
        packed.readers[uri] = partial(_read, held, ends, [read for _, read in table.chunks])


def _read(held: Held[Any], ends: Sequence[int], reads: Sequence[Callable[[], Any]], member: str, _: int) -> bytes:
    """Return the image of the row whose number `member` begins with, from the chunk that holds it."""
    number = int(member.partition("/")[0])
    which = bisect_right(ends, number)
    read, index = reads[which], number - (ends[which - 1] if which else 0)
    chunk = held.get(read, read)
    if index >= len(chunk):
        raise UnreadableImageError("no image in its row")
    return bytes(chunk[index].as_py() or b"")  # decoding says that it is empty


def _list_parquet(path: Location) -> _Listed:
    listed = stamp(path)
    with _reading(path):
        import pyarrow.parquet as pq

        with pq.ParquetFile(_file(path)) as file:
            columns = _columns(path, file.schema_arrow)
            metadata = file.metadata
            table = file.read(columns=columns.small, use_threads=False)
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        count, most = metadata.num_rows, ROWS_A_BYTE * (listed.size if listed.size > 0 else 1 << 30)
        if min(counts, default=0) < 0 or sum(counts) != count or table.num_rows != count or count > most:
            raise SourceError(f"{path}: expected a table, found row groups of {sum(counts)} rows for {count}")
        reading = [partial(_read_group, path, listed, metadata, group, columns) for group in range(len(counts))]
        return _Listed(columns, _rows(path, columns, table, count), list(zip(counts, reading, strict=True)))


def _read_group(path: Location, listed: Stamp, metadata: Any, group: int, columns: _Columns) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_unchanged(path, listed)
    with unreadable("shard"):
        parts = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema == columns.bytes)
        if size > CHUNK_LIMIT:
            raise UnreadableImageError(f"in a row group of {size} bytes, more than {CHUNK_LIMIT}")
        try:
            file = pq.ParquetFile(_file(path), metadata=metadata)
            column = file.read_row_group(group, columns=[columns.bytes], use_threads=False).column(0)
            return column.flatten()[0] if columns.inside else column
        except pa.ArrowException as error:
            raise UnreadableImageError(f"damaged row group: {shorten(str(error), MESSAGE_LENGTH)}") from None


def _list_arrow(path: Location) -> _Listed:
    listed = stamp(path)
    rows: list[tuple[str, str, str, str]] = []
    chunks: list[tuple[int, Callable[[], Any]]] = []
    with _reading(path):
        import pyarrow as pa

        source = pa.memory_map(str(path)) if isinstance(path, Path) else pa.PythonFile(path.open(), mode="r")
        with source, pa.ipc.open_stream(source) as stream:
            columns = _columns(path, stream.schema)
            if any(pa.types.is_dictionary(one) for one in stream.schema.types):
                raise SourceError(f"{path}: expected a table without dictionaries: write it as Parquet")
            start = source.tell()
            for batch in stream:
                batch.validate(full=True)
                stop = source.tell()
                rows += _rows(path, columns, pa.Table.from_batches([batch]), batch.num_rows)
                part = partial(_read_batch, path, start, stop - start, listed, stream.schema, columns)
                chunks.append((batch.num_rows, part))
                start = stop
    return _Listed(columns, rows, chunks)


def _read_batch(path: Location, start: int, size: int, listed: Stamp, schema: pa.Schema, columns: _Columns) -> pa.Array:
    import pyarrow as pa

    data = read_part(path, start, size, listed)
    try:
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(data), schema)
        batch.validate(full=True)
    except (pa.ArrowException, EOFError, OSError) as error:
        raise UnreadableImageError(f"damaged record batch: {shorten(str(error), MESSAGE_LENGTH)}") from None
    column = batch.column(columns.image)
    return column.flatten()[column.type.get_field_index("bytes")] if columns.inside else column


@contextmanager
def _reading(path: Location) -> Iterator[None]:
    """Turn the errors of reading a table, and the lack of pyarrow, into one line."""
    try:
        import pyarrow as pa  # late: an optional dependency
    except ImportError:
        raise SourceError(f"{path}: reading Parquet and Arrow needs pyarrow: pip install 'thawline[parquet]'") from None
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: expected a table: {shorten(str(error), MESSAGE_LENGTH)}") from None


def _file(path: Location) -> Any:
    return path.open() if isinstance(path, RemotePath) else str(path)


def _columns(path: Location, schema: pa.Schema) -> _Columns:
    images, features, names = _images_in(schema), _features(schema), columns_by_meaning(path, schema.names)
    if not images:
        found = shorten(", ".join(schema.names), MESSAGE_LENGTH)
        raise SourceError(f"{path}: expected a column that holds images, found {found}")
    image, inside = next((one for one in images if one[0] == "image"), images[0])
    if schema.names.count(image) > 1:
        raise SourceError(f"{path}: expected one column '{image}', found {schema.names.count(image)}")
    numbered = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(numbered) == 1:
        names.setdefault("label", numbered[0])
    classes = features.get(names.get("label", ""), {}).get("names")
    several = f"{len(images)} columns hold images; '{image}' is read"
    return _Columns(
        image,
        inside,
        inside and _holds(schema.field(image).type, "path", "string", "large_string"),
        names.get("label", ""),
        tuple(map(str, classes)) if isinstance(classes, list) else (),
        names.get("split", ""),
        names.get("group", ""),
        [*[several] * (len(images) > 1), *synonyms_beside(path, [*schema.names, *names])],
    )


def _images_in(schema: pa.Schema) -> list[tuple[str, bool]]:
    """Return the columns that hold images, and whether in a field ``bytes``: those of the best kind that there is."""
    structs = [(one.name, True) for one in schema if _holds(one.type, "bytes", "binary", "large_binary")]
    plain = [(one.name, False) for one in schema if str(one.type) in ("binary", "large_binary")]
    features = _features(schema)
    called = [one for one in (*structs, *plain) if features.get(one[0], {}).get("_type") == "Image"]
    return called or structs or plain


def _holds(struct: pa.DataType, name: str, *kinds: str) -> bool:
    """Tell whether a type is of structs with a field of this name that is of one of these types."""
    index = struct.get_field_index(name) if hasattr(struct, "get_field_index") else -1
    return index >= 0 and str(struct.field(index).type) in kinds


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face's metadata say of each column."""
    with suppress(KeyError, TypeError, ValueError, RecursionError, AttributeError):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    return {}


def _rows(path: Location, columns: _Columns, table: pa.Table, count: int) -> list[tuple[str, str, str, str]]:
    """Return the name, label, split and group of each row."""

    def texts(column: str, convert: Callable[[Any], str] = text_of) -> Sequence[str]:
        if not column:
            return [""] * count
        found = table.column(column).to_pylist()
        for value in found:
            if value is not None and not isinstance(value, int | float | str):
                kind = type(value).__name__
                raise SourceError(f"{path}: expected numbers or text in column {column!r}, found {kind}")
        return [convert(value).strip() for value in found]

    def class_name(value: Any) -> str:
        if not columns.classes or not isinstance(value, int) or value == -1:
            return "" if columns.classes and value == -1 else text_of(value)
        if not 0 <= value < len(columns.classes):
            raise SourceError(f"{path}: expected labels from 0 to below {len(columns.classes)}, found {value}")
        return columns.classes[value]

    names: Sequence[str] = [""] * count
    if columns.named:
        images = table.column(columns.image)
        paths = images.flatten()[images.type.get_field_index("path")].to_pylist()
        names = [(name or "").replace("\\", "/").rpartition("/")[2] for name in paths]
    splits = [split_of(path, number, word) for number, word in enumerate(texts(columns.split), start=1)]
    return list(zip(names, texts(columns.label, class_name), splits, texts(columns.group), strict=True))
