"""The command line: a thin layer over train, evaluate, plan and audit. Several GPUs:

torchrun --nproc_per_node 8 -m m2f_lab train ade20k_swin_tiny --data-root data/ADEChallengeData2016 --out runs/tiny
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch

from m2f_lab import recipes
from m2f_lab.data import audit, open_dataset
from m2f_lab.evaluation import evaluate
from m2f_lab.model import build_model
from m2f_lab.recipes import Recipe
from m2f_lab.training import ProgressBar, Run, plan, train
from m2f_lab.training.step import autocast_dtype
from m2f_lab.weights import load_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where something is wrong, 130 where training was interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
        if options.traceback:
            raise
        print(f"m2f_lab: {error}\n(--traceback shows where this comes from.)", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m m2f_lab",
        description="Plan, train, evaluate and check Mask2Former.",
        epilog="On several GPUs: torchrun --nproc_per_node 8 -m m2f_lab train …",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    recipe_help = 'a recipe\'s name; "python -m m2f_lab recipes" lists them'

    command = commands.add_parser("train", help="train a recipe, or continue", description=cli_train.__doc__)
    command.add_argument("recipe", metavar="RECIPE", help=recipe_help)
    command.add_argument("--data-root", required=True, type=Path, metavar="DIR", help="the data set's folder")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the run's folder")
    command.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto",
        help="auto: continue where there is a checkpoint; must: insist on one; never: delete the run that is there",
    )  # fmt: skip
    _add_set(command)
    command.set_defaults(run=cli_train)

    command = commands.add_parser("plan", help="say what a training would take", description=cli_plan.__doc__)
    command.add_argument("recipe", metavar="RECIPE", help=recipe_help)
    command.add_argument("--device", help="cpu, cuda, cuda:1, …; by default the GPU if there is one")
    command.add_argument("--gib", type=float, metavar="N", help="plan for so much memory instead of what is free now")
    _add_set(command)
    command.set_defaults(run=cli_plan)

    command = commands.add_parser("evaluate", help="measure weights", description=cli_evaluate.__doc__)
    command.add_argument("weights", type=Path, metavar="RUN_OR_WEIGHTS", help="a run's folder, or a checkpoint")
    command.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"{recipe_help}; a run has its own")
    command.add_argument("--data-root", required=True, type=Path, metavar="DIR", help="the data set's folder")
    command.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16", "auto"), default="float32",
        help="of the model, under autocast; auto: bfloat16 on GPUs that have it; masks and classes are combined in "
        "float32 in any case",
    )  # fmt: skip
    _add_set(command)
    command.set_defaults(run=cli_evaluate)

    command = commands.add_parser("recipes", help="list the recipes", description=cli_recipes.__doc__)
    command.set_defaults(run=cli_recipes)

    command = commands.add_parser("audit", help="check a data set", description=cli_audit.__doc__)
    command.add_argument("dataset", metavar="DATASET", choices=("ade20k", "cityscapes", "folder"),
                         help="ade20k, cityscapes, or folder (ADE20K's layout with a classes.txt)")  # fmt: skip
    command.add_argument("--data-root", required=True, type=Path, metavar="DIR", help="the data set's folder")
    command.add_argument("--split", choices=("train", "val"), default="train")
    command.add_argument("--limit", type=int, metavar="N", help="read N images only")
    command.set_defaults(run=cli_audit)
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes",
        help="change a field of the recipe, for example optimization.max_iterations=100; may be repeated",
    )  # fmt: skip


def cli_train(options: argparse.Namespace) -> int:
    """Train a recipe. Where --out holds a checkpoint of the same recipe, continue there."""
    recipe = changed(recipe_named(options.recipe), options.changes)
    run = train(recipe, options.data_root, options.out, callbacks=[ProgressBar()], resume=options.resume)
    return 0 if run.finished else 130


def cli_plan(options: argparse.Namespace) -> int:
    """Try out training steps for a few minutes: does a recipe fit, in how many parts, and how long will it take?"""
    recipe = changed(recipe_named(options.recipe), options.changes)
    print(plan(recipe, options.device, available=options.gib))
    return 0


def cli_evaluate(options: argparse.Namespace) -> int:
    """Measure the best weights of a run, or any checkpoint that load_weights knows, on the validation images."""
    is_run = (options.weights / "recipe.json").is_file()
    if options.recipe is None and not is_run:
        raise ValueError(f"{options.weights} is not a run, so its recipe must be named: evaluate WEIGHTS RECIPE.")
    recipe = Run(options.weights).recipe if options.recipe is None else recipe_named(options.recipe)
    recipe = changed(recipe, options.changes)
    if is_run:
        model = Run(options.weights).model()
    else:
        model = build_model(replace(recipe.model, backbone_weights=None))
        print(load_weights(model, options.weights))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = autocast_dtype(options.precision, device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        figures = evaluate(model.to(device), recipe, options.data_root)
    for name, value in figures.items():
        if isinstance(value, int | float):
            print(f"{name:10s} {value:6.2f}")
    return 0


def cli_recipes(options: argparse.Namespace) -> int:
    """List the recipes: backbone, classes, crop, iterations, and the figures their authors published, in percent."""
    print(f"{'recipe':24s} {'backbone':38s} {'classes':>7s} {'crop':>10s} {'iterations':>10s}  published")
    for name, make in recipe_functions().items():
        recipe = make()
        height, width = recipe.data.crop_size
        published = ", ".join(f"{metric} {value:.1f}" for metric, value in recipe.published.items()) or "–"
        print(
            f"{name:24s} {recipe.model.backbone:38s} {recipe.model.num_classes:7d} {f'{height}×{width}':>10s} "
            f"{recipe.optimization.max_iterations:10,d}  {published}"
        )
    return 0


def cli_audit(options: argparse.Namespace) -> int:
    """Read a data set's labels and report what would train wrongly; the exit status is 1 if there is anything."""
    report = audit(open_dataset(options.dataset, options.data_root, options.split, strict=False), limit=options.limit)
    print(report)
    report.raise_if_wrong()
    return 0


def recipe_functions() -> dict[str, Callable[[], Recipe]]:
    """The functions of `m2f_lab.recipes` that make a recipe, by name."""
    return {
        name: function
        for name, function in inspect.getmembers(recipes, inspect.isfunction)
        if not name.startswith("_") and inspect.signature(function).return_annotation == "Recipe"
    }


def recipe_named(name: str) -> Recipe:
    functions = recipe_functions()
    if name not in functions:
        close = difflib.get_close_matches(name, functions, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(functions)}."
        raise ValueError(f"There is no recipe called {name!r}. {hint}")
    return functions[name]()


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with fields changed.

    Args:
        changes: "field=value" or "part.field=value". Values are read as JSON where they are JSON
            (3, 0.5, true, null, [96, 128]), else as they stand.

    Raises:
        ValueError: there is no such field, or the value is of another kind than the recipe's own.
    """
    for change in changes:
        path, sign, text = change.partition("=")
        if not sign:
            raise ValueError(f"--set {change}: expected FIELD=VALUE, for example optimization.max_iterations=100.")
        *parts, field = path.split(".")
        owner = recipe
        for part in parts:
            owner = _field(owner, part, path)
        value = _like(_field(owner, field, path), _parsed(text), path)
        recipe = recipe.vary(**({parts[0]: {field: value}} if parts else {field: value}))
    return recipe


def _field(owner, name: str, path: str):
    names = [f.name for f in fields(owner)] if is_dataclass(owner) else []
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(names) or 'no fields there'}."
        raise ValueError(f"--set {path}: a recipe has no such field. {hint}")
    return getattr(owner, name)


def _parsed(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _like(old, new, path: str):
    """`new`, if it is of the same kind as `old`; lists become tuples, whole numbers floats where those are meant."""
    if isinstance(old, tuple) and isinstance(new, list):
        return tuple(new)
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        return float(new)
    is_free = None in (old, new) or path == "model.backbone_weights"  # which is True, a path or nothing
    if is_dataclass(old) or (type(old) is not type(new) and not is_free):
        raise ValueError(f"--set {path}={new}: expected something like {old!r}, got {type(new).__name__} {new!r}.")
    return new


if __name__ == "__main__":
    sys.exit(main())
