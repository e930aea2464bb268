"""Reports on a run: the protocol of callbacks, and a progress bar.

A callback is any object with these four methods. They are called between steps, in the process that writes the files,
after the files are written: all that a callback reads from `run` is complete. Between steps `run.current_model` is the
model itself; predicting with it leaves it, and the steps that follow, as they were. An exception from a callback
ends the training; KeyboardInterrupt interrupts it like Ctrl-C.
"""

from __future__ import annotations

from typing import Protocol

from m2f_lab.training.run import Run


class Callback(Protocol):
    def on_start(self, run: Run) -> None:
        """Before the first step of this session; it starts at `run.iteration`."""

    def on_step(self, row: dict) -> None:
        """After every optimiser step.

        Args:
            row: "kind" ("step"), "iteration" (steps taken so far), "loss" (the weighted sum that is minimised), every
                term of the criterion by prediction ("0.class", "0.mask", …, unweighted), "learning_rate" (of the
                decoders), "gradient_norm" (before clipping; None where float16 overflowed and the step was skipped),
                "images_per_second" (over the last steps), "seconds" (of training so far) and "memory_gib" (the peak:
                of the GPU, or of the process on a CPU). Every `log_every`-th row goes to `metrics.jsonl`.
        """

    def on_evaluation(self, row: dict) -> None:
        """After every evaluation.

        Args:
            row: "kind" ("evaluation"), "iteration", and the figures of `m2f_lab.evaluate`, such as "mIoU" in percent.
        """

    def on_end(self, run: Run) -> None:
        """When training is finished or was interrupted; not after an error."""


class ProgressBar:
    """A tqdm progress bar and a one-line summary."""

    def on_start(self, run: Run) -> None:
        from tqdm.auto import tqdm  # it looks for Jupyter's widgets, which only a notebook has

        total = run.recipe.optimization.max_iterations
        self.bar = tqdm(total=total, initial=run.iteration, desc=run.recipe.name, unit="step", dynamic_ncols=True)
        self.figures, self.metric = {}, run.recipe.metric

    def on_step(self, row: dict) -> None:
        self.figures |= {"loss": f"{row['loss']:.2f}", "images/s": f"{row['images_per_second']:.1f}"}
        self.bar.set_postfix(self.figures, refresh=False)
        self.bar.update()

    def on_evaluation(self, row: dict) -> None:
        if row[self.metric] is not None:
            self.figures |= {self.metric: f"{row[self.metric]:.1f} %"}
        self.bar.set_postfix(self.figures)

    def on_end(self, run: Run) -> None:
        self.bar.close()
        print(summary(run))


def summary(run: Run) -> str:
    """One sentence on a run: iterations, time, and its best evaluation."""
    recipe, steps, best = run.recipe, run.steps, run.best
    text = f"{recipe.name}: {run.iteration} of {recipe.optimization.max_iterations} iterations"
    if steps:
        minutes, seconds = divmod(round(steps[-1]["seconds"]), 60)
        text += f" in {minutes} min {seconds:02d} s"
    if best:
        text += f", best {recipe.metric} {best[recipe.metric]:.1f} % at iteration {best['iteration']}"
    return f"{text}. Everything is in {run.path}."
