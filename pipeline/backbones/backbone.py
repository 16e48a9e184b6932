"""A backbone: a frozen network with its name, weights digest and preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from pipeline.backbones.aliases import PENULTIMATE, join_classifiers
from pipeline.backbones.trace import Traced, trace
from pipeline.errors import BackboneError
from pipeline.spec import Preprocessing


@dataclass(eq=False)
class Backbone:
    """A frozen network with everything that is needed to run and to identify it.

    Parameters
    ----------
    name, handle : str
        Canonical name with its zoo, such as ``"torchvision/resnet50"``, and the shortest one that
        `pipeline.backbones.registry.load_backbone` accepts; default weights are left out.
    weights, weights_digest : str
        Tag, ``"random:SEED"`` or file of the weights, and the blake2b-128 of the state dict, in hex. If the network
        comes from a folder or repository whose description changes how it is built, the digest covers that, too.
    module : torch.nn.Module
        In eval mode, float32, without gradients.
    preprocessing : Preprocessing
    classifiers : tuple of str
        Dotted names of the classifiers: most networks have one, some none, and some combine the scores of several.
    arguments : str, default ""
        What the description of a network from a folder or repository changes in how it is built, as JSON.
    """

    name: str
    handle: str
    weights: str
    weights_digest: str
    module: nn.Module
    preprocessing: Preprocessing
    classifiers: tuple[str, ...]
    arguments: str = ""

    def check_rebuilt(self) -> None:
        """Raise `BackboneError` if a network that is trained from this one could not be built again from its file."""
        if self.arguments:
            raise BackboneError(
                f"{self.handle} is built with the model_args {self.arguments}; a saved network would lose them: "
                "its file names the network alone; train another, or one whose description has no model_args"
            )

    def heads(self, layer: str) -> int:
        """Return `pipeline.spec.LayerSpec.heads` of the features of a layer."""
        return max(1, len(self.classifiers)) if layer == PENULTIMATE else 1

    @cached_property
    def traced(self) -> Traced:
        """The network's graph with the names and shapes of its layers; traced on first use."""
        only = self.classifiers[0] if len(self.classifiers) == 1 else None
        traced = trace(self.module, self.preprocessing.size, only, self.handle)
        return traced if len(self.classifiers) < 2 else join_classifiers(traced, self.classifiers, self.handle)
