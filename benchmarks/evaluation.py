"""Cost of measuring predictions beside that of making them.

    python -m benchmarks.evaluation            Swin-T, 150 classes, random weights, one image of 512 × 512
    python -m benchmarks.evaluation --small    a tiny model and 64 pixels, to see that everything runs

Inference is `model.predict`, from the uint8 picture to the map; the stream is one `update` of the evaluator. A random
model predicts nothing that is worth measuring, so that the streams get drawn maps: 150 classes, 20 segments, and 100
instances, with ragged outlines, a tenth void and a prediction that strays from the truth. Predictions come back to
the CPU, where the streams run on one thread, whatever the model's device. Both are timed one after the other: an
upper bound, as `evaluate` lets the stream run beside the model. Appends the table to
benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import peers
from benchmarks.report import Table
from m2f_lab.data import Classes, Segments
from m2f_lab.evaluation import InstanceEvaluator, PanopticEvaluator, SemanticEvaluator
from m2f_lab.model import Mask2Former, ModelConfig, build_model
from m2f_lab.structures import IGNORE, PackedMasks, Prediction, Segment

UPDATES, NUM_SEGMENTS, NUM_INSTANCES = 100, 20, 100
COLUMNS = ("inference ms", "stream ms", "share")
CLASSES = Classes(
    names=tuple(map(str, range(peers.NUM_CLASSES))),
    colors=((0, 0, 0),) * peers.NUM_CLASSES,
    things=frozenset(range(peers.NUM_CLASSES // 2)),
)


def drawn_maps(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and its truth: which of `count` smooth fields is highest at each pixel, 1…count. int32 [H, W]

    One tenth of the truth is 0, in patches.
    """
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(1, count + 1, 12, 12, generator=random)
    predicted = truth + 0.3 * torch.randn(truth.shape, generator=random)
    maps = []
    for coarse in (predicted, truth):
        fields = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0]
        void = fields[0] > fields[0].flatten().quantile(0.9)
        regions = (fields[1:].argmax(0) + 1).int()
        maps.append((regions if coarse is predicted else regions * ~void).numpy())
    return maps[0], maps[1]


def semantic_stream(side: int) -> Callable[[], None]:
    predicted, truth = ((each - 1).astype(np.uint8) for each in drawn_maps(peers.NUM_CLASSES, side))  # 0 - 1 → 255
    assert truth.max() == IGNORE
    evaluator = SemanticEvaluator(peers.NUM_CLASSES, CLASSES.names)
    return lambda: evaluator.update(predicted, truth)


def panoptic_stream(side: int) -> Callable[[], None]:
    predicted, truth = drawn_maps(NUM_SEGMENTS, side)
    labels, predicted_labels = ({int(i): int(i) for i in np.unique(each) if i} for each in (truth, predicted))
    evaluator = PanopticEvaluator(peers.NUM_CLASSES, CLASSES.things, CLASSES.names)
    return lambda: evaluator.update((predicted, predicted_labels), truth, labels)


def instance_stream(side: int) -> Callable[[], None]:
    """A hundred instances, as COCO counts: those of the drawn prediction, five times over with falling scores."""
    predicted, truth = drawn_maps(NUM_SEGMENTS, side)
    numbers = [number for number in np.unique(predicted).tolist() if number]
    rows = [(number, 1 / (1 + turn)) for turn in range(NUM_INSTANCES // NUM_SEGMENTS) for number in numbers]
    masks = PackedMasks.empty(len(rows), predicted.shape)
    for place, (number, _) in enumerate(rows):
        masks[place] = predicted == number
    segments = tuple(Segment(i, number, True, score, i, 0) for i, (number, score) in enumerate(rows))
    prediction = Prediction("instance", masks=masks, segments=segments)
    ids = [number for number in np.unique(truth).tolist() if number]
    segments_of_truth = Segments.from_id_map(truth, ids, ids)
    evaluator = InstanceEvaluator(peers.NUM_CLASSES, CLASSES.names)
    return lambda: evaluator.update(prediction, segments_of_truth)


STREAMS = {"semantic": semantic_stream, "panoptic": panoptic_stream, "instance": instance_stream}


def random_model(small: bool) -> Mask2Former:
    torch.manual_seed(0)
    options = peers.SMALL["ours"] if small else {}
    return build_model(ModelConfig(num_classes=peers.NUM_CLASSES, backbone_weights=None, **options)).eval()


def add_rows(table: Table, device: str, small: bool) -> None:
    """Inference and stream of all tasks, and what share of the first the second is."""
    model = random_model(small).to(device)
    picture = peers.random_images(1, small)[0].permute(1, 2, 0).contiguous().numpy()
    for task, stream in STREAMS.items():
        inference = peers.median_seconds(lambda task=task: model.predict(picture, task, classes=CLASSES), device)
        update = statistics.median(timeit.repeat(stream(len(picture)), number=1, repeat=UPDATES))
        table.add(f"{device}, {task}", f"{1000 * inference:.1f}", f"{1000 * update:.3f}", f"{update / inference:.2%}")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and 64 pixels: whether all of it runs")
    options = parser.parse_args(given)
    side = 64 if options.small else peers.SIDE
    table = Table("evaluation", (f"one image of {side} × {side}", *COLUMNS))
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            for task in STREAMS:
                table.add(f"{device}, {task}", *["not measured"] * len(COLUMNS))
        else:
            add_rows(table, device, options.small)
    table.finish()


if __name__ == "__main__":
    main()
