"""The tables of `similar`, `duplicates` and `suspects`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pipeline.reporting.terminal.tables import rows_table
from pipeline.results import (
    Conflict,
    FoundCopy,
    GroupedImage,
    LeakPrice,
    NearThreshold,
    PlantedLabels,
    SimilarImages,
    Suspect,
)

MOST_ROWS = 20
MOST_GROUPS = 10
MOST_EACH = 4  # images of a group


def similar_table(found: Sequence[SimilarImages], layer: str) -> Table:
    """One row for each neighbour of the first images."""
    rows: list[tuple[str, str, str, str]] = []
    for one in found[:MOST_ROWS]:
        said = [(each.uri, f"{each.similarity:.3f}", each.label or "-") for each in one.neighbours]
        said = said or [(f"unreadable: {one.reason}", "", "")]
        rows += [(one.uri if not index else "", *cells) for index, cells in enumerate(said)]
    if len(found) > MOST_ROWS:
        rows.append((f"… and {len(found) - MOST_ROWS} more; --csv has all", "", "", ""))
    return rows_table(("image", "similar", "similarity", "label"), rows, f"similar on {layer}")


def threshold_lines(near: NearThreshold) -> list[str]:
    """Say from which similarity on images count as near-duplicates, and how far that can be trusted."""
    lines = [f"near-duplicates have a similarity of {near.threshold:.4f} or more on {near.layer}"]
    if near.recall_all is not None:
        edits = ", ".join(f"{edit} {found:.0%}" for edit, found in near.recall.items())
        lines.append(f"found of copies planted for {near.copies} images: {near.recall_all:.1%} ({edits})")
    if near.false_alarms is not None:
        lines.append(
            f"false alarms: {near.false_alarms:.1%} of {near.compared} images are so near to one of other {near.apart}"
        )
    return lines


def groups_table(groups: Sequence[Sequence[GroupedImage]]) -> Table:
    """One row for each image of the first groups."""
    rows: list[tuple[str, ...]] = []
    for number, group in enumerate(groups[:MOST_GROUPS], 1):
        for index, one in enumerate(group[:MOST_EACH]):
            said = (one.uri, f"{one.similarity:.3f}", one.label or "-", one.split or "-")
            rows.append((str(number) if not index else "", *said))
        if len(group) > MOST_EACH:
            rows.append(("", f"… and {len(group) - MOST_EACH} more", "", "", ""))
    if len(groups) > MOST_GROUPS:
        rows.append(("", f"… and {len(groups) - MOST_GROUPS} more groups; --csv has all", "", "", ""))
    return rows_table(("group", "image", "similarity", "label", "split"), rows)


def copies_table(copies: Sequence[FoundCopy]) -> Table:
    """One row for each of the first images of the second cache that are in the first."""
    rows = [
        (one.uri, one.original.uri, f"{one.original.similarity:.3f}", one.label or "-", one.original.label or "-")
        for one in copies[:MOST_ROWS]
    ]
    if len(copies) > MOST_ROWS:
        rows.append((f"… and {len(copies) - MOST_ROWS} more; --csv has all", "", "", "", ""))
    return rows_table(("in the second", "in the first", "similarity", "label", "label there"), rows)


def nearness_table(price: LeakPrice) -> Table:
    """One row for each quarter of the test images, by the similarity of their nearest training image."""
    rows = [
        (
            f"{one.low:.3f}–{one.high:.3f}",
            str(one.images),
            f"{one.accuracy:.3f}",
            "{:.3f}–{:.3f}".format(*one.accuracy_ci95),
        )
        for one in price.bins
    ]
    title = f"accuracy by the similarity of the nearest training image on {price.layer}"
    return rows_table(("similarity", "test images", "accuracy", "95 % interval"), rows, title)


def price_lines(price: LeakPrice) -> list[str]:
    """Say what near-duplicates add to the accuracy, where it is known which images are."""
    if price.near is None:
        return []
    compared = sum(one.images for one in price.bins)
    told = (
        f"{price.near} of {compared} compared test images are near-duplicates of training images (similarity "
        f"{price.threshold:.3f} or more)"
    )
    if price.accuracy_far is None:
        return [f"{told}: all of them"]
    if not price.near:
        return [told]
    added = 100 * (sum(one.images * one.accuracy for one in price.bins) / compared - price.accuracy_far)
    change = f"{abs(added):.1f} points {'less' if added >= 0 else 'more'}"
    return [f"{told}; without them the accuracy is {price.accuracy_far:.3f}, {change}"]


def conflicts_table(conflicts: Sequence[Conflict]) -> Table:
    """One row for each of the first images that have several labels."""
    rows = [
        (", ".join(f"{uri}: {label}" for uri, label in zip(one.uris, one.labels, strict=True)), one.suggested)
        for one in conflicts[:MOST_ROWS]
    ]
    return rows_table(("equal images with different labels", "fits best"), rows)


def suspects_table(suspects: Sequence[Suspect]) -> Table:
    """One row for each of the first suspects."""
    rows = [
        (
            one.uri,
            f"{one.label} ({one.probability:.2f})",
            f"{one.suggested} ({one.suggested_probability:.2f})",
            ", ".join(each.label for each in one.neighbours),
            one.split or "-",
        )
        for one in suspects[:MOST_ROWS]
    ]
    if len(suspects) > MOST_ROWS:
        rows.append((f"… and {len(suspects) - MOST_ROWS} more; --json and --page have them", "", "", "", ""))
    return rows_table(("image", "label", "fits better", "neighbours are", "split"), rows)


def planted_lines(planted: PlantedLabels) -> list[str]:
    """Say how far a list of suspects can be trusted."""
    return [
        f"trust: of {planted.planted} labels that were changed on purpose, {planted.recall:.0%} were flagged; of all "
        f"{planted.flagged} flags then, {planted.precision:.0%} were on these, and {planted.precision_new:.0%} without "
        "labels that had been flagged before",
        "these were changed at random: real mistakes, between classes that look alike, are harder to find, and where "
        "fewer labels are wrong, fewer of the flags are right",
    ]
