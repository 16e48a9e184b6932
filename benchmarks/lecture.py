"""Write the results of `thawline lecture all -o FOLDER` into docs/lecture.md, with a picture of each chart beside it.

python benchmarks/lecture.py FOLDER
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from pipeline.comparing.answer import duration
from pipeline.lecture import CLAIMS
from pipeline.reporting.terminal.tables import interval_text, number_text
from pipeline.results import LectureResult, from_json

DOCS = Path(__file__).parents[1] / "docs"
STYLE = Path(__file__).parents[1] / "pipeline" / "reporting" / "page" / "report.css"
MARK = "<!-- written by benchmarks/lecture.py -->\n"


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Replace what stands between the marks of docs/lecture.md."""
    parts = [part for name in CLAIMS if (folder / f"{name}.json").exists() for part in section(folder, name)]
    page = DOCS / "lecture.md"
    before, _, after = page.read_text(encoding="utf-8").split(MARK)
    page.write_text(before + MARK + "\n" + "\n".join(parts) + "\n" + MARK + after, encoding="utf-8")


def section(folder: Path, name: str) -> list[str]:
    """Return the lines of one claim, and write its pictures."""
    kept = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    result = from_json(LectureResult, kept, name)
    lines = [f"### {name.capitalize()}", "", result.statement, ""]
    lines += ["| figure | measured | 95 % interval | verdict | published |", "|---|---|---|---|---|"]
    for one in result.figures:
        published = one.published + (f" ({one.origin})" if one.origin else "")
        lines.append(f"| {one.name} | {number_text(one.value)} | {interval_text(one)} | {one.verdict} | {published} |")
    for number, chart in enumerate(kept["charts"]):
        picture = DOCS / f"lecture-{name}{number or ''}.svg"
        picture.write_text(standalone(chart["svg"]), encoding="utf-8")
        lines += ["", f"![{chart['title']}]({picture.name})", "", chart["caption"]]
    lines += ["", *result.notes, "", f"{result.source}, {duration(result.seconds)} on {result.machine}.", ""]
    return lines


def standalone(svg: str) -> str:
    """Return a chart of the page as a file of its own, in the page's colours by day."""
    colours = dict(re.findall(r"(--[\w-]+): (#\w+)", STYLE.read_text(encoding="utf-8").partition("@media")[0]))
    svg = re.sub(r"var\((--[\w-]+)\)", lambda match: colours[match[1]], svg)
    opening = '<svg xmlns="http://www.w3.org/2000/svg" style="background: white" font-family="sans-serif" '
    return svg.replace("<svg ", opening, 1)


if __name__ == "__main__":
    main()
