"""What `import m2f_lab` offers, without Jupyter too, and the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import m2f_lab
from m2f_lab import __main__ as cli
from m2f_lab import build_model, recipes
from m2f_lab.recipes import Recipe
from m2f_lab.training import Run, train
from m2f_lab.weights import save_weights
from tests.toy_training import toy_recipe, write_toy_data

HERE = Path(__file__).parents[1]


class TestNames:
    def test_they_are_these(self):
        assert set(m2f_lab.__all__) == {
            "Criterion", "Dataset", "Mask2Former", "ModelConfig", "Output", "QueryExplorer", "Recipe", "Run",
            "build_model", "evaluate", "load_model", "load_weights", "open_dataset", "predict", "recipes",
            "save_pretrained", "save_weights", "train",
        }  # fmt: skip
        assert all(hasattr(m2f_lab, name) for name in m2f_lab.__all__)
        assert set(m2f_lab.__all__) <= set(dir(m2f_lab))

    def test_query_explorer_is_the_one_of_explore(self):
        from m2f_lab.explore import QueryExplorer

        assert m2f_lab.QueryExplorer is QueryExplorer

    def test_no_other_name(self):
        with pytest.raises(AttributeError, match="no attribute 'Mask3Former'"):
            _ = m2f_lab.Mask3Former


WITHOUT_JUPYTER = """
import sys

MISSING = {"IPython", "ipykernel", "ipywidgets", "anywidget", "jupyterlab", "notebook", "traitlets", "matplotlib"}

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nowhere())
import m2f_lab
import m2f_lab.__main__
from m2f_lab.training import ProgressBar, train
from tests.toy_training import toy_recipe, write_toy_data
from pathlib import Path

folder = Path(sys.argv[1])
run = train(toy_recipe(max_iterations=1), write_toy_data(folder / "data"), folder / "run", callbacks=[ProgressBar()])
print(run)
try:
    m2f_lab.QueryExplorer
except ImportError as error:
    print(error)
"""


def test_without_jupyter_and_matplotlib(tmp_path):
    """Importing, training with a progress bar and reading the result, on a server that has neither."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_JUPYTER, str(tmp_path)], cwd=HERE, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Run(toy, 1 of 1 iterations)" in result.stdout
    assert "QueryExplorer needs Jupyter's widgets" in result.stdout
    assert "pip install" in result.stdout


def test_import_brings_no_jupyter_and_no_matplotlib():
    """Where they are installed they are not loaded either."""
    script = (
        "import sys, m2f_lab\n"
        "print({'IPython', 'ipywidgets', 'anywidget', 'matplotlib', 'm2f_lab.explore'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def toy(monkeypatch):
    """The toy recipe under a name that the command line knows."""

    def toy() -> Recipe:
        return toy_recipe(max_iterations=2, evaluate_every=100)

    monkeypatch.setattr(recipes, "toy", toy, raising=False)
    return toy()


class TestCommandLine:
    def test_recipes(self, capsys):
        assert cli.main(["recipes"]) == 0
        printed = capsys.readouterr().out
        line = next(line for line in printed.splitlines() if line.startswith("ade20k_swin_tiny"))
        assert "swin_tiny_patch4_window7_224" in line
        assert "160,000" in line
        assert "512×512" in line
        assert "mIoU 47.7" in line
        assert {"camvid_small", "debug_tiny", "cityscapes_resnet50"} <= set(re.findall(r"^\w+", printed, re.MULTILINE))

    def test_train_then_evaluate(self, root, toy, tmp_path, capsys):
        arguments = ["train", "toy", "--data-root", str(root), "--out", str(tmp_path / "run")]
        assert cli.main([*arguments, "--set", "optimization.max_iterations=3", "--set", "seed=7"]) == 0
        run = Run(tmp_path / "run")
        assert run.recipe == toy_recipe(max_iterations=3, evaluate_every=100).vary(seed=7)
        assert "toy: 3 of 3 iterations" in capsys.readouterr().out

        assert cli.main(["evaluate", str(run.path), "--data-root", str(root)]) == 0
        assert f"mIoU       {run.last['mIoU']:6.2f}" in capsys.readouterr().out

        weights = str(run.checkpoint("best"))
        assert cli.main(["evaluate", weights, "toy", "--data-root", str(root)]) == 0
        printed = capsys.readouterr().out
        assert "format     m2f_lab" in printed
        assert f"mIoU       {run.last['mIoU']:6.2f}" in printed

    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    def test_evaluate_in_another_precision(self, precision, root, toy, tmp_path, monkeypatch, capsys):
        model = build_model(toy_recipe().model)
        save_weights(model, tmp_path / "weights")
        computed_in = []

        def evaluate(*arguments, **options):
            enabled = torch.is_autocast_enabled("cpu")
            computed_in.append(torch.get_autocast_dtype("cpu") if enabled else torch.float32)
            return real_evaluate(*arguments, **options)

        real_evaluate = cli.evaluate
        monkeypatch.setattr(cli, "evaluate", evaluate)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        arguments = ["evaluate", str(tmp_path / "weights"), "toy", "--data-root", str(root), "--precision", precision]
        assert cli.main(arguments) == 0
        assert computed_in == [getattr(torch, precision)]
        assert "mIoU" in capsys.readouterr().out

    def test_interrupted_training_has_a_status_of_its_own(self, root, toy, tmp_path, monkeypatch):
        def interrupted(recipe, data_root, out, callbacks, resume, **init):
            class Stop:
                on_start = on_evaluation = on_end = staticmethod(lambda subject: None)

                def on_step(self, row: dict) -> None:
                    raise KeyboardInterrupt

            return train(recipe, data_root, out, callbacks=[Stop()], resume=resume, **init)

        monkeypatch.setattr(cli, "train", interrupted)
        assert cli.main(["train", "toy", "--data-root", str(root), "--out", str(tmp_path / "run")]) == 130

    def test_plan(self, toy, capsys):
        assert cli.main(["plan", "toy", "--device", "cpu", "--gib", "8", "--set", "optimization.batch_size=1"]) == 0
        printed = capsys.readouterr().out
        assert "toy on " in printed
        assert " CPU threads, 8.0 GiB\n  batch of 1: accumulation_steps = 1\n" in printed

    def test_plan_of_what_does_not_fit(self, toy, capsys):
        assert cli.main(["plan", "toy", "--device", "cpu", "--gib", "0.1"]) == 1
        assert "m2f_lab: toy does not fit into 0.10 GiB" in capsys.readouterr().err

    def test_audit(self, root, capsys):
        assert cli.main(["audit", "folder", "--data-root", str(root)]) == 0
        assert "box" in capsys.readouterr().out

    def test_audit_fails_where_something_is_wrong(self, tmp_path, capsys):
        root = write_toy_data(tmp_path / "data")
        (root / "annotations" / "training" / "training_0.png").unlink()
        assert cli.main(["audit", "folder", "--data-root", str(root)]) == 1
        assert "training_0" in capsys.readouterr().err

    def test_help(self, capsys):
        for command in ([], ["train"], ["plan"], ["evaluate"], ["recipes"], ["audit"]):
            with pytest.raises(SystemExit) as exit:
                cli.main([*command, "--help"])
            assert exit.value.code == 0
        printed = capsys.readouterr().out
        for word in (
            "--data-root",
            "--out",
            "optimization.max_iterations=100",
            "RUN_OR_WEIGHTS",
            "torchrun",
            "--resume",
        ):
            assert word in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "ade20k_swin_tinny", "--data-root", "x", "--out", "y"], "Did you mean ade20k_swin_tiny"),
            (["train", "debug_tiny", "--data-root", "nowhere", "--out", "y"], "no folder nowhere"),
            (["evaluate", "nowhere", "--data-root", "x"], "Name a recipe"),
            (["evaluate", "nowhere", "debug_tiny", "--data-root", "x"], "nowhere"),
        ],
    )
    def test_errors_are_a_sentence(self, arguments, message, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert cli.main(arguments) == 1
        printed = capsys.readouterr().err
        assert message in printed
        assert "Traceback" not in printed
        with pytest.raises((ValueError, OSError)):
            cli.main(["--traceback", *arguments])

    def test_as_a_module(self):
        result = subprocess.run(
            [sys.executable, "-m", "m2f_lab", "recipes"], cwd=HERE, capture_output=True, text=True, check=True
        )
        assert "camvid_small" in result.stdout


class TestSet:
    RECIPE = recipes.debug_tiny()

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ("seed=3", dict(seed=3)),
            ("notes=on two cards", dict(notes="on two cards")),
            ("optimization.learning_rate=1", dict(optimization=dict(learning_rate=1.0))),
            ("optimization.precision=bfloat16", dict(optimization=dict(precision="bfloat16"))),
            ("data.crop_size=[64, 96]", dict(data=dict(crop_size=(64, 96)))),
            ("data.flip=false", dict(data=dict(flip=False))),
            ("model.backbone_weights=true", dict(model=dict(backbone_weights=True))),
            ("model.backbone_weights=swin.pth", dict(model=dict(backbone_weights="swin.pth"))),
            ("evaluation.shortest_edge=null", dict(evaluation=dict(shortest_edge=None))),
            ('model.backbone_options={"depths": [1, 2]}', dict(model=dict(backbone_options=dict(depths=[1, 2])))),
        ],
    )  # fmt: skip
    def test_values(self, change, expected):
        assert cli.changed(self.RECIPE, [change]) == self.RECIPE.vary(**expected)

    def test_several(self):
        changed = cli.changed(self.RECIPE, ["optimization.batch_size=8", "optimization.accumulation_steps=2"])
        assert changed == self.RECIPE.vary(optimization=dict(batch_size=8, accumulation_steps=2))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("optimization.max_iteration=3", "Did you mean max_iterations"),
            ("optimisation.max_iterations=3", "Did you mean optimization"),
            ("max_iterations=3", "no such field"),
            ("seed.deeper=3", "no such field"),
            ("optimization=3", "expected something like"),
            ("optimization.max_iterations=many", "expected something like 300, got str 'many'"),
            ("optimization.max_iterations=1.5", "got float 1.5"),
            ("optimization.max_iterations=true", "got bool True"),
            ("data.flip=1", "got int 1"),
            ("optimization.max_iterations=-1", "must be positive"),
            ("seed", "expected FIELD=VALUE"),
        ],
    )
    def test_mistakes(self, change, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            cli.changed(self.RECIPE, [change])
