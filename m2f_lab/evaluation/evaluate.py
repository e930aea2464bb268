"""Run a model over a split of a data set and measure it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from m2f_lab.data import Dataset, Sample, open_dataset
from m2f_lab.evaluation.measures import MEASURES, Measure
from m2f_lab.evaluation.report import Report
from m2f_lab.evaluation.unfinished import Unfinished, key_of
from m2f_lab.inference.predict import Model, evaluating
from m2f_lab.recipes import Recipe
from m2f_lab.references import is_reference, resolve_loaded
from m2f_lab.structures import Prediction


def evaluate(
    model: Model,
    recipe: Recipe,
    data: str | Path | Dataset,
    *,
    split: str | None = None,
    limit: int | None = None,
    multi_scale: bool = False,
    progress: bool = False,
    out: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict:
    """Measure a model on a data set, each image at its own size.

    Args:
        model: a Mask2Former, or any callable images [B, 3, H, W] → Output
        recipe: names the data set, and the size at which the model sees its images (`recipe.evaluation`)
        data: the folder of the data set, or a data set
        split: of the folder, "val" (by default) or "train"
        limit: only the first so many images
        multi_scale: average over the sizes of the multi-scale figure and mirror images; semantic only
        progress: show a progress bar
        out: a folder for evaluation.json (these figures, and one for each image) and report.html (classes, confusions,
            the worst images); of one process. An evaluation that was interrupted goes on where it stopped
        rank, world_size: with several processes, each measures every `world_size`-th image, and the counts are added
            up over `torch.distributed`; all of them must call this function, and all return the same

    Returns:
        The figures of the task's evaluator: `SemanticEvaluator`, `PanopticEvaluator` (and, of the same model,
        `InstanceEvaluator` for things and mIoU) or `InstanceEvaluator`; `format_table` makes them readable.

    Raises:
        ValueError: model and data set have different numbers of classes, the data set has no annotation for the
            recipe's task, a split was given with a data set, or the recipe has no multi-scale figure.
    """
    _check_options(recipe, limit, multi_scale, out, world_size)
    dataset = _opened(recipe, data, split)
    config = getattr(model, "config", None) or recipe.model
    if config.num_classes != len(dataset.classes):
        raise ValueError(
            f"The model predicts {config.num_classes} classes, but {dataset} has {len(dataset.classes)}. "
            f"Build the model with num_classes={len(dataset.classes)}, or choose the data set it was trained on."
        )
    count = len(dataset) if limit is None else min(limit, len(dataset))
    indices = range(rank, count, world_size)
    sizes = {"multi_scale": True} if multi_scale else {}
    measure = MEASURES[recipe.task](dataset.classes, recipe.evaluation, **sizes)
    report = None if out is None else Report(recipe, dataset)
    key = None if report is None else key_of(model, recipe, dataset, count, multi_scale)
    unfinished = None if key is None else Unfinished(out, key, measure.evaluators, report)
    done = 0 if unfinished is None else unfinished.restore()
    indices = indices[done:]
    samples = tqdm(
        _read_ahead(dataset, indices, recipe.data.num_workers), desc=f"evaluate {dataset}",
        initial=done, total=done + len(indices), unit="image", disable=not progress,
    )  # fmt: skip
    with evaluating(model), ThreadPoolExecutor(1) as beside:
        counted = None
        for index, sample in zip(indices, samples, strict=True):
            if not measure.has_truth(sample):
                raise ValueError(
                    f"{sample.name} of {dataset} has no annotation for task={recipe.task!r}; open the data set with "
                    f"open_dataset(…, task={recipe.task!r}), or evaluate a recipe of another task."
                )
            predictions = measure.predict(model, sample.image)
            if counted is not None:
                counted.result()  # raises what went wrong
            # Count while the model runs on the next image: on a fast GPU, counting takes a tenth of the time.
            counted = beside.submit(_count, measure, report, unfinished, predictions, sample, index)
        if counted is not None:
            counted.result()
    if world_size > 1:
        for evaluator in measure.evaluators:
            evaluator.all_reduce()
    figures = measure.result()
    if report is not None:
        report.write(out, figures, measure)
    if unfinished is not None:
        unfinished.remove()
    return figures


def _check_options(
    recipe: Recipe, limit: int | None, multi_scale: bool, out: str | Path | None, world_size: int
) -> None:
    if out is not None and world_size > 1:
        raise ValueError("A report holds the images of one process; evaluate without out=, or in one process.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a positive number of images, got {limit}.")
    if multi_scale and recipe.task != "semantic":
        raise ValueError(f"Only semantic models have a multi-scale figure; {recipe.name} is a {recipe.task} one.")


def _count(
    measure: Measure,
    report: Report | None,
    unfinished: Unfinished | None,
    predictions: tuple[Prediction, ...],
    sample: Sample,
    number: int,
) -> None:
    """Count an image; for a report, on its own first."""
    if report is None:
        measure.update(predictions, sample, number)
        return
    alone = type(measure)(measure.classes, measure.config)
    alone.update(predictions, sample, number)
    report.add(number, sample, predictions, alone)
    for evaluator, other in zip(measure.evaluators, alone.evaluators, strict=True):
        evaluator.merge(other)
    if unfinished is not None:
        unfinished.save_in_time()


def _opened(recipe: Recipe, data: str | Path | Dataset, split: str | None) -> Dataset:
    if isinstance(data, str | Path):
        name = recipe.data.dataset
        if is_reference(name):
            resolve_loaded(name)  # the recipe may be a stranger's: nothing is imported because it says so
        return open_dataset(name, data, split or "val", task=recipe.task)
    if split is not None:
        raise ValueError(f"split={split!r} belongs to a folder; a data set ({data}) is a split already.")
    return data


def _read_ahead(dataset: Dataset, indices: Sequence[int], num_workers: int) -> Iterator[Sample]:
    """Yield the samples in order, while threads decode the next ones: PIL releases the interpreter lock."""
    if num_workers == 0:
        yield from (dataset[index] for index in indices)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        waiting = deque()
        try:
            for index in indices:
                waiting.append(pool.submit(dataset.__getitem__, index))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
