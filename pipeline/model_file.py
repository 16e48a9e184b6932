"""What all saved models share: a description in JSON that is checked when it is read, and files written all or nothing.

`pipeline.heads.saved` keeps the description in a skops archive, `pipeline.backbones.network_file` in the header of a
safetensors file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from features_cache import atomic_write, nearest_beside
from pipeline.errors import ModelFileError, first_line
from pipeline.options import CLASSIFICATION, MULTILABEL, TASKS
from pipeline.provenance import installed_version
from pipeline.spec import canonical_json


@dataclass(frozen=True)
class ModelFormat:
    """One kind of saved model, and what its description holds.

    Parameters
    ----------
    name : str
        What the description calls its format.
    version : int
        Version of the format; files of other versions are refused.
    fields : mapping of str to type
        The entries of the description besides ``format``, ``version`` and ``digest``, with their types.
    libraries : sequence of str
        The distributions whose versions are saved with the model, in the field ``versions``.
    remedy : str
        What to do about a file that cannot be used, such as ``"fit and save it again"``.
    defaults : mapping of str to object, optional
        Values of fields that older files do not have.
    """

    name: str
    version: int
    fields: Mapping[str, Any]
    libraries: Sequence[str]
    remedy: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def versions(self) -> dict[str, str]:
        """Return the installed versions of the libraries that a saved model depends on."""
        return {name: installed_version(name) for name in self.libraries}

    def describe(self, fields: Mapping[str, Any], content: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """Return the description to save: `fields` with the current versions, and a digest of it and of the content."""
        description = {"format": self.name, "version": self.version, **fields, "versions": self.versions()}
        return description | {"digest": self.digest(description, content)}

    def digest(self, description: Mapping[str, Any], content: Iterable[bytes | memoryview]) -> str:
        """Return the blake2b-128 hex digest of a description, without its own digest, and of the rest of the file."""
        rest = {key: value for key, value in description.items() if key != "digest"}
        digest = hashlib.blake2b(canonical_json(rest).encode(), digest_size=16)
        for part in content:
            digest.update(part)
        return digest.hexdigest()

    def check(self, path: Path, description: Any) -> dict[str, Any]:
        """Return the description read from `path`; raise `ModelFileError` if its format or version is another."""
        if not isinstance(description, dict) or description.get("format") != self.name:
            raise ModelFileError(f"{path} is no model of thawline; expected a saved head or a fine-tuned network")
        if description.get("version") != self.version:
            raise ModelFileError(
                f"{path} has {self.name} format {description.get('version')}, expected {self.version}; {self.remedy}"
            )
        return description

    def check_digest(self, path: Path, description: Mapping[str, Any], content: Iterable[bytes | memoryview]) -> None:
        """Raise `ModelFileError` if the file's description or content is not what was saved."""
        if description.get("digest") != self.digest(description, content):
            raise ModelFileError(f"{path} was changed after it was saved (digests differ); {self.remedy}")

    def read_fields(self, path: Path, description: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a description, or raise `ModelFileError` if one is missing or impossible."""
        description = {**self.defaults, **description}
        wrong = [name for name, kind in self.fields.items() if not isinstance(description.get(name, ...), kind)]
        temperature = description.get("temperature")
        if isinstance(temperature, float) and not 0 < temperature < float("inf"):
            wrong.append("temperature")
        classes = description.get("classes")
        if isinstance(classes, list) and not all(isinstance(name, str) for name in classes):
            wrong.append("classes")
        if wrong:
            raise self.lacks(path, *dict.fromkeys(wrong))
        return {name: description[name] for name in self.fields}

    def lacks(self, path: Path, *names: str) -> ModelFileError:
        """Return the error that says which fields of the description are missing or make no sense."""
        return ModelFileError(f"{path} does not say its {', '.join(names)}; {self.remedy}")


TASK_DEFAULTS: dict[str, Any] = {"task": CLASSIFICATION, "thresholds": None}
"""What models predict that were saved before there were other tasks."""


def fits_task(fields: Mapping[str, Any]) -> bool:
    """Tell whether a model's task is one of `pipeline.options.TASKS`, and each of several labels has a threshold."""
    told = fields["thresholds"]
    if fields["task"] != MULTILABEL:
        return fields["task"] in TASKS and told is None
    return isinstance(told, list) and len(told) == len(fields["classes"]) and all(type(one) is float for one in told)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever reading `path` raises into a one-line `ModelFileError`."""
    try:
        yield
    except ModelFileError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelFileError(f"cannot read the model {path}: {reason}{nearest_beside(path)}") from error
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        raise ModelFileError(f"{path} is damaged or no model file: {named(error)}") from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file replaces `path` when the block ends, and an error leaves `path` as it was.

    Raises
    ------
    ModelFileError
        If the file cannot be written.
    """
    try:
        with atomic_write(path) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"cannot write the model {path}: {getattr(error, 'strerror', None) or error}") from error


def named(error: Exception) -> str:
    """Return another library's error in one line, with its type."""
    return f"{type(error).__name__}: {first_line(error)}"


def check_destination(path: str | Path, ending: str) -> Path:
    """Return `path` if a file can be written there; called before the work that would be lost.

    Raises
    ------
    ModelFileError
        If its name does not end in `ending`, it is there and no file, or its own folder does not exist or is not
        writable.
    """
    path = Path(path)
    if path.suffix.lower() != ending:
        raise ModelFileError(
            f"cannot write {path}: expected a name that ends in {ending}, such as {path.with_suffix(ending).name}"
        )
    if path.exists() and not path.is_file():
        kind = "a folder; name a file in it" if path.is_dir() else "no regular file; use another name"
        raise ModelFileError(f"cannot write a file to {path}, which is {kind}")
    if not path.parent.is_dir():
        raise ModelFileError(f"cannot write {path.name}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ModelFileError(f"cannot write {path.name}: the folder {path.parent} is read-only; use another folder")
    return path
