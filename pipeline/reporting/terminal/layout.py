"""How a table fits a narrow terminal: its columns get narrower, then fewer, or its rows become lists.

The widths are ours because rich makes the widest columns equal, whatever is in them: it breaks numbers.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Column, Table

from pipeline.reporting.terminal.tables import facts_table

GAP = 2  # blanks between columns
NAME = 16  # a word may be cut into pieces of at least so many characters: a path is longer, a number never
LESSER = ("seconds", "train/val/test", "per class", "log-loss")
"""Columns that are left out where there is no room, in this order."""


def lay_out(shown: RenderableType, width: int) -> RenderableType:
    """Return a table, or each table of a group, so that it fits into `width` characters.

    First headings are wrapped, then cells between words, then long names are cut, then `LESSER` columns are left out. A
    table that is still too wide, or that has one row, becomes a list of headings and cells.
    """
    if isinstance(shown, Group):
        return Group(*(lay_out(part, width) for part in shown.renderables))
    if not isinstance(shown, Table) or not (shown.rows and shown.show_header):
        return shown
    if sum(map(_longest, shown.columns)) <= _room(shown.columns, width):
        return shown
    if len(shown.rows) == 1 and len(shown.columns) > 2:
        return _listed(shown)
    lesser = [name for name in LESSER if any(column.header == name for column in shown.columns)]
    for gone in (lesser[:count] for count in range(len(lesser) + 1)):
        columns = [column for column in shown.columns if column.header not in gone]
        if widths := _widths(columns, width):
            narrow = copy(shown)
            sized = (replace(column, width=wide) for column, wide in zip(columns, widths, strict=True))
            narrow.columns = Table(*sized).columns  # which numbers them anew
            return Group(narrow, f"no room for {', '.join(gone)}; --json has all") if gone else narrow
    return _listed(shown)


def _widths(columns: list[Column], width: int) -> list[int] | None:
    """Return how wide each column is to be, None where they do not fit."""
    headings = [_longest_word([str(column.header)]) for column in columns]
    words = [_longest_word([str(column.header), *map(str, column.cells)]) for column in columns]
    cells = [max(cell_len(str(cell)) for cell in column.cells) for column in columns]
    widths, room = list(map(_longest, columns)), _room(columns, width)
    for narrowest in (list(map(max, headings, cells)), words, [min(word, NAME) for word in words]):
        while sum(widths) > room and (wide := [at for at, floor in enumerate(narrowest) if widths[at] > floor]):
            widths[max(wide, key=widths.__getitem__)] -= 1
        if sum(widths) <= room:
            return widths
    return None


def _room(columns: list[Column], width: int) -> int:
    return width - GAP * (len(columns) - 1)


def _longest(column: Column) -> int:
    return max(cell_len(str(text)) for text in (column.header, *column.cells))


def _longest_word(texts: list[str]) -> int:
    return max((cell_len(word) for text in texts for word in text.split()), default=0)


def _listed(table: Table) -> Group:
    """Return each row as a list of headings and cells."""
    headings = [str(column.header) for column in table.columns]
    lists: list[RenderableType] = []
    for row, *cells in zip(table.rows, *(column.cells for column in table.columns), strict=True):
        facts = facts_table(zip(headings, map(str, cells), strict=True))
        facts.columns[0].style, facts.columns[1].style = "bold", row.style or ""
        lists += ["", facts]
    return Group(*lists[1:])
