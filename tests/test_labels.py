from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features_cache import CacheWriter, LayerInfo, Rows
from pipeline.compare import compare, dry_run
from pipeline.errors import FitError, PlanError, TableError
from pipeline.evaluation.labels import RowLabels, read_labels
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.fit import fit
from pipeline.predict import predict
from pipeline.rank import rank
from pipeline.results import to_json
from pipeline.tables import read_columns

Thawline = Callable[..., Any]
TINY = "test_resnet@random:0"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def join(table: Path, uris: Sequence[str], **columns: str) -> RowLabels:
    none = np.full(len(uris), "")
    return read_labels(table, **columns).join(np.array(uris), none, none)


def names(found: RowLabels) -> list[str]:
    return [found.classes[label] if label >= 0 else "" for label in found.labels.tolist()]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_columns(ending: str, tmp_path: Path) -> None:
    rows = [{"uri": f"{i}.png", "note": 'a, "b"', "age": None if i == 3 else i / 2} for i in range(5000)]
    path = tmp_path / f"table{ending}"
    if ending == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, ["uri", "note", "age"], delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    found = read_columns(path, lambda header: [name for name in header if name != "note"])
    expected = ["" if i == 3 else f"{i / 2:g}" for i in range(5000)]
    assert list(found) == ["uri", "age"]
    assert found["uri"] == [f"{i}.png" for i in range(5000)]
    assert [text.removesuffix(".0") for text in found["age"]] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "names of the columns"),
        ("a.csv", b"uri,label\na.png\n", "expected 2 fields in row 2, found 1"),
        ("a.csv", b"uri,label,label\na.png,1,2\n", "expected one column 'label'"),
        ("a.csv", b'uri,label\na.png,"x\n', "line"),
        ("a.csv", b"uri,label\n\xff,a\n", "expected UTF-8"),
        ("a.csv", b"uri,label\n", "at least one row"),
        ("a.csv", b"uri,label\n,x\n", "the name of an image"),
        ("a.csv", b"one,label\na,x\n", "which column names the images"),
        ("a.csv", b"uri,weight,age\na,1,2\n", "which column holds the labels.*weight, age"),
        (
            "a.csv",
            b"uri,label,split\na,1,training\nb,1,rest\n",
            "expected split train, val, test or none, found 'rest'",
        ),
        ("a.csv", b"uri,label\na.png,cat\nb.png,dog\na.png,dog\n", "names 'a.png' twice, with label 'cat' and 'dog'"),
        ("a.jsonl", b'{"uri": 1, "label": 1}\n[1]\n', "expected a JSON object in line 2, found list"),
        ("a.jsonl", b'{"uri": 1\n', "expected a JSON object in line 1, found no JSON"),
        ("a.parquet", b"PAR1", "expected a Parquet table"),
        ("a.xls", b"", "ends in .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_bad_tables_are_refused_in_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=message) as caught:
        read_labels(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_table_or_column_is_named_with_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "labels.csv", "uri,fingers\na.png,1\n")
    with pytest.raises(TableError, match=r"did you mean labels.csv"):
        read_labels(tmp_path / "label.csv")
    with pytest.raises(TableError, match=r"no column 'finger', but uri, fingers; did you mean fingers"):
        read_labels(tmp_path / "labels.csv", "finger")


@pytest.mark.parametrize(
    ("keys", "way"),
    [
        (["b/2.png", "a/1.png"], "uri"),
        (["./b/2.png", "./a/1.png"], "uri"),
        (["elsewhere/2.png", "/data/1.png"], "file name"),
        (["2", "1"], "file name without ending"),
        (["x/2.png", "y/1.png", "z.png"], "file name"),
    ],
)
def test_images_are_found_by_the_first_name_that_fits(keys: list[str], way: str, tmp_path: Path) -> None:
    labels = ["two", "one", "other"][: len(keys)]
    rows = "".join(f"{key},{label}\n" for key, label in zip(keys, labels, strict=True))
    found = join(write(tmp_path / "t.csv", f"path,kind\n{rows}"), ["a/1.png", "b/2.png"])
    assert names(found) == ["one", "two"]
    assert found.classes == ("one", "two"), "labels of other images are no classes"
    assert found.notes[0] == f"labels come from column 'kind' of t.csv, joined by {way}"
    assert ("1 of 3 keys of t.csv fit no image: z.png" in found.notes) is (len(keys) == 3)


def test_a_stem_keeps_what_is_no_ending_of_an_image(tmp_path: Path) -> None:
    found = join(write(tmp_path / "t.csv", "id,label\nscan.1,a\nscan.2,b\n"), ["scan.2.png", "scan.1.png"])
    assert names(found) == ["b", "a"]


def test_names_that_are_not_unique_label_nothing(tmp_path: Path) -> None:
    uris = ["a/1.png", "b/1.png", "c/2.png", "d/3.png", "e/4.png"]
    found = join(write(tmp_path / "t.csv", "file,label\n1.png,x\nu/2.png,x\nv/2.png,y\n3.png,z\n"), uris)
    assert names(found) == ["", "", "", "z", ""]
    unsure = "3 of 5 images are left out because their file name is not unique: a/1.png, b/1.png, c/2.png"
    assert unsure in found.notes
    assert "1 of 5 images are not in t.csv: e/4.png" in found.notes


def test_a_uri_is_never_overruled_by_a_file_name(tmp_path: Path) -> None:
    found = join(write(tmp_path / "t.csv", "uri,label\na/1.png,x\nother/2.png,y\n"), ["a/1.png", "b/2.png"])
    assert names(found) == ["x", ""]


def test_a_table_for_other_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"names no image of this source: its first key is 'x\.png'.*'a/1\.png'"):
        join(write(tmp_path / "t.csv", "uri,label\nx.png,a\n"), ["a/1.png"])
    with pytest.raises(TableError, match=r"column 'label' of t\.csv is empty for all images"):
        join(write(tmp_path / "t.csv", "uri,label\na.png,\nb.png,x\n"), ["a.png"])


def test_splits_and_groups_of_the_table_replace_those_of_the_source(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "uri;Split;target\nb;Testing;1\na;;2\n")
    own = np.array(["val", "val", "val"]), np.array(["p", "q", "p"])
    found = read_labels(table).join(np.array(["a", "b", "c"]), *own)
    assert found.splits.tolist() == ["", "test", ""]
    assert found.groups.tolist() == ["p", "q", "p"]
    assert found.notes[0].endswith("joined by uri, and so do splits")


def test_rows_that_say_the_same_count_once_and_odd_classes_are_named(tmp_path: Path) -> None:
    text = "uri,label,more\na,nan,x\nb,7,\nb,7,other\nc,,\nd,cafe\u0301,\ne,caf\u00e9,\n"
    found = join(write(tmp_path / "t.csv", text), list("abcde"), target="label")
    assert names(found) == ["nan", "7", "", "caf\u00e9", "caf\u00e9"], "one name in two forms is one class"
    assert any("'nan' in column 'label' of t.csv counts as a class" in note for note in found.notes)
    assert "1 of 5 images have no label in t.csv: c" in found.notes


def test_numbers_among_words_are_told(tmp_path: Path) -> None:
    found = join(write(tmp_path / "t.csv", "uri,label\na,1\nb,2\nc,many\n"), list("abc"))
    assert "column 'label' of t.csv mixes numbers with text, each of them a class: many" in found.notes


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same features twice: with labels, splits and groups of the source, and without; and these in a table."""
    folder, n = tmp_path_factory.mktemp("labels"), 120
    rng = np.random.default_rng(0)
    labels, groups = np.arange(n) % 3, [f"g{i // 4}" for i in range(n)]
    splits = ["test" if i // 4 % 4 == 0 else "train" for i in range(n)]
    features = (1.2 * rng.standard_normal((3, 8))[labels] + rng.standard_normal((n, 8))).astype("f")
    digests = [np.frombuffer(hashlib.blake2b(b"%d" % i, digest_size=16).digest(), np.uint8) for i in range(n)]
    uris, zeros, none = [f"{i:03d}.png" for i in range(n)], np.zeros(n, np.int64), [""] * n
    layer = LayerInfo("top", 8, "float32", {"layer": "top", "pool": "avg"}, "f")
    for name, columns in {"known": (labels, splits, groups), "bare": (zeros - 1, none, none)}.items():
        handles = {"source": name, "backbone": "net", "pool": "avg"}
        classes = ("ape", "bee", "cat") if name == "known" else ()
        with CacheWriter.create(folder / f"{name}.h5", Rows(uris, *columns, zeros, zeros), classes, [layer], handles, {
            "backbone": "net", "layers": ["top"], "pool": "avg", "size": None, "precision": "auto"
        }) as writer:  # fmt: skip
            writer.begin_run({})
            writer.write(np.arange(n), {"top": features}, np.array(digests))
    table = folder / "table.csv"
    rows = zip(uris, splits, groups, np.array(["ape", "bee", "cat"])[labels].tolist(), strict=True)
    write(table, "image,split,group,animal\n" + "".join(",".join(row) + "\n" for row in rows))
    return {"known": folder / "known.h5", "bare": folder / "bare.h5", "table": table}


def test_a_fit_on_a_table_is_that_on_the_same_labels_of_the_source(caches: dict[str, Path], tmp_path: Path) -> None:
    own = fit(caches["known"], heads=["logreg", "ridge"], jobs=1)
    told = fit(caches["bare"], heads=["logreg", "ridge"], jobs=1, labels=caches["table"], save=tmp_path / "m.skops")
    same = [{**to_json(one), "seconds": 0, "target": ""} for one in own.results]
    assert [{**to_json(one), "seconds": 0, "target": ""} for one in told.results] == same
    assert {one.target for one in told.results} == {"animal"}
    assert {one.target for one in own.results} == {None}
    assert told.classes == own.classes
    assert told.notes[0] == "labels come from column 'animal' of table.csv, joined by uri, and so do splits and groups"
    ranked = rank(caches["bare"], labels=caches["table"]).ranking
    assert ranked == rank(caches["known"]).ranking


def test_labels_are_looked_for_only_where_they_are(caches: dict[str, Path], thawline: Thawline) -> None:
    with pytest.raises(FitError, match="name a table of labels"):
        fit(caches["bare"])
    thawline("fit", caches["bare"], "--target", "animal").assert_one_line("also name that table (labels)")


@pytest.fixture(scope="module")
def photos(write_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos without class folders, and a table that labels them."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "sorted", ("cat", "dog"), each=8)
    (folder / "photos").mkdir()
    rows = ["file,split,species,colour"]
    for path in sorted((folder / "sorted").rglob("*.png")):
        number, species = int(path.stem), path.parent.name
        path.rename(folder / "photos" / f"{species[0]}{path.name}")
        split = "test" if number % 4 == 0 else "train"
        rows.append(f"{species[0]}{number},{split},{species},{('red', 'blue')[number % 2]}")
    write(folder / "table.csv", "\n".join(rows) + "\n")
    return folder


def test_a_saved_model_knows_the_name_of_its_target(photos: Path, tmp_path: Path, thawline: Thawline) -> None:
    extract(photos / "photos", [TINY], ["layer1"], output=tmp_path / "cache", size=32, engine="torch")
    asked = ("--labels", photos / "table.csv", "--target", "species", "--save", tmp_path / "m.skops")
    shown = thawline("fit", tmp_path / "cache", *asked).stdout
    assert "target species" in shown
    report = predict(tmp_path / "m.skops", photos / "photos", tmp_path / "cache", engine="torch")
    assert report.target == "species"
    assert {one.label for one in report.predictions} <= {"cat", "dog"}
    printed = thawline("predict", tmp_path / "m.skops", photos / "photos", "-o", tmp_path / "cache").stdout
    assert printed.splitlines()[0].split() == ["image", "species", "probability"]


def test_fine_tuning_learns_the_labels_of_a_table(photos: Path, tmp_path: Path) -> None:
    options = {"labels": photos / "table.csv", "size": 32, "epochs": 1, "engine": "torch", "output": tmp_path}
    options |= {"metric": "macro_f1"}
    results = [finetune(photos / "photos", TINY, target=name, **options) for name in ("species", "colour")]
    assert [one.classes for one in results] == [("cat", "dog"), ("blue", "red")]
    assert [one.results[0].target for one in results] == ["species", "colour"]
    scores = [one.results[0].validation_score for one in results]
    assert all(0 <= score <= 1 for score in scores)
    assert {one.results[0].validation_accuracy for one in results} == {None}
    assert results[0].predictions[0].uris.tolist() == ["c0.png", "c4.png", "d0.png", "d4.png"]


PLAN = """\
source = "photos"
labels = "table.csv"
target = "species"
[[extract]]
backbone = "test_resnet@random:0"
layer = "layer1"
size = 32
engine = "torch"
[[fit]]
head = "centroid"
"""


def test_a_plan_names_a_table_and_another_table_makes_other_results(
    photos: Path, tmp_path: Path, thawline: Thawline
) -> None:
    plan = write(photos / "plan.toml", PLAN)
    assert dry_run(plan, tmp_path / "run").power[0].test_images == 4, "the test split is that of the table"
    first = compare(plan, tmp_path / "run")
    assert (first.computed, first.failures, first.results[0].n_classes) == (1, [], 2)
    assert first.results[0].result.target == "species"
    assert compare(plan, tmp_path / "run").computed == 0
    write(plan, f'metric = "kappa"\n{PLAN}')
    assert compare(plan, tmp_path / "run").results[0].result.metric == "kappa", "another metric is another result"
    table = thawline("compare", plan, "-o", tmp_path / "run").stdout.splitlines()[0].split()
    assert table[:5] == ["source", "shots", "method", "kappa", "accuracy"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('aria-sort="descending"><button type="button">kappa') == 1
    assert page.count('aria-sort="descending"><button') == 1
    write(plan, PLAN)
    text = (photos / "table.csv").read_text()
    write(photos / "table.csv", text.replace("c1,train,cat", "c1,train,dog"))
    try:
        assert compare(plan, tmp_path / "run").computed == 1
    finally:
        write(photos / "table.csv", text)
    with pytest.raises(PlanError, match=r"line 2: .*no column 'kind'"):
        compare(write(photos / "plan.toml", PLAN.replace("species", "kind")), tmp_path / "other")
