"""The command line, `m2f-lab` or `python -m m2f_lab`: a thin layer over train, evaluate, plan and audit.

Several GPUs:

torchrun --nproc_per_node 8 -m m2f_lab train ade20k_swin_tiny --data-root data/ADEChallengeData2016 --out runs/tiny

A changed model, loss, recipe or data set is a function in a file of your own:

m2f-lab train debug_tiny --build my_models.py:build --criterion my_losses.py:criterion --data-root … --out …
"""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import json
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch
from torch import nn

from m2f_lab import ops, recipes
from m2f_lab.data import Classes, audit, distinct_colors, open_dataset
from m2f_lab.data.prepare import KINDS, prepare
from m2f_lab.evaluation import evaluate
from m2f_lab.evaluation.score import SCORES
from m2f_lab.evaluation.submission import numbering, write_submission
from m2f_lab.inference.files import predict_files
from m2f_lab.recipes import TASKS, Recipe
from m2f_lab.references import reference_to, resolve, resolve_file
from m2f_lab.training import ProgressBar, Run, plan, train
from m2f_lab.training.distributed import is_main_process
from m2f_lab.training.step import autocast_dtype
from m2f_lab.weights import build_from, load_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 after an error, 130 if training was interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
        if options.traceback:
            raise
        print(f"m2f_lab: {error}\n(--traceback shows its origin.)", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="m2f-lab",
        description="Plan, train, evaluate and check Mask2Former.",
        epilog="On several GPUs: torchrun --nproc_per_node 8 -m m2f_lab train …",
    )
    parser.add_argument("--traceback", action="store_true", help="show the origin of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="train a recipe, or continue", description=cli_train.__doc__)
    _add_recipe(command, trains=True)
    command.add_argument("--data-root", required=True, type=Path, metavar="DIR", help="the data set's folder")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the run's folder")
    command.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto",
        help="auto: continue from a checkpoint if there is one; must: insist on one; never: delete the run",
    )  # fmt: skip
    command.add_argument(
        "--init", type=Path, metavar="RUN_OR_WEIGHTS",
        help="start from the weights of a whole model; its class head stays where it predicts the same classes",
    )  # fmt: skip
    command.add_argument("--keep-classes", action="store_true", help="of --init, also the rows of classes by name")
    command.set_defaults(run=cli_train)

    command = commands.add_parser("plan", help="estimate memory and time", description=cli_plan.__doc__)
    _add_recipe(command, trains=True)
    command.add_argument("--device", help="cpu, cuda, cuda:1, …; by default the GPU if there is one")
    command.add_argument("--gib", type=float, metavar="N", help="plan for so much memory instead of what is free now")
    command.set_defaults(run=cli_plan)

    command = commands.add_parser("evaluate", help="measure weights", description=cli_evaluate.__doc__)
    command.add_argument("weights", type=Path, metavar="RUN_OR_WEIGHTS", help="a run's folder, or a checkpoint")
    _add_recipe(command, trains=False)
    command.add_argument("--data-root", required=True, type=Path, metavar="DIR", help="the data set's folder")
    command.add_argument("--split", choices=("train", "val"), default="val")
    command.add_argument("--multi-scale", action="store_true", help="semantic: average over several sizes, mirrored")
    command.add_argument("--out", type=Path, metavar="DIR", help="write evaluation.json and report.html there")
    _add_precision(command)
    command.set_defaults(run=cli_evaluate)

    command = commands.add_parser("recipes", help="list the recipes", description=cli_recipes.__doc__)
    command.add_argument("word", nargs="?", default="", metavar="WORD", help="only names that contain this")
    command.set_defaults(run=cli_recipes)

    command = commands.add_parser("audit", help="check a data set", description=cli_audit.__doc__)
    command.add_argument(
        "dataset", metavar="DATASET",
        help="ade20k, cityscapes, folder (ADE20K's layout with a classes.txt), or file.py:function of your own",
    )  # fmt: skip
    command.add_argument("--data-root", required=True, type=Path, metavar="DIR", help="the data set's folder")
    command.add_argument("--split", choices=("train", "val"), default="train")
    command.add_argument("--task", choices=TASKS, default="semantic", help="whose labels to read (semantic)")
    command.add_argument("--limit", type=int, metavar="N", help="read N images only")
    command.add_argument("--all", action="store_true", help="list every file, instead of 20 of each kind")
    command.set_defaults(run=cli_audit)

    _add_predict(commands)
    _add_prepare(commands)
    _add_score(commands)
    return parser


def _add_precision(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16", "auto"), default="float32",
        help="of the model, under autocast; auto: bfloat16 on GPUs that have it; masks and classes are combined in "
        "float32 in any case",
    )  # fmt: skip


def _add_predict(commands) -> None:
    command = commands.add_parser("predict", help="segment images", description=cli_predict.__doc__)
    command.add_argument("weights", type=Path, metavar="RUN_OR_WEIGHTS", help="a run's folder, or a checkpoint")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, and folders of them")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    command.add_argument("--task", choices=TASKS, help="by default the recipe's")
    command.add_argument("--overlays", action="store_true", help="also write pictures of the results")
    command.add_argument("--overwrite", action="store_true", help="predict again what is there")
    command.add_argument(
        "--submission", action="store_true",
        help="also write what the server of the recipe's data set takes, in the folder submission",
    )  # fmt: skip
    command.add_argument("--like", type=Path, metavar="JSON", help="a file in COCO's format whose ids a submission has")
    _add_recipe(command, trains=False, by_position=False)
    _add_precision(command)
    command.set_defaults(run=cli_predict)


def _add_prepare(commands) -> None:
    command = commands.add_parser("prepare", help="rewrite your own labels", description=cli_prepare.__doc__)
    command.add_argument("source", type=Path, metavar="SOURCE", help="the folder of images and labels")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    command.add_argument("--kind", required=True, choices=KINDS, help="data/README.md shows the layout of each")
    command.add_argument("--split", choices=("train", "val"), default="train")
    command.add_argument("--classes", type=Path, metavar="FILE", help="the classes.txt of the new folder")
    command.add_argument(
        "--first-id", type=int, choices=(0, 1), help="of label maps: 0 with 255, or 1 with 0 unlabelled"
    )
    command.set_defaults(run=cli_prepare)


def _add_score(commands) -> None:
    command = commands.add_parser("score", help="measure files of results", description=cli_score.__doc__)
    command.add_argument("benchmark", choices=tuple(SCORES), help="whose figures")
    command.add_argument("truth", type=Path, metavar="TRUTH", help="JSON file; of Cityscapes a folder, gtFine/val")
    command.add_argument("results", type=Path, metavar="RESULTS", help="JSON file; of Cityscapes a folder")
    for name in ("truth", "results"):
        command.add_argument(
            f"--{name}-pictures", type=Path, metavar="DIR",
            help=f"panoptic: folder of the PNGs of {name.upper()}; by default named like it, without .json",
        )  # fmt: skip
    command.set_defaults(run=cli_score)


def _add_recipe(command: argparse.ArgumentParser, trains: bool, by_position: bool = True) -> None:
    """Add the arguments that `chosen_recipe` reads."""
    command.set_defaults(recipe=None)
    if by_position:
        name_help = 'a recipe\'s name; "m2f-lab recipes" lists them'
        command.add_argument("recipe", nargs="?", metavar="RECIPE", help=name_help)
    command.add_argument(
        "--recipe", dest="recipe_file", metavar="FILE",
        help="file.py:function, which returns a Recipe, a recipe.json, or a recipe's name",
    )  # fmt: skip
    command.set_defaults(criterion=None)
    functions = {"build": "ModelConfig → model"} | ({"criterion": "Recipe → Criterion"} if trains else {})
    for name, kind in functions.items():
        command.add_argument(
            f"--{name}", metavar="FILE.PY:FUNCTION",
            help=f"a function of your own, {kind}; file.py:function or package.module:function",
        )  # fmt: skip
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes",
        help="change a field of the recipe, for example optimization.max_iterations=100; may be repeated",
    )  # fmt: skip


def cli_train(options: argparse.Namespace) -> int:
    """Train a recipe. If --out holds a checkpoint of the same recipe, continue from it."""
    recipe = chosen_recipe(options)
    run = train(
        recipe, options.data_root, options.out, callbacks=[ProgressBar()], resume=options.resume, init=options.init,
        keep_classes=options.keep_classes,
    )  # fmt: skip
    return 0 if not is_main_process() or run.finished else 130  # the others may run on machines without the folder


def cli_plan(options: argparse.Namespace) -> int:
    """Take training steps for a few minutes to estimate whether a recipe fits, in how many parts, and its time."""
    print(plan(chosen_recipe(options), options.device, available=options.gib))
    return 0


def cli_evaluate(options: argparse.Namespace) -> int:
    """Measure the best weights of a run, or any checkpoint that load_weights knows, on the validation images."""
    model, recipe, computing = loaded(options)
    with computing:
        figures = evaluate(
            model, recipe, options.data_root, split=options.split, multi_scale=options.multi_scale, out=options.out
        )
    for name, value in figures.items():
        if isinstance(value, int | float):
            print(f"{name:10s} {value:6.2f}")
    return 0


def cli_predict(options: argparse.Namespace) -> int:
    """Segment images: label maps, panoptic pictures or instances, as files that other tools read; and overlays."""
    model, recipe, computing = loaded(options)
    task, config = options.task or recipe.task, recipe.evaluation
    classes = getattr(model, "classes", None) or numbered_classes(recipe.model.num_classes)
    sends = options.submission or options.like is not None
    if sends:
        numbering(recipe.data.dataset, task, options.like)  # says at once if there is none
    with computing:
        written = predict_files(
            model, options.images, options.out, task, classes=classes, overlays=options.overlays,
            overwrite=options.overwrite, **config.edges, **config.tiles, **config.options(task),
        )  # fmt: skip
    print(f"Everything is in {options.out}; the results are {written}.")
    if sends:
        submission = options.out / "submission"
        write_submission(options.out, submission, recipe.data.dataset, task, like=options.like)
        print(f"What the server takes is in {submission}.")
    return 0


def loaded(options: argparse.Namespace) -> tuple[nn.Module, Recipe, AbstractContextManager]:
    """The model of a run or checkpoint on its device, its recipe, and the precision to compute in."""
    run = Run(options.weights) if (options.weights / "recipe.json").is_file() else None
    build = resolve_file(options.build) if options.build else None  # before a checkpoint is read that names it
    recipe = chosen_recipe(options, run)
    if run is not None:
        model = run.model(build=build)
    else:
        model = build_from(build or resolve(recipe.builder), replace(recipe.model, backbone_weights=None))
        print(load_weights(model, options.weights))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = autocast_dtype(options.precision, device)
    model.to(device)
    return model, recipe, ops.autocast(model, precision, device)


def numbered_classes(count: int) -> Classes:
    """Classes of a checkpoint that names none: numbers, all of them things."""
    return Classes(tuple(map(str, range(count))), tuple(distinct_colors(count)), frozenset(range(count)))


def cli_recipes(options: argparse.Namespace) -> int:
    """List the recipes by data set and task: backbone, crop, queries, iterations, and the published figures in percent.

    Published recipes are those of the checkpoints' authors; a name's last word says if others than the model's authors
    trained it. Short names stand for the longer ones of `m2f_lab.recipes.names`.
    """
    shortest: dict[str, str] = {}
    groups: dict[str, list[Recipe]] = {}
    for name, make in recipe_functions().items():
        recipe = make()
        if recipe.name not in shortest:
            heading = f"{recipe.data.dataset}, {recipe.task}, {recipe.model.num_classes} classes"
            groups.setdefault(heading if recipe.name in recipes.names() else "small recipes", []).append(recipe)
        shortest[recipe.name] = min(shortest.get(recipe.name, name), name, key=len)
    for heading, group in groups.items():
        rows = [(shortest[r.name], *_summary(r)) for r in group if options.word in r.name + " " + shortest[r.name]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        if rows:
            print(f"\n# {heading}")
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _summary(recipe: Recipe) -> tuple[str, ...]:
    height, width = recipe.data.crop_size
    figures = ", ".join(f"{metric} {value:.1f}" for metric, value in recipe.published.items())
    return (
        recipe.model.backbone, f"{height}×{width}", f"{recipe.model.num_queries} queries",
        f"{recipe.optimization.max_iterations:,d} iterations", figures or "–",
    )  # fmt: skip


def cli_audit(options: argparse.Namespace) -> int:
    """Read a data set's labels and report what would train wrongly; the exit status is 1 if there is anything."""
    name = reference_to(resolve_file(options.dataset)) if ":" in options.dataset else options.dataset
    dataset = open_dataset(name, options.data_root, options.split, strict=False, task=options.task)
    report = audit(dataset, limit=options.limit)
    print(report.text(most=None if options.all else 20))
    report.raise_if_wrong()
    return 0


def cli_prepare(options: argparse.Namespace) -> int:
    """Rewrite labels of another layout as a folder that recipes read, one split at a time."""
    out = prepare(
        options.source, options.out, options.kind, options.split, classes=options.classes, first_id=options.first_id
    )
    print(f'Everything is in {out}; open_dataset("folder", "{out}", "{options.split}") opens it.')
    return 0


def cli_score(options: argparse.Namespace) -> int:
    """Measure result files of any origin, and print one JSON object.

    Figures have the names of the benchmarks' own code; they are fractions, or null where there is nothing to measure.
    """
    pictures = (options.truth_pictures, options.results_pictures)
    if options.benchmark != "panoptic" and any(pictures):
        raise ValueError(f"Folders of pictures belong to panoptic, not to {options.benchmark}.")
    given = pictures if options.benchmark == "panoptic" else ()
    print(json.dumps(SCORES[options.benchmark](options.truth, options.results, *given), indent=1, ensure_ascii=False))
    return 0


def recipe_functions() -> dict[str, Callable[[], Recipe]]:
    """Functions that make a recipe without arguments, by name: published recipes, then functions of `recipes`."""
    by_name = {name: functools.partial(recipes.named, name) for name in recipes.names()}
    return by_name | {
        name: function
        for name, function in inspect.getmembers(recipes, inspect.isfunction)
        if not name.startswith("_")
        and typing.get_type_hints(function).get("return") is Recipe
        and all(p.default is not p.empty for p in inspect.signature(function).parameters.values())
    }


def chosen_recipe(options: argparse.Namespace, run: Run | None = None) -> Recipe:
    """The recipe that the command line names, with its changes.

    Args:
        options: RECIPE or --recipe, --build, --criterion and --set.
        run: a run whose recipe is taken if none is named.

    Raises:
        ValueError: no recipe is named, or two are; or there is no such recipe, function or field.
    """
    if options.recipe and options.recipe_file:
        raise ValueError(f"Name one recipe: either {options.recipe} or --recipe {options.recipe_file}.")
    if options.recipe:
        recipe = recipe_named(options.recipe)
    elif options.recipe_file:
        recipe = recipe_from_file(options.recipe_file)
    elif run is not None:
        recipe = run.recipe
    else:
        raise ValueError("Name a recipe: RECIPE, or --recipe file.py:function or recipe.json; only a run has its own.")
    given = {"builder": options.build, "criterion": options.criterion}
    recipe = recipe.vary(**{name: reference_to(resolve_file(text)) for name, text in given.items() if text})
    recipe = changed(recipe, options.changes)
    if ":" in recipe.data.dataset and not (run and recipe.data.dataset == run.recipe.data.dataset):
        recipe = recipe.vary(data=dict(dataset=reference_to(resolve_file(recipe.data.dataset))))
    return recipe


def recipe_from_file(name: str) -> Recipe:
    """Read a recipe.json, call a function "file.py:function" that returns a Recipe, or take a recipe by its name."""
    if name.endswith(".json"):
        return Recipe.load(name)
    if ":" not in name:
        return recipe_named(name)
    recipe = resolve_file(name)()
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--recipe {name} returned a {type(recipe).__name__}, expected a Recipe.")
    return recipe


def recipe_named(name: str) -> Recipe:
    functions = recipe_functions()
    if name not in functions:
        close = difflib.get_close_matches(name, functions, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(functions)}."
        raise ValueError(f"There is no recipe called {name!r}. {hint}")
    return functions[name]()


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """Change fields of a recipe.

    Args:
        recipe: to start from.
        changes: "field=value" or "part.field=value". Values are read as JSON if they are JSON (3, 0.5, true, null,
            [96, 128]), else as text.

    Raises:
        ValueError: there is no such field, or the value is of another type than the recipe's own.
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
    """Return `new` if it has the type of `old`; lists become tuples and integers floats as needed."""
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
