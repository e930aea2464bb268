"""Training: one plain loop.

    every step    draw a batch, run the model, match, weigh the losses, clip the gradient, update the weights (step.py)
    every N       write a row, evaluate, write a checkpoint

Two choices make a run that was killed and continued draw what one draws that was never stopped. Batch number n depends
on (seed, n) alone. And before every step all random number generators are seeded from (seed, iteration, process), so
that none of their states needs to be stored, and nothing done between steps (an evaluation, a callback that draws)
changes what follows.

On a CPU both runs end with exactly the same weights. On CUDA that holds only with `optimization.deterministic=True`
(untested on a GPU): other sums run there in an order that changes from run to run.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from m2f_lab.data import Batch, Classes, Dataset, open_dataset, training_batches, transfer_ahead
from m2f_lab.evaluation import evaluate
from m2f_lab.loss import Criterion
from m2f_lab.recipes import Recipe
from m2f_lab.references import reference_to, resolve
from m2f_lab.training import checkpoint
from m2f_lab.training.average import WeightAverage
from m2f_lab.training.callbacks import Callback
from m2f_lab.training.checkpoint import Progress
from m2f_lab.training.determinism import deterministic_algorithms
from m2f_lab.training.distributed import DistributedContext, distributed_context
from m2f_lab.training.interrupt import defer_interrupt
from m2f_lab.training.optimizer import build_optimizer
from m2f_lab.training.planning.memory import keep_freed_memory
from m2f_lab.training.run import Run, append_row, keep_rows, open_run
from m2f_lab.training.step import TrainStep, autocast_dtype, seed_everything
from m2f_lab.weights import (
    Builder,
    LoadReport,
    OtherClassesError,
    build_from,
    load_weights,
    save_weights,
    saved_classes,
)


def train(
    recipe: Recipe,
    data: str | Path | Mapping[str, Dataset],
    out: str | Path,
    callbacks: Sequence[Callback] = (),
    resume: str = "auto",
    *,
    build: Builder | None = None,
    criterion: Callable[[Recipe], Criterion] | None = None,
    init: str | Path | None = None,
    keep_classes: bool = False,
) -> Run:
    """Train a model, on the GPU if there is one, on several under `torchrun`.

    An interrupt (Ctrl-C, or the notebook's stop button) lets the current step finish, writes a checkpoint, frees the
    GPU and returns the unfinished run. The same call continues it.

    Args:
        recipe: everything that decides what the run does.
        data: the data set's folder, or two data sets, {"train": Dataset, "val": Dataset}.
        out: the run's folder; `m2f_lab.training.run` describes its files. On several machines that of the main process
            counts: it alone reads and writes it, and sends the others what it read.
        callbacks: objects that report on the run; see `m2f_lab.training.callbacks`.
        resume: "auto" continues from a checkpoint of this recipe in `out` if there is one; "must" insists on one;
            "never" deletes the run that is there.
        build: ModelConfig → module whose forward(images) or forward(images, targets) returns an Output; replaces the
            recipe's builder, and is recorded under its name, so that the run can be reopened.
        criterion: Recipe → Criterion; replaces the recipe's, and is recorded alike.
        init: weights of a whole model to start from, of any format that `load_weights` knows: a run's folder, a
            checkpoint. Its class head is kept where it predicts the same classes (by name, where it has names), else
            the model's own is trained. A run that goes on has its own weights already.
        keep_classes: with `init`, begin with its rows of the class head where classes have the same name.

    Returns:
        The run, with its metrics and its weights.

    Raises:
        ValueError: `out` holds a run of another recipe, builder or criterion; or data, recipe and processes do not fit
            together.
        FileNotFoundError: data are missing, or a checkpoint that must be there.
        FloatingPointError: a loss or the gradient is not finite; names the iteration and the images.
    """
    run = Run(out)
    build = build or resolve(recipe.builder)
    criterion = criterion or resolve(recipe.criterion)
    recipe = recipe.vary(builder=reference_to(build), criterion=reference_to(criterion))
    with (
        deterministic_algorithms(recipe.optimization.deterministic),
        distributed_context() as world,
        keep_freed_memory(world.device),
    ):
        train_set, val_set = open_splits(recipe, data)  # missing validation data raise now, not hours later
        check_fit(recipe, train_set, world)
        check_fit(recipe, val_set, world)
        world.from_main(lambda: open_run(run.path, recipe, resume))  # only now: "never" deletes
        session = Session(
            recipe, train_set, val_set, run, callbacks if world.is_main else (), world, init, keep_classes
        )
        session.notify("on_start", run)
        run.current_model = session.model
        try:
            session.take_steps()
        except KeyboardInterrupt:
            session.save_after_interrupt()
        finally:
            run.current_model = None  # holding a Run must not pin GPU memory
        session.notify("on_end", run)
        del session
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return run


class Session:
    """A run while it is trained.

    Attributes:
        model: in training.
        average: of its weights, if the recipe asks for one.
        criterion: built by the recipe's criterion function.
        learner: takes the steps.
        progress: goes into every checkpoint, as do the model and the optimiser.
    """

    def __init__(
        self,
        recipe: Recipe,
        train_set: Dataset,
        val_set: Dataset,
        run: Run,
        callbacks: Sequence[Callback],
        world: DistributedContext,
        init: str | Path | None = None,
        keep_classes: bool = False,
    ) -> None:
        self.recipe, self.config = recipe, recipe.optimization
        self.train_set, self.val_set = train_set, val_set
        self.run, self.callbacks, self.world = run, callbacks, world
        self.model = model_to_train(recipe, world.device, train_set.classes)
        if init is not None and world.is_main and not run.checkpoint("last").is_dir():  # DDP sends it to the others
            print(start_from(self.model, init, keep_classes))
        self.criterion = resolve(recipe.criterion)(recipe)
        if not isinstance(self.criterion, Criterion):
            raise ValueError(
                f"{recipe.criterion} returned a {type(self.criterion).__name__}; a criterion function takes a Recipe "
                "and returns a Criterion."
            )
        self.optimizer = build_optimizer(self.model, self.config)
        precision = autocast_dtype(self.config.precision, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16)
        decay = self.config.ema_decay
        self.average = None if decay is None else WeightAverage(self.model, decay)
        self.progress = world.from_main(self._load_progress)  # the other processes may not see its folder
        checkpoint.share(world, self.model, self.optimizer, self.scaler, self.average)
        self.learner = TrainStep(
            recipe=recipe,
            model=world.wrap_ddp(self.model),
            criterion=self.criterion,
            optimizer=self.optimizer,
            scaler=self.scaler,
            precision=precision,
            world=world,
        )
        self.rows = run.path / "metrics.jsonl"
        if world.is_main:
            keep_rows(self.rows, self.progress.num_rows)
        self.saved = self.progress.iteration
        self.step_in_progress = False  # True while some weights are updated and others not
        self.durations: deque[float] = deque(maxlen=20)  # of the last steps, in seconds
        self.clock = time.perf_counter()

    @property
    def measured(self) -> nn.Module:
        """The model that is evaluated, and kept if it is the best: the average, if there is one."""
        return self.model if self.average is None else self.average.model

    def _load_progress(self) -> Progress:
        """Continue from the last checkpoint, if there is one."""
        terms, last = list(self.criterion.term_names), self.run.checkpoint("last")
        if not last.is_dir():
            return Progress(terms=terms)
        progress = checkpoint.load(last, self.model, self.optimizer, self.scaler, self.average)
        if progress.terms not in (None, terms):
            raise ValueError(
                f"{self.run.path} was trained with the loss terms {', '.join(progress.terms)}; {self.recipe.criterion} "
                f"now gives {', '.join(terms)}. Choose another folder, restore the criterion, or start over with "
                'resume="never", which deletes the run that is there.'
            )
        progress.terms = terms
        return progress

    def take_steps(self) -> None:
        """Train to the end."""
        self.evaluate_and_save()  # due when the run was interrupted
        for batch in self.batches():
            self.step(batch)
            self.evaluate_and_save()

    def batches(self) -> Iterator[Batch]:
        """This process's share of the batches from here to the end, on its device."""
        batches = training_batches(
            self.train_set,
            self.recipe.data,
            batch_size=self.config.batch_size,
            seed=self.recipe.seed,
            start_batch=self.progress.iteration,
            num_batches=self.config.max_iterations - self.progress.iteration,
            rank=self.world.rank,
            world_size=self.world.size,
            pin_memory=self.world.device.type == "cuda",
            task=self.recipe.task,
        )
        return transfer_ahead(batches, self.world.device)

    def step(self, batch: Batch) -> None:
        """Take one optimiser step and report it. An interrupt waits until it is complete."""
        with defer_interrupt():
            self.step_in_progress = True
            losses = self.learner.step(batch, self.progress.iteration)
            self.durations.append(time.perf_counter() - self.clock)
            self.progress.iteration += 1
            if self.average is not None:
                self.average.update(self.progress.iteration)
            self.progress.seconds += self.durations[-1]
            row = {"kind": "step", "iteration": self.progress.iteration} | losses
            row["images_per_second"] = self.config.batch_size * len(self.durations) / sum(self.durations)
            row["seconds"] = self.progress.seconds
            row["memory_gib"] = peak_memory(self.world.device)
            if self._is_due(self.config.log_every):
                self._write(row)
            self.step_in_progress = False
        self.notify("on_step", row)
        self.clock = time.perf_counter()

    def evaluate_and_save(self) -> None:
        """Evaluate and write a checkpoint, if they are due."""
        if self._is_due(self.config.evaluate_every, done=self.progress.evaluated):
            try:
                figures = evaluate(
                    self.measured, self.recipe, self.val_set, rank=self.world.rank, world_size=self.world.size
                )
            except Exception:  # a label that cannot be read, for example, costs no step
                self._save()
                raise
            row = {"kind": "evaluation", "iteration": self.progress.iteration} | figures
            with defer_interrupt():
                metric, best = self.recipe.metric, self.progress.best
                reached = -1.0 if row[metric] is None else row[metric]  # nothing to measure: worse than anything
                if best is None or reached > best[metric]:
                    self.progress.best = {"iteration": row["iteration"], metric: reached}
                    if self.world.is_main:
                        checkpoint.replace_folder(
                            self.run.checkpoint("best"), lambda new: save_weights(self.measured, new)
                        )
                self.progress.evaluated = self.progress.iteration
                self._write(row)
            self.notify("on_evaluation", row)
        if self._is_due(self.config.checkpoint_every, done=self.saved):
            self._save()
        self.clock = time.perf_counter()

    def save_after_interrupt(self) -> None:
        """Write a checkpoint, unless a second interrupt stopped a step in the middle."""
        if not self.step_in_progress and self.progress.iteration > 0:
            self._save()
        if self.world.is_main:
            reached = self.run.iteration
            found = f"a checkpoint at iteration {reached}" if reached else "no checkpoint"
            print(f"Interrupted. {self.run.path} holds {found}; the same call goes on from there.")

    def notify(self, event: str, subject: Run | dict) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(subject)

    def _is_due(self, every: int, done: int = 0) -> bool:
        """True every `every` iterations and at the end, unless already done at `done`."""
        iteration = self.progress.iteration
        return iteration > done and (iteration == self.config.max_iterations or iteration % every == 0)

    def _write(self, row: dict) -> None:
        if self.world.is_main:
            append_row(self.rows, row)
        self.progress.num_rows += 1

    def _save(self) -> None:
        if self.world.is_main:
            folder = self.run.checkpoint("last")
            checkpoint.save(folder, self.model, self.optimizer, self.scaler, self.progress, self.average)
        self.saved = self.progress.iteration


def open_splits(recipe: Recipe, data: str | Path | Mapping[str, Dataset]) -> tuple[Dataset, Dataset]:
    """Open the training and the validation split, or take them as they were given."""
    if isinstance(data, str | Path):
        return tuple(open_dataset(recipe.data.dataset, data, split, task=recipe.task) for split in ("train", "val"))
    if not isinstance(data, Mapping) or set(data) != {"train", "val"}:
        raise ValueError(
            f'data must be a folder or {{"train": Dataset, "val": Dataset}}, got {type(data).__name__}'
            + (f" with {sorted(data)}." if isinstance(data, Mapping) else ".")
        )
    return data["train"], data["val"]


def model_to_train(recipe: Recipe, device: torch.device, classes: Classes | None = None) -> nn.Module:
    """Build the recipe's model at its beginning, as it is trained on this device.

    Raises:
        ValueError: the recipe wants the backbone checkpointed, but the model cannot.
    """
    seed_everything(recipe.seed)
    model = build_from(resolve(recipe.builder), recipe.model, classes).to(device)
    if recipe.optimization.checkpoint_backbone:
        recompute = getattr(getattr(model, "backbone", None), "recompute", None)
        if recompute is None:
            raise ValueError(
                f"optimization.checkpoint_backbone calls model.backbone.recompute(), but the {type(model).__name__} "
                f"that {recipe.builder} builds has none. Set it to False, or give the backbone this method."
            )
        recompute()
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # convolutions in mixed precision run faster
    return model


def start_from(model: nn.Module, init: str | Path, keep_classes: bool = False) -> LoadReport:
    """Load the weights that training starts from, without the class head of other classes.

    Args:
        model: with its classes
        init: a run's folder or a checkpoint
        keep_classes: of a class head of other classes, take the rows of those that have the same name

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of another architecture; the model stays as it was.
    """
    path = Path(init).expanduser()
    path = Run(path).weights("best") if (path / "recipe.json").is_file() else path
    theirs, ours = saved_classes(path), getattr(model, "classes", None)
    others = theirs is not None and ours is not None and theirs.names != ours.names
    if not others:
        try:
            return load_weights(model, path)
        except OtherClassesError:
            pass
    return load_weights(model, path, reset_classifier=True, keep_classes=keep_classes)


def check_fit(recipe: Recipe, dataset: Dataset, world: DistributedContext) -> None:
    """Raise a ValueError if the data set, the recipe and the processes do not fit together."""
    num_classes = len(dataset.classes)
    if num_classes != recipe.model.num_classes:
        raise ValueError(
            f"The data set {dataset} has {num_classes} classes, the model of the recipe {recipe.name!r} "
            f"{recipe.model.num_classes}. Use recipe.vary(model=dict(num_classes={num_classes}))."
        )
    parts = recipe.optimization.accumulation_steps * world.size
    if recipe.optimization.batch_size % parts:
        raise ValueError(
            f"A batch of {recipe.optimization.batch_size} images cannot be shared by {world.size} processes in "
            f"{recipe.optimization.accumulation_steps} parts each; make optimization.batch_size a multiple of {parts}."
        )


def peak_memory(device: torch.device) -> float:
    """Peak of the memory in use so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where a process's ru_maxrss begins with that of the process that started it
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    import resource  # absent on Windows, which trains on GPUs

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
