from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backbones.registry import sketch
from pipeline.compare import compare, dry_run
from pipeline.comparing.jobs import Extraction, Fit, extractions, finetunes, fits, rectangles
from pipeline.comparing.plan import PlanTable, line_number, read_plan
from pipeline.demo import demo
from pipeline.drift import drift
from pipeline.errors import PlanError
from pipeline.export import export
from pipeline.extract import extract
from pipeline.finetune import finetune
from pipeline.finetuning.recipe import Recipe
from pipeline.fit import fit
from pipeline.heads.registry import FAMILIES, SCALINGS
from pipeline.options import (
    COMMANDS,
    FINETUNE,
    FIT_LABELS,
    OPTIMIZERS,
    RECIPE,
    SCHEDULES,
    TABLES,
    TOPS,
    tune_parameters,
)
from pipeline.predict import predict
from pipeline.rank import rank
from pipeline.spec import STORES, Request

PLAN = """\
source = "photos"   # beside the plan
seed = [0, 1]
shots = [5, "all"]

[[extract]]
backbone = "resnet18@random:0"
layer = ["layer1", "input"]
size = 32

[[fit]]
head = ["logreg", "ridge"]
"""
FIT_TABLE = "[[fit]]"
TUNE = '[[finetune]]\nbackbone = "resnet18"\n'


def write(folder: Path, text: str = PLAN) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


STAGES: dict[str, tuple[Callable[..., object], ...]] = {
    "extract": (extract,),
    "fit": (fit,),
    "finetune": (finetune, Recipe),
    "predict": (predict,),
    "export": (export,),
    "rank": (rank,),
    "drift": (drift,),
    "compare": (compare,),
    "demo": (demo,),
    "layers": (sketch,),
}
PRINTING = {"plot", "picture", "csv", "dry_run"}
"""What a command does with the result of its stage."""


@pytest.mark.parametrize("command", STAGES)
def test_the_options_of_a_command_are_parameters_of_its_stage_with_the_same_defaults(command: str) -> None:
    parameters = {
        name: parameter for stage in STAGES[command] for name, parameter in inspect.signature(stage).parameters.items()
    }
    for option in COMMANDS[command]:
        if option.parameter in PRINTING:
            assert option.parameter not in parameters
            continue
        default = parameters[option.parameter].default
        if option.required:
            assert default is inspect.Parameter.empty
        elif option.repeat and default is not None:
            assert default == (() if option.default is None else (option.default,)), option.name
        else:
            assert default == option.default, option.name
        if option.default is not None:
            assert not option.kind.problem(option.default), option.name


def test_all_that_trains_can_be_said_in_a_plan_and_on_the_command_line() -> None:
    assert {option.parameter for option in RECIPE} == {field.name for field in dataclasses.fields(Recipe)}
    above = {option.name for option in FIT_LABELS}  # stand above the tables
    assert {option.name for option in FINETUNE} - set(TABLES["finetune"]) == {
        "save",
        "picture",
        "watch",
        "task",
    } | above


def test_the_order_of_a_fine_tunes_options_stays() -> None:
    """Kept results are found by a digest of the options in this order."""
    crossed = [key for key, option in TABLES["finetune"].items() if option.crossed and key not in ("shots", "seed")]
    assert " ".join(crossed) == (
        "backbone freeze init head-first top lr layer-decay lr-at epochs patience batch-size optimizer schedule warmup "
        "weight-decay label-smoothing class-weights augment views clip precision store size white"
    )


def test_a_plan_is_crossed(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path))
    assert plan.sources == (str(tmp_path / "photos"),)
    (extraction,) = extractions(plan)
    assert extraction.request == Request("resnet18@random:0", ("layer1", "input"), size=32)
    jobs = list(fits(plan, extraction, {"layer1": ["layer1"], "input": ["input"]}))
    crossed = itertools.product(["layer1", "input"], ["logreg", "ridge"], [0, 1], [5, "all"])
    assert jobs == [Fit(extraction, *job) for job in crossed]


def test_a_source_is_a_path_relative_to_the_plan_or_a_url(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, 'source = ["photos", "s3://bucket/photos", "digits"]\n[[extract]]\n[[fit]]\n'))
    assert plan.sources == (str(tmp_path / "photos"), "s3://bucket/photos", "digits")


def test_defaults_are_the_commands_own(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, 'source = "digits"\n[[extract]]\n[[fit]]\n[[finetune]]\n'))
    (extraction,) = extractions(plan)
    assert extraction.request == Request("efficientnet_lite0", ("penultimate",))
    assert extraction.source == "digits"
    assert list(fits(plan, extraction, {"penultimate": ["penultimate"]})) == [
        Fit(extraction, "penultimate", "logreg", 0, "all")
    ]
    ((_, tune),) = finetunes(plan)
    assert dict(tune.options)["freeze"] == "all"


def test_only_a_fit_that_leaves_the_cpu_is_another_job(tmp_path: Path) -> None:
    text = 'source = "digits"\ndevice = "cpu"\n[[extract]]\n[[fit]]\n[[fit]]\ndevice = "cuda"\n'
    plan = read_plan(write(tmp_path, text))
    (extraction,) = extractions(plan)
    found = [job.options for job in fits(plan, extraction, {"penultimate": ["penultimate"]})]
    assert found == [(), (("device", "cuda"),)]


def test_rates_by_layer_are_one_value_and_views_are_crossed(tmp_path: Path) -> None:
    rates = 'lr-at = ["layer4=0.01", "fc = 0.1"]\naugment = "crop"\nviews = [2, 4]\n'
    plan = read_plan(write(tmp_path, f'source = "digits"\n{TUNE}{rates}'))
    jobs = [job for _, job in finetunes(plan)]
    found = [tune_parameters(job.options) for job in jobs]
    assert [options["lr_at"] for options in found] == [(("layer4", 0.01), ("fc", 0.1))] * 2
    assert [options["views"] for options in found] == [2, 4]
    assert "views 2" in str(jobs[0])


def test_aliases_and_joins_stand_for_their_layers(tmp_path: Path) -> None:
    text = 'source = "digits"\n[[extract]]\nlayer = ["stages", "input"]\n[[fit]]\nlayer = ["input+stages", "b"]\n'
    plan = read_plan(write(tmp_path, text))
    (extraction,) = extractions(plan)
    jobs = fits(plan, extraction, {"stages": ["a", "b"], "input": ["input"]})
    assert [job.layer for job in jobs] == ["input+a", "input+b", "b"]


def test_paths_are_relative_to_the_plan(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    text = 'source = "../photos"\noutput = "features"\n[[extract]]\nbackbone = "resnet18@weights.pth"\n[[fit]]\n'
    plan = read_plan(write(tmp_path, text))
    (extraction,) = extractions(plan)
    assert extraction.request.backbone == f"resnet18@{tmp_path}/weights.pth"
    assert extraction.line.how()["output"] == str(tmp_path / "features")
    assert Path(plan.sources[0]).resolve() == tmp_path.parent / "photos"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("source =", "source ="), ()),
        (('"photos"', '"phots"'), ("line 1", "phots", "photos")),
        (('"photos"', '"empty"'), ("line 1", "empty")),
        (('"photos"', '"a\\u0000"'), ("line 1", "'source'", "a text")),
        (("[0, 1]", "[0, 1"), ("plan.toml", "TOML", "line")),
        (("[0, 1]", "[0, 0]"), ("line 2", "'seed'", "twice")),
        (("[0, 1]", "-1"), ("line 2", "'seed'", "-1")),
        (("[0, 1]", "[]"), ("line 2", "empty")),
        (('[5, "all"]', '[5, "most"]'), ("line 3", "'shots'", "most")),
        (("layer =", "layers ="), ("line 7", "'layers'", "layer")),
        (('"layer1"', '"layer9"'), ("line 7", "layer9", "layer4")),
        (("resnet18", "resnet81"), ("line 6", "resnet81", "resnet18")),
        (("@random:0", "@nowhere.pth"), ("line 6", "nowhere.pth")),
        (("size = 32", 'pool = "agv"'), ("line 8", "agv", "avg")),
        (("size = 32", "workers = [1, 2]"), ("line 8", "workers", "one value")),
        (("size = 32", 'head = "logreg"'), ("line 8", "'head'", "[[fit]]")),
        (("size = 32", 'device = "cuda:99"'), ("line 5", "cuda:99")),
        (('"logreg"', '"logrge"'), ("line 11", "logrge", "logreg")),
        (('"logreg"', '"ridge"'), ("line 11", "twice")),
        (("[[fit]]", '[[fit]]\nlayer = "layer2"'), ("line 11", "layer2", "layer1")),
        (("[[fit]]", '[[fit]]\ndevice = "cuda:99"'), ("line 11", "cuda:99")),
        (("[[fit]]", "[fit]"), ("line 10", "[[fit]]")),
        (
            ("[[fit]]", '[[finetune]]\nbackbone = "resnet18"\nfreeze = "layer9"\n[[fit]]'),
            ("line 12", "layer9", "layer"),
        ),
        (("[[fit]]", '[[finetune]]\nbackbone = "resnet18"\nlr = -1\n[[fit]]'), ("line 12", "'lr'", "above 0")),
        ((FIT_TABLE, TUNE + "views = 2\n[[fit]]"), ("line 10", "augment crop+flip")),
        ((FIT_TABLE, TUNE + 'views = 0\naugment = "crop"\n[[fit]]'), ("line 12", "'views'", "at least 1, got 0")),
        ((FIT_TABLE, TUNE + 'freeze = "none"\nviews = 2\naugment = "crop"\n[[fit]]'), ("line 13", "freeze none")),
        ((FIT_TABLE, TUNE + "head-first = true\n[[fit]]"), ("line 10", "leave out head-first")),
        (
            (FIT_TABLE, TUNE.replace("resnet18", "resnet18@random:0") + 'init = "random"\n[[fit]]'),
            ("line 10", "init random", "without weights"),
        ),
        ((FIT_TABLE, TUNE + 'precision = "fp16"\n[[fit]]'), ("line 12", "'precision'", "bf16")),
        ((FIT_TABLE, TUNE + 'device = "cuda:99"\n[[fit]]'), ("line 12", "cuda:99")),
        ((FIT_TABLE, TUNE + 'lr-at = ["layer4"]\n[[fit]]'), ("line 12", "'lr-at'", "LAYER=RATE", "'layer4'")),
        ((FIT_TABLE, TUNE + 'lr-at = "layer4=0"\n[[fit]]'), ("line 12", "'lr-at'", "rate above 0", "'layer4=0'")),
        (
            (FIT_TABLE, TUNE + 'freeze = "layer3"\nlr-at = ["layer4=0.1", "layer2=0.1"]\n[[fit]]'),
            ("line 13", "no thawed layer 'layer2'", "layer4.0"),
        ),
        (("[[fit]]", "[[fti]]"), ("line 10", "fti", "fit")),
        (("[[fit]]", "[[fit]]\n[[fit]]"), ("line 11", "two [[fit]]")),
        (('[[fit]]\nhead = ["logreg", "ridge"]\n', ""), ("line 5", "[[fit]]")),
    ],
    ids=lambda value: str(value[-1])[:24] if value and isinstance(value, tuple) else None,
)
def test_whatever_is_wrong_is_said_before_any_work(
    make_photos: Callable[..., Path], tmp_path: Path, change: tuple[str, str], parts: tuple[str, ...]
) -> None:
    make_photos(each=6)
    (tmp_path / "empty").mkdir()
    path = write(tmp_path, PLAN.replace(*change))
    run = tmp_path / "run"
    if not parts:
        assert len(dry_run(path, run).jobs) == 17
        assert not run.exists(), "a dry run writes nothing"
        return
    with pytest.raises(PlanError) as error:
        compare(path, run)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not run.exists()


EXAMPLES: dict[str, dict[str, list[Any]]] = {
    "extract": {
        "backbone": ["test_resnet@random:0", "test_resnet@random:1"],
        "layer": [["layer1", "stages", "penultimate"]],
        "pool": ["avg", "max", "avg+max", "gem", "grid2", "flatten"],
        "precision": ["auto", "fp32"],
        "store": list(STORES),
        "size": [32, 64],
        "white": [1023, 4095],
        "batch-size": [1],
        "on-error": ["skip", "stop"],
        "workers": [1],
        "engine": ["auto", "openvino", "torch"],
        "device": ["auto", "cpu"],
        "output": ["features"],
        "cluster": ["local:2"],
    },
    "fit": {
        "head": [name if scaling == "standard" else f"{name}/{scaling}" for name in FAMILIES for scaling in SCALINGS],
        "layer": ["layer1", "layer1+input"],
        "seed": [0, 7],
        "shots": [1, "all"],
        "cv": [3],
        "balanced": [True],
        "drop-leaks": [True],
        "jobs": [1],
        "device": ["auto", "cpu"],
    },
    "finetune": {
        "backbone": ["test_resnet@random:1"],
        "freeze": ["all", "none", "layer3"],
        "init": ["pretrained", "random"],
        "head-first": [True],
        "top": list(TOPS),
        "lr": [0.1, 1],
        "layer-decay": [0.5, 1],
        "lr-at": [["layer4=0.1", "new_head=0.2"]],
        "epochs": [1],
        "patience": [1],
        "batch-size": [1],
        "optimizer": list(OPTIMIZERS),
        "schedule": list(SCHEDULES),
        "warmup": [0],
        "weight-decay": [0],
        "label-smoothing": [0.1],
        "class-weights": [True],
        "augment": ["none", "flip", "crop+flip+colour"],
        "views": [2],
        "clip": [1],
        "precision": ["auto", "fp32"],
        "store": list(STORES),
        "size": [32, 64],
        "white": [1023, 4095],
        "seed": [0, 7],
        "shots": [1, "all"],
        "engine": ["auto", "torch"],
        "device": ["auto", "cpu"],
        "workers": [1],
        "cluster": ["local:2"],
        "output": ["features"],
    },
}


def toml(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


@pytest.mark.parametrize(("table", "key"), [(table, key) for table, options in TABLES.items() for key in options])
def test_a_dry_run_estimates_every_head_and_every_option(
    make_photos: Callable[..., Path], tmp_path: Path, table: str, key: str
) -> None:
    make_photos(each=3)
    for value in EXAMPLES[table][key]:
        network = {"backbone": "test_resnet@random:0", "size": 32}
        if table == "finetune":
            chosen = {"freeze": "layer3", "augment": "crop", key: value}
            if value == "random":  # of a network that has no pretrained weights at all
                chosen |= {"backbone": "nf_resnet26", "freeze": "none"}
            text = "[[finetune]]\n" + toml(network | chosen)
        else:
            extract_options = network | {"layer": ["layer1", "input"]}
            fit_options = {"head": "centroid"}
            (extract_options if table == "extract" else fit_options)[key] = value
            text = f"[[extract]]\n{toml(extract_options)}[[fit]]\n{toml(fit_options)}"
        planned = dry_run(write(tmp_path, f'source = "photos"\n{text}'), tmp_path / "run").jobs
        assert planned
        for job in planned:
            assert not job.done
            assert 0 < job.seconds < 3600, job
            assert job.bytes > 0 or job.job.startswith("fit"), job


def test_heads_do_not_read_whole_activations(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    make_photos(each=3)
    text = '[[extract]]\nbackbone = "test_vit@random:0"\npool = ["cls", "none"]\n[[fit]]\n'
    with pytest.raises(PlanError, match="line 4: pool none keeps whole activations, which heads do not read"):
        dry_run(write(tmp_path, f'source = "photos"\n{text}'), tmp_path / "run")


def test_a_plan_that_is_not_there_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(PlanError, match=r"paln\.toml.*did you mean plan\.toml"):
        read_plan(tmp_path / "paln.toml")


def test_the_same_layer_of_two_extracts_is_a_duplicate(tmp_path: Path) -> None:
    plan = read_plan(
        write(tmp_path, PLAN + '[[extract]]\nbackbone = "resnet18@random:0"\nlayer = "input"\nsize = 32\n')
    )
    with pytest.raises(PlanError, match=r"line 14: layer input .* twice"):
        extractions(plan)


def test_lines_are_found_by_table_and_word() -> None:
    text = 'a = 1\n[[fit]]\nhead = "x"\n[[fit]]\nheads = 1\nhead = "head" # x\n'
    assert line_number(text, "fit", 0, "head") == 3
    assert line_number(text, "fit", 1, "head") == 6, "a part of a word is no word"
    assert line_number(text, "fit", 1, "x") == 4, "comments do not count, and the header is the fallback"
    assert line_number(text, "", 0, "a") == 1


EXTRACTION = Extraction("digits", Request("a", ("b",)), PlanTable("extract", 0, {}))


@given(
    st.sets(
        st.tuples(
            st.sampled_from("ab"), st.sampled_from(["logreg", "knn"]), st.integers(0, 2), st.sampled_from([1, 5, "all"])
        ),
        min_size=1,
    )
)
def test_fits_are_gathered_into_whole_products(jobs: set[tuple[str, str, int, int | str]]) -> None:
    wanted = [Fit(EXTRACTION, *job) for job in jobs]
    blocks = rectangles(wanted)
    assert sorted(map(str, itertools.chain(*blocks))) == sorted(map(str, wanted)), "each once"
    for block in blocks:
        axes = [list(dict.fromkeys(values)) for values in zip(*(job[1:] for job in block), strict=True)]
        assert [job[1:] for job in block] == list(itertools.product(*axes))


def test_a_whole_plan_is_one_call() -> None:
    jobs = itertools.product("ab", ["logreg", "knn"], [0, 1], [5, "all"])
    assert len(rectangles([Fit(EXTRACTION, *job) for job in jobs])) == 1
