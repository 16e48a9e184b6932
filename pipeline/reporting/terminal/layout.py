"""How a table takes the width of a terminal: narrower columns, then fewer, or its rows as lists."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table

from pipeline.reporting.terminal.tables import facts_table

GAP = 2
"""Blanks between columns."""
NAME = 16
"""Letters that a column of long names keeps at least: a path may be cut there, a number never."""
LESSER = ("seconds", "train/val/test", "per class", "log-loss")
"""Columns that give way, in this order, where results stand below each other to be compared."""


def lay_out(shown: RenderableType, width: int) -> RenderableType:
    """Return a table, or each table of a group, so that it fits into `width` letters.

    Headings are wrapped first, then cells between words, then names are cut, then `LESSER` columns are left out. A
    table that is still too wide, or that has one row, becomes a list of heading and cell.
    """
    if isinstance(shown, Group):
        return Group(*(lay_out(part, width) for part in shown.renderables))
    if not isinstance(shown, Table) or not (shown.rows and shown.show_header):
        return shown
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in shown.columns}
    if _room(columns, width) >= sum(map(_longest, columns, columns.values())):
        return shown
    styles = [str(row.style or "") for row in shown.rows]
    if len(styles) == 1 and len(columns) > 2:
        return _listed(columns, styles)
    gone: list[str] = []
    for lesser in (None, *(name for name in LESSER if name in columns)):
        if lesser:
            gone.append(lesser)
        kept = {heading: cells for heading, cells in columns.items() if heading not in gone}
        if widths := _widths(kept, width):
            narrow = _built(kept, widths, styles)
            return Group(narrow, f"no room for {', '.join(gone)}; --json has all") if gone else narrow
    return _listed(columns, styles)


def _room(columns: dict[str, list[str]], width: int) -> int:
    return width - GAP * (len(columns) - 1)


def _longest(heading: str, cells: list[str]) -> int:
    return max(map(cell_len, (heading, *cells)))


def _widths(columns: dict[str, list[str]], width: int) -> list[int] | None:
    """Return how wide each column is to be, ``None`` where they do not fit."""
    widths = list(map(_longest, columns, columns.values()))
    for floors in _floors(columns):
        while sum(widths) > _room(columns, width):
            givers = [place for place, wide in enumerate(widths) if wide > floors[place]]
            if not givers:
                break
            widths[max(givers, key=widths.__getitem__)] -= 1
        else:
            return widths
    return None


def _floors(columns: dict[str, list[str]]) -> Iterator[list[int]]:
    """Yield how narrow columns may become: by their headings, between words, inside names."""
    words = {heading: _longest_word([heading]) for heading in columns}
    yield [max(words[heading], *map(cell_len, cells)) for heading, cells in columns.items()]
    longest = [max(words[heading], _longest_word(cells)) for heading, cells in columns.items()]
    yield longest
    yield [min(word, NAME) for word in longest]


def _longest_word(texts: list[str]) -> int:
    return max((cell_len(word) for text in texts for word in text.split()), default=0)


def _built(columns: dict[str, list[str]], widths: list[int], styles: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading, width in zip(columns, widths, strict=True):
        table.add_column(heading, overflow="fold", width=width)
    for style, *cells in zip(styles, *columns.values(), strict=True):
        table.add_row(*cells, style=style)
    return table


def _listed(columns: dict[str, list[str]], styles: list[str]) -> Group:
    """Return each row as a list of heading and cell."""
    lists: list[RenderableType] = []
    for style, *cells in zip(styles, *columns.values(), strict=True):
        facts = facts_table(zip(columns, cells, strict=True))
        facts.columns[0].style, facts.columns[1].style = "bold", style
        lists += ["", facts]
    return Group(*lists[1:])
