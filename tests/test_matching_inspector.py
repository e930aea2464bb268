"""MatchingExplorer: what is shown is what the matcher chose; driven without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f_lab.data import open_dataset
from m2f_lab.explore import MatchingExplorer
from m2f_lab.explore.matching.trace import NONE, seeded_points
from m2f_lab.explore.matching.views import (
    MatrixLayout,
    cost_table,
    margin_in_words,
    matrices,
    matrix_marks,
    matrix_stacks,
    over_training,
)
from m2f_lab.explore.parts.labels import percent
from m2f_lab.loss import NonFiniteError, build_criterion
from m2f_lab.structures import Target
from m2f_lab.training import Run
from tests.test_matching import CRITERION, SIZE, toy_target
from tests.toy_output import toy_output

IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def toy_model(num_queries: int = 5, seed: int = 0):
    """A model that gives the same random output for every image."""
    torch.manual_seed(seed)
    output = toy_output(SIZE, num_queries=num_queries)
    return lambda images: output


@pytest.fixture
def inspector():
    made = MatchingExplorer(toy_model(), IMAGE, toy_target(), criterion=CRITERION)
    yield made
    made.close()


@pytest.fixture
def several():
    models = {"step 1": toy_model(), "step 2": toy_model(seed=1), "step 3": toy_model(seed=2)}
    made = MatchingExplorer(models, IMAGE, toy_target(), criterion=CRITERION)
    yield made
    made.close()


def mask_of(inspector: MatchingExplorer, view: str, prediction: int, segment: int, channel: int = 0) -> np.ndarray:
    """What a browser would show there."""
    shown = inspector.views[view]
    shown.set_state({"stack": prediction, "index": segment, "channel": channel})
    return shown.mask


# ------------------------------------------------------------------------------------------ what is shown


def test_the_choice_shown_is_the_criterions(inspector: MatchingExplorer) -> None:
    output = toy_model()(None)
    matching = CRITERION.matcher(output, [toy_target()], seeded_points(CRITERION.num_points))
    for prediction in range(5):
        for query, segment in zip(*(part.tolist() for part in matching.of(prediction)), strict=True):
            assert inspector.trace.chosen[prediction, segment] == query
            caption = inspector.views["choice"].captions[prediction][segment]
            assert caption["text"].endswith(f"got query {query}.")
            (marked,) = caption["table"]["marked"]
            assert caption["table"]["rows"][marked][0] == str(query)


def test_masks_of_choice_and_runner_up_lie_over_their_segment(inspector: MatchingExplorer) -> None:
    truth = toy_target().dense()[:, 2::4, 2::4].numpy()  # at the centres of the cells: stride 4
    inside = torch.stack([masks.dense()[0] for masks in toy_model()(None).masks])[:, :, :15, :22].numpy() >= 0
    trace = inspector.trace
    for view, queries in (("choice", trace.chosen), ("rival", trace.runner_up)):
        for prediction, segment in np.ndindex(5, 3):
            mask = inside[prediction, queries[prediction, segment]]
            expected = np.full((15, 22), 255)
            expected[truth[segment]] = 1
            expected[mask] = 2
            expected[truth[segment] & mask] = 0
            np.testing.assert_array_equal(mask_of(inspector, view, prediction, segment), expected)


def test_the_table_holds_the_terms_and_their_sum(inspector: MatchingExplorer) -> None:
    table = inspector.views["choice"].captions[3][1]["table"]
    assert [text for text, _ in table["header"]] == ["query", "class", "mask", "dice", "cost", ""]
    assert all(tooltip for text, tooltip in table["header"][1:-1])
    trace = inspector.trace
    for query, *terms, cost, word in table["rows"]:
        expected = [trace.terms[term][3, int(query), 1] for term in ("class", "mask", "dice")]
        assert [float(term) for term in terms] == pytest.approx(expected, abs=6e-4)
        assert float(cost) == pytest.approx(sum(expected), abs=1e-3)
        assert word == {trace.chosen[3, 1]: "choice", trace.runner_up[3, 1]: "runner-up"}.get(int(query), "")
    assert [float(row[4]) for row in table["rows"]] == sorted(float(row[4]) for row in table["rows"])


def test_the_margin_in_words(inspector: MatchingExplorer) -> None:
    trace = inspector.trace
    chosen, rival, margin = (values[2, 1] for values in (trace.chosen, trace.runner_up, trace.margin))
    text = inspector.views["rival"].captions[2][1]["text"]
    assert text.startswith(f"Without query {chosen}, query {rival} would get it")
    assert text.endswith(f"would rise by {margin:.3f}.")
    rows = inspector.views["rival"].captions[2][1]["table"]["rows"]
    assert [row[1] for row in rows] == [str(query) for query in trace.chosen[:, 1]]
    assert inspector.views["rival"].captions[2][1]["table"]["marked"] == (2,)


def test_words_where_there_is_no_runner_up() -> None:
    alone = MatchingExplorer(toy_model(num_queries=1), IMAGE, toy_target(1), criterion=CRITERION)
    assert margin_in_words(alone.trace, 0, 0) == "Query 0 is the only query; no other could get it."
    crowded = MatchingExplorer(toy_model(num_queries=2), IMAGE, toy_target(4), criterion=CRITERION)
    left = int(np.flatnonzero(crowded.trace.chosen[0] == NONE)[0])
    assert margin_in_words(crowded.trace, 0, left) == "No query is left for it: there are 4 segments and 2 queries."
    assert "got no query" in crowded.views["choice"].captions[0][left]["text"]
    without = [t for t in range(4) if crowded.trace.chosen[0, t] != NONE and crowded.trace.runner_up[0, t] == NONE]
    for segment in without:
        assert "it would get none" in margin_in_words(crowded.trace, 0, segment)


# ------------------------------------------------------------------------------------------ the matrix


def test_cells_stand_for_costs(inspector: MatchingExplorer) -> None:
    trace, cells = inspector.trace, inspector.cells
    view = inspector.views["matrix"]
    scales = np.frombuffer(view.scales, "<f4").reshape(5, 3, 4)
    for channel, term in enumerate(matrices(trace)):
        costs = trace.cost if term == "sum" else trace.terms[term]
        shown = mask_of(inspector, "matrix", 2, 1, channel)[1:, cells.margin :]
        above = shown / 255 * scales[2, 1, channel]
        expected = (costs[2] - costs[2].min(axis=0)).T
        np.testing.assert_allclose(above, expected, atol=expected.max() / 250)
    assert (cost_table()[: shown.max() + 1, 3] == 255).all()


def test_every_mask_of_the_matrix_marks_its_own_row(inspector: MatchingExplorer) -> None:
    stacks, _ = matrix_stacks(inspector.trace, inspector.cells)
    for segment in range(3):
        names = stacks[0][segment, 0, :, : inspector.cells.margin]
        assert (names == 255).all(axis=1).tolist() == [False, *(segment == row for row in range(3))]


def test_dots_mark_choice_and_runner_up(inspector: MatchingExplorer) -> None:
    trace, cells = inspector.trace, inspector.cells
    dots = matrix_marks(trace, cells)
    assert dots.shape == (1, 1, 5, 3, 6, 3)
    height, width = cells.canvas().shape[:2]
    for kind, queries in enumerate((trace.chosen, trace.runner_up)):
        for segment in range(3):
            x, y, _ = dots[0, 0, 4, 0, 3 * kind + segment]
            assert cells.cell_at(int(x * width), int(y * height)) == (segment, queries[4, segment])


@pytest.mark.parametrize("num_queries", [1, 7, 100, 300])
def test_the_matrix_finds_its_cells(num_queries: int) -> None:
    cells = MatrixLayout(["0 road", "1 a very long name of a class that fits nowhere"], num_queries)
    height, width = cells.canvas().shape[:2]
    assert width <= 1600
    x, y = cells.center(1, num_queries - 1)
    assert cells.cell_at(int(x * width), int(y * height)) == (1, num_queries - 1)
    assert cells.cell_at(3, height - 3) == (1, None)
    assert cells.cell_at(width - 1, 2) == (None, num_queries - 1)
    assert cells.pick()[:, 0].tolist() == [0, 0, 1]


# ------------------------------------------------------------------------------------------ what a person does


def click(inspector: MatchingExplorer, segment: int, query: int) -> None:
    height, width = inspector.cells.canvas().shape[:2]
    x, y = inspector.cells.center(segment, query)
    inspector.views["matrix"].set_state({"clicked": [int(x * width), int(y * height)]})


def test_a_click_on_a_cell_lays_its_query_over_its_segment(inspector: MatchingExplorer) -> None:
    before = mask_of(inspector, "rival", 4, 2).copy()
    query = next(q for q in range(5) if q != inspector.trace.runner_up[4, 2])
    click(inspector, 2, query)
    assert (inspector.segment, inspector.query) == (2, query)
    assert inspector.views["rival"].title == f"The segment and query {query}"
    assert (mask_of(inspector, "rival", 4, 2) != before).any()
    assert inspector.views["rival"].captions[4][2]["text"].startswith(f"Query {query} would cost ")
    inspector.query_menu.set_state({"index": 0})  # the runner-up again
    assert inspector.query is None
    np.testing.assert_array_equal(mask_of(inspector, "rival", 4, 2), before)


def test_a_click_on_a_name_keeps_the_query(inspector: MatchingExplorer) -> None:
    inspector.query = 3
    inspector.views["matrix"].set_state({"clicked": [2, 30]})
    inspector.views["matrix"].set_state({"clicked": [400, 2]})
    assert inspector.query == 3


def test_another_checkpoint_is_shown_in_all_pictures(several: MatchingExplorer) -> None:
    assert several.checkpoint == "step 3"
    before = {name: (view.masks, view.captions) for name, view in several.views.items()}
    several.checkpoint_slider.set_state({"value": 0})
    assert several.checkpoint == several.checkpoint_label.value == "step 1"
    alone = MatchingExplorer(toy_model(), IMAGE, toy_target(), criterion=CRITERION)
    for name, view in several.views.items():
        assert view.masks == alone.views[name].masks != before[name][0]
        assert view.captions == alone.views[name].captions
        assert view.scales == alone.views[name].scales
        assert view.marks == alone.views[name].marks


def test_all_checkpoints_are_compared_at_the_same_points() -> None:
    twins = MatchingExplorer({"a": toy_model(), "b": toy_model()}, IMAGE, toy_target(), criterion=CRITERION)
    np.testing.assert_array_equal(twins.traces["a"].cost, twins.traces["b"].cost)
    points = seeded_points(CRITERION.num_points, seed=4)
    other = MatchingExplorer(toy_model(), IMAGE, toy_target(), criterion=CRITERION, points=points)
    assert (other.trace.cost != twins.traces["a"].cost).any()


def test_the_table_over_training_marks_what_changed(several: MatchingExplorer) -> None:
    several.layer_slider.set_state({"value": 2})
    queries = [several.traces[name].chosen[2].tolist() for name in several.traces]
    rows = re.findall(r"<tr>(.*?)</tr>", several.table.value)[1:]
    for i, row in enumerate(rows):
        cells = re.findall(r"<td>(.*?)</td>", row)
        assert [int(re.sub("<.*?>", "", cell)) for cell in cells[1:-1]] == queries[i]
        changed = [i > 0 and queries[i][t] != queries[i - 1][t] for t in range(3)]
        assert ["<b>" in cell for cell in cells[1:-1]] == changed
        assert cells[-1] == ("" if i == 0 else percent(1 - sum(changed) / 3))
    assert "after layer 2" in several.table.value
    assert "<i>" not in over_training({"<i>": several.trace}, 0, several.names)


def test_outputs_that_are_there_already() -> None:
    outputs = {"early": toy_model()(None), "late": toy_model(seed=1)(None)}
    made = MatchingExplorer.from_output(outputs, IMAGE, toy_target(), criterion=CRITERION)
    for name, model in (("early", toy_model()), ("late", toy_model(seed=1))):
        expected = MatchingExplorer(model, IMAGE, toy_target(), criterion=CRITERION).trace
        np.testing.assert_array_equal(made.traces[name].cost, expected.cost)
    assert not made.views["matrix"].coordinates  # its pixels are no pixels of the image
    assert made.views["choice"].num_channels == made.views["matrix"].num_channels == 4


def test_names_and_classes(inspector: MatchingExplorer) -> None:
    assert inspector.names == ["0 class 0", "1 class 1", "2 class 2"]
    named = [text for text, _ in inspector.segment_slider.menu.options]
    assert named == [f"segment {name}" for name in inspector.names]
    assert repr(inspector) == "MatchingExplorer(1 model, 3 segments, 5 queries, 5 predictions, 88 × 60 pixels)"


# ------------------------------------------------------------------------------------------ on paper and from disk


def test_the_figure_shows_terms_margins_and_layers(inspector: MatchingExplorer) -> None:
    figure = inspector.figure(layer=1)
    drawn = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in drawn] == ["class cost", "mask cost", "dice cost", "margin", "query by layer"]
    trace = inspector.trace
    shown = np.unique(np.concatenate([trace.chosen[1], trace.runner_up[1]]))
    for ax, term in zip(drawn, ("class", "mask", "dice"), strict=False):
        np.testing.assert_array_equal(ax.images[0].get_array(), trace.terms[term][1][shown].T)
        choice, rival = (collection.get_offsets() for collection in ax.collections[:2])
        assert [shown[int(x)] for x, _ in choice] == trace.chosen[1].tolist()
        assert [shown[int(x)] for x, _ in rival] == trace.runner_up[1].tolist()
    assert [bar.get_width() for bar in drawn[3].patches] == pytest.approx(trace.margin[1].tolist())
    numbers = [text.get_text() for text in drawn[4].texts]
    assert numbers == [str(query) for query in trace.chosen.flatten()]
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == inspector.names


@pytest.mark.parametrize(("num_queries", "num_segments"), [(1, 1), (2, 4)])
def test_the_figure_where_something_is_missing(num_queries: int, num_segments: int) -> None:
    made = MatchingExplorer(toy_model(num_queries), IMAGE, toy_target(num_segments), criterion=CRITERION)
    made.figure().draw_without_rendering()
    assert made._repr_mimebundle_()["image/png"].startswith(b"\x89PNG")


def test_a_page_stands_alone(several: MatchingExplorer, tmp_path: Path) -> None:
    several.checkpoint = "step 2"
    several.layer = 1
    several.save_html(tmp_path / "matching.html")
    page = (tmp_path / "matching.html").read_text()
    assert several.views["choice"].captions[1][0]["text"] in page
    assert '"linked": ["stack", "index", "channel"]' in page
    assert several.views["matrix"].stack == 1


def test_a_run_is_compared_with_itself(whole: Run, root: Path) -> None:
    sample = open_dataset("folder", root, "val")[0]
    made = MatchingExplorer.from_run(whole, sample.image, sample.label_map)
    expected = ["last, step 6"] if whole.best["iteration"] == 6 else [f"best, step {whole.best['iteration']}"]
    assert list(made.traces)[:1] == expected
    assert made.checkpoint == "last, step 6"
    assert made.trace.num_queries == 6
    with torch.no_grad():
        output = whole.model("last")(torch.from_numpy(sample.image).permute(2, 0, 1)[None])
    target = Target.from_label_map(torch.from_numpy(sample.label_map.astype(np.int64)))
    criterion = build_criterion(whole.recipe)
    matching = criterion.matcher(output, [target], seeded_points(criterion.num_points))
    query, segment = matching.of(2)
    assert made.trace.chosen[2][segment].tolist() == query.tolist()
    again = MatchingExplorer.from_run(str(whole.path), sample.image, sample.label_map, shortest_edge=32)
    assert (again.trace.cost != made.trace.cost).any()  # at another size


# ------------------------------------------------------------------------------------------ what is refused


def test_what_does_not_fit_is_named(inspector: MatchingExplorer) -> None:
    def make(target=None, model=None, **options):
        return MatchingExplorer(
            toy_model() if model is None else model, IMAGE, toy_target() if target is None else target, **options
        )

    with pytest.raises(ValueError, match="no segment, so there is nothing to match"):
        make(np.full(SIZE, 255, np.uint8))
    with pytest.raises(ValueError, match=r"target is 30 × 40 pixels, but the image 60 × 88"):
        make(toy_target(2, (30, 40)))
    with pytest.raises(ValueError, match="several by name; there is none"):
        make(model={})
    with pytest.raises(ValueError, match=r"differ .*a: 5 and 5, b: 5 and 7"):
        make(model={"a": toy_model(), "b": toy_model(num_queries=7)})
    with pytest.raises(ValueError, match=r"labels \[7\]"):
        make(np.full(SIZE, 7, np.uint8))
    broken = toy_model()(None)
    broken.class_logits[1][0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="prediction 1: class"):
        make(model=lambda images: broken)
    for name, value in (("segment", 3), ("layer", 5), ("query", 5)):
        with pytest.raises(ValueError, match=f"no {name} {value}"):
            setattr(inspector, name, value)
    with pytest.raises(ValueError, match="no model 'late'"):
        inspector.checkpoint = "late"


def test_close_gives_the_memory_back(inspector: MatchingExplorer) -> None:
    inspector.close()
    assert inspector.traces is None
    assert inspector.views == {}
