"""The array `/runs`: provenance of each run, in a ring of fixed-length records."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from features_cache.convert import parse_json
from features_cache.layout import RUN_BYTES


def encode_run(record: Mapping[str, Any]) -> bytes:
    """Return the record as a line of JSON and a line with its CRC-32; the longest texts are cut until it fits."""
    fields = dict(record)
    while len(text := json.dumps(fields).encode()) > RUN_BYTES - 10:
        longest = max((key for key in fields if key != "run"), key=lambda key: len(json.dumps(fields[key])))
        value = fields[longest] if isinstance(fields[longest], str) else json.dumps(fields[longest])
        if len(value) < 32:
            del fields[longest]
        else:
            fields[longest] = value[: len(value) // 2] + "…"
    return text + f"\n{zlib.crc32(text):08x}".encode()


def decode_run(raw: bytes) -> dict[str, Any] | None:
    """Return the record, or ``None`` if its checksum or form is wrong."""
    text, _, crc = raw.partition(b"\n")
    if crc != f"{zlib.crc32(text):08x}".encode():
        return None
    try:
        record = parse_json(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("run")) is int else None


def decode_runs(slots: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the undamaged records of the used slots, oldest first."""
    records = [decode_run(raw) for raw in slots if raw]
    return sorted((record for record in records if record is not None), key=lambda record: record["run"])
