"""What every part below works on: a frozen network with all that is needed to run and to name it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from pipeline.backbones.trace import Traced, trace
from pipeline.spec import Preprocessing


@dataclass(eq=False)
class Backbone:
    """A frozen network with all that is needed to run and to name it.

    Parameters
    ----------
    name : str
        Canonical name with its zoo, such as ``"torchvision/resnet50"``.
    handle : str
        The shortest name a user may write for it; without weights where they are the default.
    weights : str
        Tag of the pretrained weights, ``"random:SEED"``, or the name of the weights file.
    weights_digest : str
        blake2b-128 of the state dict, in hex.
    module : torch.nn.Module
        In eval mode, float32, without gradients.
    preprocessing : Preprocessing
        How an image becomes the input.
    classifier : str or None
        Dotted name of the classifier; None where the network has none.
    """

    name: str
    handle: str
    weights: str
    weights_digest: str
    module: nn.Module
    preprocessing: Preprocessing
    classifier: str | None

    @cached_property
    def traced(self) -> Traced:
        """The network's graph with all names and shapes, traced on first use."""
        return trace(self.module, self.preprocessing.size, self.classifier, self.handle)
