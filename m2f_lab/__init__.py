"""m2f_lab: Mask2Former to read, trust, train and look into.

    from m2f_lab import build_model, evaluate, load_weights, recipes, train

    recipe = recipes.ade20k_swin_tiny()
    run = train(recipe, "data/ade20k", out="runs/tiny")
    prediction = run.model().predict("street.jpg")

`QueryExplorer` needs Jupyter's widgets and is imported when it is first used; everything else runs without them.
"""

from m2f_lab import recipes
from m2f_lab.evaluation import evaluate
from m2f_lab.model import Mask2Former, build_model
from m2f_lab.recipes import ModelConfig
from m2f_lab.training import train
from m2f_lab.weights import load_weights

__all__ = [
    "Mask2Former",
    "ModelConfig",
    "QueryExplorer",
    "build_model",
    "evaluate",
    "load_weights",
    "recipes",
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
