"""Which kept results still hold: the one place where keys of kept results are made.

Two kinds of things are kept and looked up. A cache file answers an extraction by what was asked (`spec.Request`) and
by the fingerprint of what that resolved to (`spec.LayerSpec`, `DECODE_POLICY` included). Everything else that is kept
(results of a comparison, checkpoints, converted models) is found by the `stage_key` made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pipeline.provenance import installed_version
from pipeline.spec import DECODE_POLICY, NEAR_RULES, PRETEXT_RULES, TRAINING_RULES, fingerprint_of


@dataclass(frozen=True)
class Code:
    """The code that a stage's results depend on.

    Parameters
    ----------
    rules : tuple of int
        Versions of our own rules, raised by hand whenever a stage would compute something else from the same inputs.
    libraries : tuple of str
        Distributions whose installed version counts.
    """

    rules: tuple[int, ...]
    libraries: tuple[str, ...]


_NETWORKS = ("torch", "torchvision", "timm")
"""The libraries whose code a network runs."""

STAGES = {
    "head": Code((TRAINING_RULES,), ("thawline", "scikit-learn")),
    "finetune": Code((TRAINING_RULES,), ("thawline", "scikit-learn", *_NETWORKS)),
    "checkpoint": Code((TRAINING_RULES, DECODE_POLICY), ("thawline", *_NETWORKS)),
    "pretext checkpoint": Code((TRAINING_RULES, DECODE_POLICY, PRETEXT_RULES), ("thawline", *_NETWORKS)),
    "near threshold": Code((DECODE_POLICY, NEAR_RULES), ("thawline",)),
    "index": Code((), ("thawline", "faiss-cpu")),
    "converted model": Code((), ("thawline", *_NETWORKS, "openvino")),
}
"""The code that counts, by stage. Raise a rule in `pipeline.spec` in the commit that changes the numbers."""


def stage_key(stage: str, **inputs: Any) -> str:
    """Return the key under which the result of a stage is kept: it changes with the inputs and with the code.

    Parameters
    ----------
    stage : str
        One of `STAGES`.
    **inputs
        All that the result depends on, as JSON-ready values.

    Returns
    -------
    str
        32 hex characters.
    """
    return fingerprint_of({"kind": stage, "rules": _code(stage), **inputs})


@cache
def _code(stage: str) -> list[Any]:
    code = STAGES[stage]
    return [*code.rules, *map(installed_version, code.libraries)]
