"""compare: what differs between runs, how good they became, and their curves over iterations and over time."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from m2f_lab.explore import compare
from m2f_lab.explore.runs.compare import differing_fields, flat_recipe, with_seconds
from m2f_lab.recipes import Recipe
from m2f_lab.training import Run
from m2f_lab.training.run import append_row
from tests.toy_training import toy_recipe


def write_run(folder: Path, recipe: Recipe, num_steps: int = 4, pace: float = 10.0, mious: tuple = (20.0, 30.0, 25.0)):
    """A run's files without its weights: step i took `pace` seconds and has a loss of 12 / i."""
    folder.mkdir(parents=True)
    recipe.save(folder / "recipe.json")
    for i in range(1, num_steps + 1):
        terms = {f"{layer}.{term}": layer + 1 / i for layer in range(3) for term in ("class", "mask", "dice")}
        row = {"kind": "step", "iteration": i, "loss": 12 / i, "learning_rate": 1e-3 / i, "seconds": pace * i} | terms
        append_row(folder / "metrics.jsonl", row)
    for i, miou in enumerate(mious, start=1):
        append_row(folder / "metrics.jsonl", {"kind": "evaluation", "iteration": i, "mIoU": miou})
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    other = toy_recipe(learning_rate=2e-3).vary(name="other", data=dict(flip=False))
    return [
        write_run(tmp_path / "slow", toy_recipe(), pace=100.0),
        write_run(tmp_path / "fast", other, num_steps=2, mious=()),
    ]


def test_a_damaged_line_is_named(folders: list[Path]) -> None:
    file = folders[1] / "metrics.jsonl"
    file.write_text(file.read_text() + "{broken\n{half of a line that is being written")
    with pytest.raises(ValueError, match=r"Line 3 of .*fast.metrics\.jsonl is not JSON"):
        compare(folders)


def test_only_what_differs_is_listed(folders: list[Path]) -> None:
    comparison = compare(folders)
    assert comparison.differences == {
        "data.flip": {"slow": True, "fast": False},
        "optimization.learning_rate": {"slow": 1e-3, "fast": 2e-3},
    }
    assert " ".join(name for name, _ in comparison.table.header) == (
        "run iterations time best mIoU at last mIoU data.flip optimization.learning_rate"
    )
    assert comparison.table.rows == (
        ("slow", "4", "6 min 40 s", "30.0 %", "2", "25.0 %", "True", "0.001"),
        ("fast", "2", "20 s", "–", "–", "–", "False", "0.002"),
    )


def test_every_field_that_decides_something_is_compared() -> None:
    recipe = toy_recipe()
    flat = flat_recipe(recipe)
    assert {"task", "seed", "model.num_queries", "loss.num_points", "evaluation.shortest_edge"} <= set(flat)
    assert not {"name", "notes", "published"} & set(flat)
    varied = recipe.vary(seed=3, model=dict(backbone_options={"a": 1}), notes="other words")
    assert set(differing_fields({"a": flat, "b": flat_recipe(varied)})) == {"seed", "model.backbone_options"}
    assert differing_fields({"a": flat, "b": flat}) == {}


def test_evaluations_are_placed_in_time(folders: list[Path]) -> None:
    steps = [{"iteration": 10, "seconds": 100.0}, {"iteration": 20, "seconds": 300.0}]
    rows = with_seconds([{"iteration": 15, "mIoU": 1.0}, {"iteration": 20, "mIoU": 2.0}], steps)
    assert [row["seconds"] for row in rows] == [200.0, 300.0]


def test_curves_over_iterations_and_over_time(folders: list[Path]) -> None:
    figure = compare({"a": folders[0], "b": Run(folders[1])}).figure()
    loss, terms, quality, rate, loss_time, _, quality_time, _ = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 12], [2, 6], [3, 4], [4, 3]]
    assert loss.lines[1].get_xydata().tolist() == [[1, 12], [2, 6]]
    assert [line.get_ydata()[0] for line in terms.lines[:3]] == [2.0, 2.0, 2.0]  # the mean of 1, 2 and 3
    assert quality.lines[0].get_ydata().tolist() == [20, 30, 25]
    assert rate.lines[0].get_ydata()[0] == 1e-3
    assert loss_time.get_xlabel() == "minutes of training"
    assert loss_time.lines[0].get_xdata().tolist() == pytest.approx([100 / 60, 200 / 60, 300 / 60, 400 / 60])
    assert quality_time.lines[0].get_xdata().tolist() == pytest.approx([100 / 60, 200 / 60, 300 / 60])
    assert loss.lines[0].get_color() == quality.lines[0].get_color() != loss.lines[1].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_curves_of_a_term_that_only_one_run_has(folders: list[Path]) -> None:
    append_row(
        folders[0] / "metrics.jsonl", {"kind": "step", "iteration": 5, "loss": 2.0, "seconds": 9.0, "0.boundary": 4.0}
    )
    terms = compare(folders).figure().axes[1]
    assert [text.get_text() for text in terms.get_legend().get_texts()] == ["class", "mask", "dice", "boundary"]
    styles = [line.get_linestyle() for line in terms.lines[:4]]
    assert len(set(styles)) == 4
    assert terms.lines[3].get_ydata()[-1] == 4.0


def test_a_real_run(whole: Run) -> None:
    comparison = compare([whole])
    assert repr(comparison) == "Comparison(whole)"
    assert comparison.table.rows[0][:2] == ("whole", "6")
    assert comparison.table.rows[0][3] == f"{whole.best['mIoU']:.1f} %"


def test_it_is_shown_in_notebooks_terminals_and_as_a_page(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare(folders)
    bundle = comparison._repr_mimebundle_()
    assert bundle["text/plain"].splitlines()[1].split()[:2] == ["slow", "4"]
    assert "<td>slow</td>" in bundle["text/html"]
    assert Image.open(io.BytesIO(bundle["image/png"])).width > 600
    comparison.save_html(tmp_path / "runs.html")
    page = (tmp_path / "runs.html").read_text()
    assert "<svg" in page
    assert "<td>0.002</td>" in page


def test_runs_are_called_after_as_much_of_their_folders_as_tells_them_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name / "run", toy_recipe()) for name in ("a", "b")]
    assert list(compare(paths).runs) == ["a/run", "b/run"]


def test_what_cannot_be_compared_is_named(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run"):
        compare([folders[0], tmp_path])
    empty = write_run(tmp_path / "empty", toy_recipe(), num_steps=0, mious=())
    with pytest.raises(ValueError, match=r"'empty' has no rows yet.*metrics\.jsonl.*every 1 iterations"):
        compare([folders[0], empty])
    with pytest.raises(ValueError, match="at least one run"):
        compare([])
    with pytest.raises(ValueError, match="several runs, in a list"):
        compare(folders[0])
    with pytest.raises(ValueError, match="is there twice"):
        compare([folders[0], folders[0]])
