"""The pages of `similar`, `duplicates` and `suspects`: cards of images that belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from features_cache import atomic_write, explained
from pipeline.duplicates import DuplicatesReport
from pipeline.neighbours.like import source_of
from pipeline.reporting.page.pictures import Album, Thumbnail
from pipeline.reporting.page.template import render_page
from pipeline.reporting.terminal.neighbour_tables import planted_lines, threshold_lines
from pipeline.results import Conflict, FoundCopy, GroupedImage, Neighbour, SimilarImages, Suspect
from pipeline.similar import SimilarReport
from pipeline.suspects import SuspectsReport

MOST_PICTURES = 500


@dataclass(frozen=True)
class Card:
    """Images that belong together, the first of them before the others.

    `given` and `suggested` are the label that the first has and the one that fits better, where it is in doubt.
    """

    title: str
    note: str
    images: Sequence[Thumbnail]
    given: str = ""
    suggested: str = ""


def similar_page(report: SimilarReport, path: Path) -> list[str]:
    """Write the page of what was found for each image; return notes on what it leaves out."""
    own = Album(source_of(report.file))
    asked = own if report.images is None else Album(report.images)
    cards = [partial(_similar_card, asked, own, one) for one in report.found]
    sizes = [1 + len(one.neighbours) for one in report.found]
    return _write(
        path,
        "Similar images",
        [f"The most similar of {report.rows:,} images on {report.layer}, the nearest first. 1 is the same direction."],
        cards,
        sizes,
    )


def _similar_card(asked: Album, own: Album, one: SimilarImages) -> Card:
    images = [asked.thumbnail(one.uri, "looked for"), *_beside(own, one.neighbours)]
    return Card(one.uri, one.reason and f"unreadable: {one.reason}", images)


def duplicates_page(report: DuplicatesReport, path: Path) -> list[str]:
    """Write the page of groups, or of copies beside their originals; return notes on what it leaves out."""
    albums = [Album(source_of(file)) for file in report.files]
    if len(albums) > 1:
        cards = [partial(_copy_card, albums[0], albums[1], one) for one in report.copies]
        sizes, title = [2] * len(cards), "Images of the second cache that are in the first"
    else:
        cards = [partial(_group_card, albums[0], group) for group in report.groups]
        sizes, title = list(map(len, report.groups)), "Near-duplicates"
    return _write(path, title, threshold_lines(report.near), cards, sizes)


def _copy_card(first: Album, second: Album, copy: FoundCopy) -> Card:
    return Card(copy.uri, "", [second.thumbnail(copy.uri, copy.label), *_beside(first, [copy.original])])


def _group_card(album: Album, group: Sequence[GroupedImage]) -> Card:
    """Return a card of the first images of a group."""
    notes = [", ".join(filter(None, (one.label, one.split, f"{one.similarity:.3f}"))) for one in group]
    images = [album.thumbnail(one.uri, note) for one, note in zip(group[:MOST_PICTURES], notes, strict=False)]
    doubts = [
        f"{len(found)} {name}" for name in ("label", "split") if len(found := {getattr(one, name) for one in group}) > 1
    ]
    note = f"in {' and '.join(doubts)}s" if doubts else ""
    return Card(f"{len(group)} images", note, images)


def suspects_page(report: SuspectsReport, path: Path) -> list[str]:
    """Write the page on which suspects are judged, images with several labels first; return notes as others."""
    album = Album(source_of(report.file))
    cards = [partial(_conflict_card, album, one, at) for one in report.conflicts for at in range(len(one.uris))]
    cards += [partial(_suspect_card, album, one) for one in report.suspects]
    sizes = [len(one.uris) for one in report.conflicts for _ in one.uris] + [
        1 + len(one.neighbours) for one in report.suspects
    ]
    sentences = [
        "Labels that are probably wrong, the most doubtful first; beside each image are those that look most like it.",
        *planted_lines(report.planted),
    ]
    key = f"thawline {report.file.path.name} {report.layer}"
    return _write(path, "Labels in doubt", sentences, cards, sizes, report.table.classes, key)


def _conflict_card(album: Album, one: Conflict, at: int) -> Card:
    """Return the card on which the label of one of the equal images is judged."""
    order = [at, *(other for other in range(len(one.uris)) if other != at)]
    images = [album.thumbnail(one.uris[each], one.labels[each]) for each in order]
    return Card(one.uris[at], "the same image has several labels", images, one.labels[at], one.suggested)


def _suspect_card(album: Album, one: Suspect) -> Card:
    note = f"label {one.label} ({one.probability:.2f}), fits better: {one.suggested} ({one.suggested_probability:.2f})"
    images = [album.thumbnail(one.uri, one.split), *_beside(album, one.neighbours)]
    return Card(one.uri, note, images, one.label, one.suggested)


def _beside(album: Album, neighbours: Sequence[Neighbour]) -> list[Thumbnail]:
    notes = [", ".join(filter(None, (one.label, f"{one.similarity:.3f}"))) for one in neighbours]
    return [album.thumbnail(one.uri, note) for one, note in zip(neighbours, notes, strict=True)]


def _write(
    path: Path,
    title: str,
    sentences: Sequence[str],
    cards: Iterable[Callable[[], Card]],
    sizes: Sequence[int],
    classes: Sequence[str] = (),
    key: str = "",
) -> list[str]:
    """Write a page of as many cards as `MOST_PICTURES` allows, at least one.

    Parameters
    ----------
    path, title, sentences
        Of the page.
    cards : iterable of callable
        Each makes a card, with its thumbnails.
    sizes : sequence of int
        How many images each card has.
    classes : sequence of str
        Labels that may be right, if the reader is to judge them.
    key : str
        Under which the browser keeps the reader's marks.
    """
    shown: list[Card] = []
    pictures = 0
    for card, size in zip(cards, sizes, strict=True):
        pictures += size
        if shown and pictures > MOST_PICTURES:
            break
        shown.append(card())
    left = len(sizes) - len(shown)
    text = render_page(
        "gallery", title=title, sentences=sentences, cards=shown, left=left, classes=classes, key=key, judged=bool(key)
    )
    with explained(path, "write"), atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")
    told = f"{path} shows the first {len(shown)} of {len(sizes)}, because a page holds {MOST_PICTURES} images"
    return [told] if left else []
