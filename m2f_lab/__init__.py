"""m2f_lab: Mask2Former to read, trust, train, change and look into.

    from m2f_lab import build_model, evaluate, load_weights, recipes, train

    recipe = recipes.ade20k_swin_tiny()
    run = train(recipe, "data/ade20k", out="runs/tiny")
    prediction = run.model().predict("street.jpg")

A changed model, loss or data set is a function of your own, handed in:

    run = train(recipe, "data/ade20k", out="runs/changed", build=my_model, criterion=my_criterion)

`QueryExplorer` needs Jupyter's widgets and is imported when it is first used; everything else runs without them.
"""

from m2f_lab import recipes
from m2f_lab.data import Dataset, open_dataset
from m2f_lab.evaluation import evaluate
from m2f_lab.inference import predict
from m2f_lab.loss import Criterion
from m2f_lab.model import Mask2Former, build_model
from m2f_lab.recipes import ModelConfig, Recipe
from m2f_lab.structures import Output
from m2f_lab.training import Run, train
from m2f_lab.weights import load_model, load_weights, save_pretrained, save_weights

__all__ = [
    "Criterion",
    "Dataset",
    "Mask2Former",
    "ModelConfig",
    "Output",
    "QueryExplorer",
    "Recipe",
    "Run",
    "build_model",
    "evaluate",
    "load_model",
    "load_weights",
    "open_dataset",
    "predict",
    "recipes",
    "save_pretrained",
    "save_weights",
    "train",
]


def __getattr__(name: str):
    if name != "QueryExplorer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from m2f_lab.explore import QueryExplorer
    except ImportError as error:
        raise ImportError(
            f"QueryExplorer needs Jupyter's widgets ({error}). Install them with pip install anywidget ipywidgets "
            "matplotlib; everything else in m2f_lab runs without."
        ) from error
    return QueryExplorer


def __dir__() -> list[str]:
    return sorted([*globals(), "QueryExplorer"])
