"""Label new images with a fine-tuned network."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.finetuning.model_file import TunedModel
from pipeline.images.loader import load
from pipeline.images.source import ImageSource
from pipeline.results import Prediction, Progress

BATCH = 32


def label_images(model: TunedModel, source: ImageSource, device: str, progress: Progress | None) -> list[Prediction]:
    """Return a prediction for each image of `source`, in order; `progress` is called after every batch."""
    items = source.items
    found: dict[int, Prediction] = {}
    network = model.network.to(device)
    for batch in load(source, range(len(items)), [model.preprocessing], BATCH):
        with torch.inference_mode():
            logits = network(torch.from_numpy(batch.pixels[0]).to(device)) if len(batch.rows) else torch.empty(0, 1)
        probabilities = logits.double().softmax(1).cpu().numpy()
        for row, line in zip(batch.rows, probabilities, strict=True):
            best = int(np.argmax(line))
            found[int(row)] = Prediction(items[row].uri, model.classes[best], float(line[best]), "done")
        for twin in batch.duplicates:
            one = found[twin.of]
            found[twin.row] = Prediction(items[twin.row].uri, one.label, one.probability, "done")
        for failure in batch.failures:
            found[failure.row] = Prediction(items[failure.row].uri, None, None, "unreadable", failure.reason)
        if progress is not None:
            progress(len(found), len(items), "predict")
    return [found[row] for row in range(len(items))]
