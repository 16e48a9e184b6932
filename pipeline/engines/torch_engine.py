"""The torch engine: channels last, batch norms folded, autocast; on CUDA the host waits only for finished features."""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.backbones.taps import TappedNetwork
from pipeline.engines.select import Resolved
from pipeline.errors import EngineError, first_line

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 convolutions in float32; cuDNN's default, TF32, rounds their inputs to 10 bits of mantissa.

    Also a decorator. Matrix products are exact unless the caller has set torch otherwise.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set at import
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def padded(pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """Return `batch_size` images, the last ones black, for what is compiled for a fixed shape."""
    missing = batch_size - len(pixels)
    return np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else pixels


class TorchEngine:
    """Runs one tapped network over batches; see `pipeline.engines.engine.Engine`.

    With the engine ``"compile"``, the first batch waits for the compiler. A GPU without memory for `batch_size` images
    gets smaller batches from then on.
    """

    def __init__(self, network: TappedNetwork, resolved: Resolved, batch_size: int) -> None:
        self.resolved = resolved
        self.ahead = 0 if resolved.device_kind == "cpu" else 1
        self.notes: list[str] = []
        self._limit = batch_size
        own = copy.deepcopy(network)
        if isinstance(own.body, fx.GraphModule):
            own.body = folded(own.body)
        self._dims = own.widths
        self._network = own.eval().to(memory_format=torch.channels_last).to(resolved.device)
        self._call = torch.compile(self._network, dynamic=False) if resolved.engine == "compile" else self._network

    def start(self, pixels: np.ndarray) -> Callable[[], list[np.ndarray]]:
        """Begin with uint8 (k, h, w, 3); on a CPU, compute them."""
        if not len(pixels):
            return lambda: [np.empty((0, dim), np.float32) for dim in self._dims]
        parts: list[tuple[list[Tensor], torch.cuda.Event | None]] = []
        started, images = 0, len(pixels)
        while started < len(pixels):
            part = pixels[started : started + self._limit]
            try:
                parts.append(self._compute(part))
                started += len(part)
            except torch.OutOfMemoryError as error:
                self._halve(len(part), error)

        def arrays() -> list[np.ndarray]:
            for _, done in parts:
                if done is not None:
                    done.synchronize()
            layers = zip(*(features for features, _ in parts), strict=True)
            return [np.concatenate([item.numpy() for item in layer])[:images] for layer in layers]

        return arrays

    def features(self, images: Tensor) -> list[Tensor]:
        """Map uint8 (k, h, w, 3) on the device to a float32 (k, d) for each layer there, without waiting for it."""
        kind, dtype = self.resolved.device_kind, _DTYPES.get(self.resolved.precision)
        autocast = torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None)
        with torch.inference_mode(), autocast, exact_float32():
            if self.resolved.engine != "compile":
                return list(self._call(images))
            try:
                return list(self._call(images))
            except torch._dynamo.exc.TorchDynamoException as error:
                raise EngineError(
                    f"torch cannot compile {self._network.name} ({first_line(error)}): is there a C++ compiler? "
                    "Use engine 'torch'"
                ) from error

    def _compute(self, pixels: np.ndarray) -> tuple[list[Tensor], torch.cuda.Event | None]:
        if self.resolved.engine == "compile":
            pixels = padded(pixels, self._limit)  # another shape would be compiled again
        images = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        if self.resolved.device_kind == "cpu":
            return self.features(images), None
        # torch reuses pinned memory only after the copies from and to it are done
        features = self.features(images.pin_memory().to(self.resolved.device, non_blocking=True))
        hosts = [torch.empty(item.shape, dtype=item.dtype, pin_memory=True) for item in features]
        for host, item in zip(hosts, features, strict=True):
            host.copy_(item, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # waiting for it leaves the core to the threads that decode
        done.record(torch.cuda.current_stream(self.resolved.device))
        return hosts, done

    def _halve(self, count: int, error: torch.OutOfMemoryError) -> None:
        """Halve the batches after one of `count` images did not fit."""
        device = self.resolved.device
        if count == 1:
            raise EngineError(
                f"{device} has no memory for one image of {self._network.name}; use device 'cpu'"
            ) from error
        self._limit = count // 2
        self.notes.append(f"batches of {count} images do not fit into {device}: {self._limit} from then on")
        traceback.clear_frames(error.__traceback__)  # they hold the activations of the batch that failed
        torch.cuda.empty_cache()


def folded(body: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `body` in which every batch norm that alone reads a convolution has become part of it.

    `body` and its modules stay as they are. timm's batch norms with an activation leave the activation behind.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    fused = fx.GraphModule(body, graph)
    modules = dict(fused.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        norm, convolution = modules[str(node.target)], modules[str(source.target)]
        once = calls[node.target] == calls[source.target] == 1
        if once and isinstance(convolution, nn.Conv2d) and _is_plain(norm):
            fused.set_submodule(str(source.target), fuse_conv_bn_eval(convolution, norm))
            fused.set_submodule(str(node.target), getattr(norm, "act", nn.Identity()))
    fused.recompile()
    return fused


def _is_plain(norm: nn.Module) -> bool:
    """Tell whether `norm` is a batch norm over fixed statistics, with nothing after it but perhaps an activation."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return False
    return isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity)
