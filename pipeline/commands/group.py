"""The command `thawline` and all commands under it."""

from __future__ import annotations

import click

from pipeline.commands.cache import cache_group
from pipeline.commands.compare import compare
from pipeline.commands.demo import demo
from pipeline.commands.drift import drift
from pipeline.commands.duplicates import duplicates
from pipeline.commands.export import export
from pipeline.commands.extract import extract
from pipeline.commands.finetune import finetune
from pipeline.commands.fit import fit
from pipeline.commands.lecture import lecture
from pipeline.commands.networks import backbones, layers
from pipeline.commands.predict import predict
from pipeline.commands.pretrain import pretrain
from pipeline.commands.rank import rank
from pipeline.commands.similar import similar
from pipeline.commands.suspects import suspects
from pipeline.commands.units import units
from pipeline.provenance import installed_version

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(installed_version("thawline"))
def thawline() -> None:
    """Turn images into a trained classifier: frozen CNN features, cached once; scikit-learn heads on top."""


for command in (
    demo, backbones, layers, extract, cache_group, fit, finetune, pretrain, predict, export, rank, units, drift,
    similar, duplicates, suspects, compare, lecture,
):  # fmt: skip
    thawline.add_command(command)
