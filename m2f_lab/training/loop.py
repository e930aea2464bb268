"""Training: one plain loop.

    every step    draw a batch, run the model, match, weigh the losses, clip the gradient, update the weights (step.py)
    every N       write a row, evaluate, write a checkpoint

Two choices make a run that was killed and continued end with exactly the weights of one that was never stopped. Batch
number n depends on (seed, n) alone. And before every step all random number generators are seeded from (seed,
iteration, process), so that none of their states needs to be stored, and nothing done between steps (an evaluation, a
callback that draws) changes what follows.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from m2f_lab.data import Batch, Dataset, open_dataset, training_batches
from m2f_lab.evaluation import evaluate
from m2f_lab.loss import Criterion
from m2f_lab.model import Mask2Former, build_model
from m2f_lab.recipes import Recipe
from m2f_lab.training import checkpoint
from m2f_lab.training.callbacks import Callback
from m2f_lab.training.checkpoint import Progress
from m2f_lab.training.distributed import Processes, processes
from m2f_lab.training.interrupt import finish_first
from m2f_lab.training.memory import kept_memory
from m2f_lab.training.optimizer import build_optimizer
from m2f_lab.training.run import METRIC, Run, append_row, keep_rows, open_run
from m2f_lab.training.step import Learner, autocast_dtype, seed_everything
from m2f_lab.weights import save_weights


def train(
    recipe: Recipe,
    data_root: str | Path,
    out: str | Path,
    callbacks: Sequence[Callback] = (),
    resume: str = "auto",
) -> Run:
    """Train a model, on the GPU if there is one, on several under `torchrun`.

    An interrupt (Ctrl-C, or the notebook's stop button) lets the step at hand finish, writes a checkpoint, frees the
    GPU and returns the unfinished run. The same call continues it.

    Args:
        recipe: everything that decides what the run does.
        data_root: the data set's folder.
        out: the run's folder; `m2f_lab.training.run` says what it holds.
        callbacks: what reports on the run; see `m2f_lab.training.callbacks`.
        resume: "auto" continues where `out` holds a checkpoint of this recipe, else starts; "must" insists on a
            checkpoint; "never" deletes the run that is there.

    Returns:
        The run, with its metrics and its weights.

    Raises:
        ValueError: `out` holds a run of another recipe, or data, recipe and processes do not fit together.
        FileNotFoundError: data are missing, or a checkpoint that must be there.
        FloatingPointError: a loss or the gradient is not finite; names the iteration and the images.
    """
    run = Run(out)
    with processes() as world, kept_memory(world.device):
        dataset = open_dataset(recipe.data.dataset, data_root, "train")
        open_dataset(recipe.data.dataset, data_root, "val")  # what is missing is to be said now, not hours later
        check_fit(recipe, dataset, world)
        if world.is_first:
            open_run(run.path, recipe, resume)  # only now: "never" deletes
        world.wait()
        session = Session(recipe, dataset, run, callbacks if world.is_first else (), world)
        session.tell("on_start", run)
        run.current_model = session.model
        try:
            session.evaluate_and_save()  # what was due when the run was interrupted
            for batch in session.batches():
                session.step(batch)
                session.evaluate_and_save()
        except KeyboardInterrupt:
            session.save_after_interrupt()
        finally:
            run.current_model = None  # whoever keeps the run does not keep a GPU's memory
        session.tell("on_end", run)
        del session
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return run


class Session:
    """A run while it is trained.

    Attributes:
        learner: takes the steps.
        model: what it trains.
        progress: how far it is; goes into every checkpoint, as do the model and the optimiser.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, run: Run, callbacks: Sequence[Callback], world: Processes
    ) -> None:
        self.recipe, self.config, self.dataset = recipe, recipe.optimization, dataset
        self.run, self.callbacks, self.world = run, callbacks, world
        self.model = model_to_train(recipe, world.device)
        self.model.classes = dataset.classes
        self.optimizer = build_optimizer(self.model, self.config)
        precision = autocast_dtype(self.config.precision, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16)
        self.progress = Progress()
        if run.checkpoint("last").is_dir():
            self.progress = checkpoint.load(run.checkpoint("last"), self.model, self.optimizer, self.scaler)
        self.learner = Learner(
            recipe=recipe,
            model=world.share(self.model),
            criterion=Criterion(recipe.model.num_classes, **asdict(recipe.loss)),
            optimizer=self.optimizer,
            scaler=self.scaler,
            precision=precision,
            world=world,
        )
        self.rows = run.path / "metrics.jsonl"
        if world.is_first:
            keep_rows(self.rows, self.progress.num_rows)
        self.saved = self.progress.iteration
        self.torn = False  # whether some weights are updated and others not
        self.durations: deque[float] = deque(maxlen=20)  # of the last steps, in seconds
        self.clock = time.perf_counter()

    def batches(self) -> Iterator[Batch]:
        """The batches from here to the end; this process's share of them."""
        return training_batches(
            self.dataset,
            self.recipe.data,
            batch_size=self.config.batch_size,
            seed=self.recipe.seed,
            start_batch=self.progress.iteration,
            num_batches=self.config.max_iterations - self.progress.iteration,
            rank=self.world.rank,
            world_size=self.world.size,
            pin_memory=self.world.device.type == "cuda",
        )

    def step(self, batch: Batch) -> None:
        """Take one optimiser step and report it. An interrupt waits until it is whole."""
        with finish_first():
            self.torn = True
            losses = self.learner.step(batch, self.progress.iteration)
            self.durations.append(time.perf_counter() - self.clock)
            self.progress.iteration += 1
            self.progress.seconds += self.durations[-1]
            row = {"kind": "step", "iteration": self.progress.iteration} | losses
            row["images_per_second"] = self.config.batch_size * len(self.durations) / sum(self.durations)
            row["seconds"] = self.progress.seconds
            row["memory_gib"] = peak_memory(self.world.device)
            if self._is_due(self.config.log_every):
                self._write(row)
            self.torn = False
        self.tell("on_step", row)
        self.clock = time.perf_counter()

    def evaluate_and_save(self) -> None:
        """Evaluate and write a checkpoint, where it is time to."""
        if self._is_due(self.config.evaluate_every, done=self.progress.evaluated):
            try:
                figures = evaluate(
                    self.model, self.recipe, self.dataset.root, rank=self.world.rank, world_size=self.world.size
                )
            except Exception:  # say, a label that cannot be read: it costs no step
                self._save()
                raise
            row = {"kind": "evaluation", "iteration": self.progress.iteration} | figures
            with finish_first():
                best = self.progress.best
                if best is None or row[METRIC] > best[METRIC]:
                    self.progress.best = {"iteration": row["iteration"], METRIC: row[METRIC]}
                    if self.world.is_first:
                        checkpoint.replace_folder(
                            self.run.checkpoint("best"), lambda new: save_weights(self.model, new)
                        )
                self.progress.evaluated = self.progress.iteration
                self._write(row)
            self.tell("on_evaluation", row)
        if self._is_due(self.config.checkpoint_every, done=self.saved):
            self._save()
        self.clock = time.perf_counter()

    def save_after_interrupt(self) -> None:
        """Keep what was reached, unless a second interrupt tore a step."""
        if not self.torn and self.progress.iteration > 0:
            self._save()
        if self.world.is_first:
            reached = self.run.iteration
            found = f"a checkpoint at iteration {reached}" if reached else "no checkpoint"
            print(f"Interrupted. {self.run.path} holds {found}; the same call goes on from there.")

    def tell(self, event: str, subject: Run | dict) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(subject)

    def _is_due(self, every: int, done: int = 0) -> bool:
        """Whether what happens every so many iterations, and in the end, happens now; `done` is when it last did."""
        iteration = self.progress.iteration
        return iteration > done and (iteration == self.config.max_iterations or iteration % every == 0)

    def _write(self, row: dict) -> None:
        if self.world.is_first:
            append_row(self.rows, row)
        self.progress.num_rows += 1

    def _save(self) -> None:
        if self.world.is_first:
            folder = self.run.checkpoint("last")
            checkpoint.save(folder, self.model, self.optimizer, self.scaler, self.progress)
        self.saved = self.progress.iteration


def model_to_train(recipe: Recipe, device: torch.device) -> Mask2Former:
    """The recipe's model at its beginning, as it is trained on this device."""
    seed_everything(recipe.seed)
    model = build_model(recipe.model).to(device)
    if recipe.optimization.checkpoint_backbone:
        model.backbone.recompute()
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # convolutions in mixed precision run faster
    return model


def check_fit(recipe: Recipe, dataset: Dataset, world: Processes) -> None:
    """Raise a ValueError if the data set, the recipe and the processes do not fit together."""
    num_classes = len(dataset.classes)
    if num_classes != recipe.model.num_classes:
        raise ValueError(
            f"The data set {dataset.name!r} in {dataset.root} has {num_classes} classes, the model of the recipe "
            f"{recipe.name!r} {recipe.model.num_classes}. Say recipe.vary(model=dict(num_classes={num_classes}))."
        )
    parts = recipe.optimization.accumulation_steps * world.size
    if recipe.optimization.batch_size % parts:
        raise ValueError(
            f"A batch of {recipe.optimization.batch_size} images cannot be shared by {world.size} processes in "
            f"{recipe.optimization.accumulation_steps} parts each; make optimization.batch_size a multiple of {parts}."
        )


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where a process's ru_maxrss begins with that of the process that started it
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    import resource  # absent on Windows, which trains on GPUs

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
