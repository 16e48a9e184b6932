"""That a step of the GPU check which fails, crashes or hangs leaves the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STEPS = f"""
import json, os, sys, time
from functools import partial
from pathlib import Path

sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu

def works(setting, value):
    yield gpu.Line("works", value, "images/s", right=True)

def fails(setting, value):
    yield gpu.Line("before", value, "s")
    raise ValueError("no such kernel")

def crashes(setting):
    yield gpu.Line("before", 1.0, "s")
    os.abort()

def hangs(setting):
    yield gpu.Line("before", 2.0, "s")
    time.sleep(60)

gpu.STEPS = {{
    "1": gpu.Step(
        60, lambda setting: [partial(works, setting, 1.0), partial(fails, setting, 2.0), partial(works, setting, 3.0)]
    ),
    "2": gpu.Step(60, lambda setting: [partial(crashes, setting)]),
    "3": gpu.Step(60, lambda setting: [partial(hangs, setting)]),
}}
setting = gpu.Setting(Path(), "cpu")
lines = []
for step, seconds in (("1", None), ("2", None), ("3", 8)):
    lines += gpu.run_step(step, setting, seconds)
lines.append(gpu.run_step("3", setting, 0)[-1])  # a line may come before it is ended
gpu.table_of(lines)
print(json.dumps(lines))
"""


def test_what_fails_leaves_the_rest() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], check=True, capture_output=True, text=True, timeout=120)
    lines = json.loads(done.stdout.splitlines()[-1])
    told = [(line["step"], line["what"], line["value"], line["right"]) for line in lines]
    assert told == [
        ("1", "works", 1.0, True),
        ("1", "before", 2.0, None),
        ("1", "fails 2.0", None, False),
        ("1", "works", 3.0, True),
        ("2", "before", 1.0, None),
        ("2", "2", None, False),
        ("3", "before", 2.0, None),
        ("3", "3", None, False),
        ("3", "3", None, False),
    ]
    assert lines[2]["note"] == "ValueError: no such kernel"
    assert "in fails" in lines[2]["traceback"]
    assert "ended with -6" in lines[5]["note"]
    assert "not finished within 8 s" in lines[7]["note"]
