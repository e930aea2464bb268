"""Known bugs, done on purpose: each must do damage, the right variant must be the library's, each must be guarded."""

from __future__ import annotations

import ast
import gc
import io
import math
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from m2f_lab import build_model, evaluate, recipes, train
from m2f_lab.data import open_dataset
from m2f_lab.explore import TrapLab, plots, traps
from m2f_lab.explore.traps import TRAPS, Bench, Trap
from m2f_lab.explore.traps import lab as trap_lab
from m2f_lab.explore.traps.attention import never_opened
from m2f_lab.inference.postprocess import panoptic
from m2f_lab.model.transformer_decoder import TransformerDecoder, attention_blocked
from m2f_lab.scenes import write_ade20k, write_cityscapes

ROOT = Path(__file__).resolve().parents[1]
RECIPE = recipes.debug_tiny().vary(
    data=dict(crop_size=(96, 160), shortest_edges=(72,), longest_edge=160, color_jitter=False, flip=False),
    loss=dict(num_points=512),
    optimization=dict(
        max_iterations=150, learning_rate=2e-3, warmup_iterations=10, evaluate_every=150, checkpoint_every=150
    ),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """Streets, nearly learned by heart, whose size is no multiple of 32; and rooms, one with something unnamed."""
    folder = tmp_path_factory.mktemp("bench")
    streets = write_cityscapes(folder / "streets", num_train=3, num_val=1, size=(72, 136), seed=39)
    rooms = write_ade20k(folder / "rooms", num_train=3, num_val=1, size=(64, 64))
    model = train(RECIPE, streets, folder / "run").model()
    return Bench(model, open_dataset("cityscapes", streets, "train"), open_dataset("ade20k", rooms, "train"), count=3)


@pytest.fixture(scope="module")
def trials(bench) -> dict[str, traps.Trial]:
    return {trap.name: trap.try_on(bench) for trap in TRAPS}


# ----------------------------------------------------------------------------------------------------------- the damage

# By how much the broken value must at least be above (or, if negative, below) the right one, in the trap's unit.
DAMAGE = {
    "Swin pads after the shift": 20,  # percent of the largest feature
    "patch merging in another order": 20,
    "image padded before normalising": -3,  # points of mIoU
    "attention mask inverted": -0.3,
    "empty mask not opened": 10,  # percent of the queries
    "logits cut at 0.5": 0.3,  # percent of the cells inside masks
    "soft mask, not detached": 50,
    "offsets divided by (H, W)": -0.3,
    "align_corners=True": 3,
    "border instead of zeros": 3,
    "ADE20K not shifted": 90,  # percent of the pixels
    "ADE20K shifted twice": 60,
    "ADE20K's other learned as a class": 0.5,
    "Cityscapes' labelIds as classes": 90,
    "trainIds submitted": 90,
    "instance ids divided throughout": 50,
    "labels padded with a class": 30,
    "labels resized bilinearly": 1,
    "num_masks not clamped": math.nan,
    "num_masks averaged twice": 6.9,
    "no-object weighs 1": 20,  # percent of the gradient
    "costs in float16": 0.2,  # percent of the costs
    "padding not cropped": -10,
    "labels resized, not scores": -0.3,
    "no-object first": -15,
    "mIoU as a mean over images": -0.3,
    "stuff not merged": 0.3,  # segments per class
    "segments numbered from 0": 10,  # percent of the pixels
    "no confident query": 99,
}


def test_all_traps_are_tested() -> None:
    assert list(DAMAGE) == [trap.name for trap in TRAPS]
    assert (*traps.MODEL, *traps.DATA, *traps.LOSS, *traps.RESULTS) == TRAPS


@pytest.mark.parametrize("name", DAMAGE)
def test_the_damage_is_real(trials, name: str) -> None:
    trial, least = trials[name], DAMAGE[name]
    assert math.isfinite(trial.right.value)
    if math.isnan(least):
        assert math.isnan(trial.broken.value)
        assert trial.text("broken").endswith("NaN")
    else:
        assert trial.damage * math.copysign(1, least) >= abs(least), trial
    if trial.has_picture:
        assert not np.array_equal(trial.right.picture, trial.broken.picture)


@pytest.mark.parametrize("name", DAMAGE)
def test_right_is_what_the_library_computes(trials, bench, name: str) -> None:
    """mIoU as `evaluate` measures it, no wrong pixel, no distance from the library's features, and so on."""
    right = trials[name].right
    unit = trials[name].trap.unit
    if unit.startswith("mIoU"):
        assert right.value == pytest.approx(evaluate(bench.model, RECIPE, bench.streets.root, split="train")["mIoU"])
        if right.picture is not None:
            assert np.array_equal(right.picture, bench.model.predict(bench.samples[0].image).label_map)
    elif unit.startswith(("{} segments", "mask losses")):
        assert right.value == 1
    elif name in ("num_masks not clamped", "no-object weighs 1"):
        assert right.value > 0
    else:
        assert right.value == 0


def test_pictures_of_labels_are_the_data_set_s(trials, bench) -> None:
    street, room = bench.samples[0], bench.rooms[bench.room]
    assert (room.label_map == 255).any(), "a room with something that has no name"
    for name in ("ADE20K not shifted", "ADE20K shifted twice", "ADE20K's other learned as a class"):
        assert np.array_equal(trials[name].right.picture, room.label_map)
    assert np.array_equal(trials["Cityscapes' labelIds as classes"].right.picture, street.label_map)
    assert np.array_equal(trials["trainIds submitted"].right.picture, street.label_map)
    padded = trials["labels padded with a class"].right.picture
    assert np.array_equal(padded[:72, :136], street.label_map)
    assert (padded[72:] == 255).all()


def test_damage_by_hand() -> None:
    """The variants on a few numbers, where what goes wrong can be read."""
    raw = np.array([[0, 1, 2, 150]], np.uint8)
    assert traps.find("ADE20K not shifted").broken(None, raw).tolist() == [[0, 1, 2, 150]]
    assert traps.find("ADE20K shifted twice").broken(None, raw).tolist() == [[255, 255, 0, 148]]
    assert traps.find("ADE20K's other learned as a class").broken(None, raw).tolist() == [[0, 0, 1, 149]]
    ids = np.array([[26001, 7]])
    assert [part.tolist() for part in traps.find("instance ids divided throughout").broken(ids)] == [
        [[26, 0]],
        [[1, 7]],
    ]
    features, embeddings = torch.tensor([1.0, 0.2, -1.0, -1.0]).view(1, 1, 2, 2), torch.ones(1, 1, 1)
    blocked, _ = traps.find("attention mask inverted").broken(embeddings, features)
    assert blocked.tolist() == [[[True, True, False, False]]]
    blocked, _ = traps.find("logits cut at 0.5").broken(embeddings, features)
    assert blocked.tolist() == [[[False, True, True, True]]]
    assert never_opened(-embeddings, features.abs())[0].all()


def test_a_perfect_panoptic_prediction_is_perfect(bench) -> None:
    """What panoptic traps start from: one segment per class, all pixels but those to ignore."""
    output, queries = traps.results.perfect_output(bench)
    prediction = panoptic(output, things=range(0))
    label_of = np.array([255, *(segment.label for segment in prediction.segments)])
    assert np.array_equal(label_of[prediction.segments_map], bench.samples[0].label_map)
    assert len(queries) == output.masks[0].num_queries


def test_the_same_trial_twice(bench, trials) -> None:
    for name in ("Swin pads after the shift", "costs in float16", "num_masks not clamped"):
        again = traps.find(name).try_on(bench)
        assert repr(again) == repr(trials[name])


# ---------------------------------------------------------------------------------------------- the library stays whole


def test_faults_live_in_copies_of_the_model(trials, bench) -> None:
    for module in bench.model.modules():
        assert not {"forward", "preprocess"} & set(vars(module))
    assert type(bench.model.transformer_decoder) is TransformerDecoder


def test_nothing_stays_patched(trials) -> None:
    from m2f_lab.loss import criterion, matcher
    from m2f_lab.model import deformable_attention, transformer_decoder

    assert transformer_decoder.attention_blocked is traps.find("attention mask inverted").right
    assert deformable_attention.deformable_sampling is traps.find("align_corners=True").right
    assert deformable_attention.DeformableAttention.forward is traps.find("offsets divided by (H, W)").right
    assert criterion.average_num_masks is traps.find("num_masks not clamped").right
    assert matcher.mask_costs is traps.find("costs in float16").right
    assert F.grid_sample.__module__ == "torch.nn.functional"
    assert not torch.distributed.is_initialized()


def test_only_the_trap_lab_knows_of_traps() -> None:
    """The library has no switches for them."""
    package = ROOT / "m2f_lab"
    inside = set((package / "explore" / "traps").glob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert {path for path, text in texts.items() if "explore.traps" in text} <= inside


# -------------------------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_every_guard_exists_and_is_run(trap: Trap) -> None:
    file, *_, name = trap.guarded_by.split("::")
    assert re.fullmatch(r"tests/test_\w+\.py", file)
    tree = ast.parse(trap.guard_source())
    assert [node.name for node in tree.body] == [name]
    assert name.startswith("test_")
    assert not re.search(r"pytest\.mark\.(skip|gpu|slow|browser)", trap.guard_source())


def test_a_guard_that_is_gone_is_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(LookupError, match=r"test_model\.py has no test test_nothing.*'logits cut at 0\.5'"):
        replace(traps.find("logits cut at 0.5"), guarded_by="tests/test_model.py::test_nothing").guard_source()
    monkeypatch.setattr(traps.trap, "REPOSITORY", tmp_path)
    with pytest.raises(FileNotFoundError, match="Clone it"):
        traps.find("logits cut at 0.5").guard_source()


def test_code_can_be_read() -> None:
    for trap in TRAPS:
        for variant in ("right", "broken"):
            assert isinstance(ast.parse(trap.source(variant)).body[0], ast.FunctionDef)
            assert "lambda" not in trap.where(variant)
            inside = trap.where(variant).startswith("m2f_lab.explore.traps")
            assert variant == "broken" or inside or trap.where(variant).startswith("m2f_lab.")
        assert trap.question.endswith("?")
    assert repr(TRAPS[0]) == "Trap('Swin pads after the shift')"
    with pytest.raises(KeyError, match="There is no trap 'x'; there are Swin pads after the shift, "):
        traps.find("x")


def test_attention_is_cut_at_a_logit_of_zero() -> None:
    features = torch.tensor([[0.4, -0.4], [0.0, 2.0]])[None, None]
    blocked, _ = attention_blocked(torch.ones(1, 1, 1), features)
    assert blocked.tolist() == [[[False, True, False, False]]]


def test_no_gradient_reaches_masks_through_attention() -> None:
    """The class loss of the last prediction teaches what queries see, and no mask that decides where they look."""
    model = build_model(RECIPE.model)
    output = model(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8))
    output.class_logits[-1].square().sum().backward()
    assert model.pixel_decoder.mask_projection.weight.grad is None
    assert all(parameter.grad is None for parameter in model.transformer_decoder.mask_head.parameters())
    assert model.pixel_decoder.input_projections[0][0].weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------- the widget


def test_choosing_a_trap_shows_it(bench, trials) -> None:
    lab = TrapLab(bench)
    assert repr(lab) == f"TrapLab({len(TRAPS)} traps)"
    assert lab.trap_menu.options == tuple(trials)
    for name in ("no-object first", "align_corners=True"):
        lab.trap_menu.set_state({"index": list(trials).index(name)})  # as the browser does it
        trial, view = trials[name], lab.views[name]
        assert lab.trap is trial.trap
        assert lab._picture.children == (view,)
        assert "".join(re.findall(r">([^<>]*)</div>", lab._values[1].value)) == f"broken: {trial.text('broken')}"
        for view.index, shown in enumerate(("right", "broken", "difference")):
            expected = trial.pictures[shown]
            wanted = expected if trial.right.classes is not None else np.rint(255 * expected)
            np.testing.assert_array_equal(view.mask, wanted)
        assert (view.title, view.captions) == ("", []), "the menu and the number above say it"
    assert view.readout == "{value} of the largest"
    assert lab.views["no-object first"].names[0] == "road"
    lab.trap = "costs in float16"
    assert lab._picture.children == ()
    assert "test_half_precision_outputs_are_compared_in_float32" in lab._code.value
    with pytest.raises(ValueError, match="no trap 'x'; there are Swin"):
        lab.trap = "x"
    lab.close()


def test_flipping_is_left_to_the_browser(bench) -> None:
    lab = TrapLab(bench, [traps.find("no-object first"), traps.find("padding not cropped")])
    lab.trap = "padding not cropped"
    links = {pair for links in lab._links for pair in links.pairs}
    assert (lab.switch, "index", lab._value, "selected_index") in links
    for view in lab.views.values():
        assert (lab.switch, "index", view, "index") in links
        assert (lab.opacity_slider, "value", view, "opacity") in links
    lab.switch.index = 1
    lab.trap = "no-object first"
    assert lab.switch.index == lab.views["no-object first"].index == 0, "a new trap begins with what is right"
    lab.close()


def test_the_difference_says_what_is_lost_too(trials) -> None:
    trial = trials["segments numbered from 0"]
    right, broken, difference = (trial.pictures[name] for name in ("right", "broken", "difference"))
    assert (difference[right == broken] == 255).all()
    lost = (broken == 255) & (right != 255)
    assert np.array_equal(difference[lost], right[lost])
    trial = trials["labels resized bilinearly"]
    right, broken, difference = (trial.pictures[name] for name in ("right", "broken", "difference"))
    other = (right != broken) & (broken != 255)
    assert other.any()
    assert np.array_equal(difference[other], broken[other])
    assert trial.changed == pytest.approx(100 * (right != broken).mean())


def test_figures_of_all_kinds(bench, trials, monkeypatch) -> None:
    drawn = []
    for kind in ("segmentation", "images", "bars"):
        monkeypatch.setattr(plots, kind, lambda *arguments, kind=kind, **_: drawn.append((kind, arguments)))
    for trial in trials.values():
        trap_lab.figure(trial)
        kind, arguments = drawn[-1]
        if kind == "segmentation":
            assert arguments[0] is trial.right.image
            assert [shown.split(":")[0] for shown in arguments[1]] == ["right", "broken", "where they differ"]
        elif kind == "images":
            right, broken = arguments[0].values()
            assert not np.array_equal(right, broken)
        else:
            assert arguments[0] == [f"right: {trial.text('right')}", f"broken: {trial.text('broken')}"]
    assert {kind for kind, _ in drawn} == {"segmentation", "images", "bars"}


def test_there_is_a_picture_where_widgets_do_not_run(bench) -> None:
    lab = TrapLab(bench, [traps.find("costs in float16"), traps.find("align_corners=True")])
    sizes = []
    for name in lab.traps:
        lab.trap = name
        bundle = lab._repr_mimebundle_()
        assert bundle["text/plain"] == "TrapLab(2 traps)"
        sizes.append(Image.open(io.BytesIO(bundle["image/png"])).size)
    assert sizes[0] != sizes[1]
    lab.close()


def test_the_page_flips_all_pictures_at_once(bench, tmp_path) -> None:
    lab = TrapLab(bench, traps.RESULTS)
    lab.save_html(tmp_path / "traps.html")
    text = (tmp_path / "traps.html").read_text(encoding="utf-8")
    for trap in traps.RESULTS:
        assert (f'"title": "{trap.name}"' in text) == lab.trial(trap.name).has_picture
        assert not lab.trial(trap.name).has_picture or f"broken: {lab.trial(trap.name).text('broken')}" in text
    assert '"options": [["right", 0], ["broken", 1], ["difference", 2]]' in text
    with pytest.raises(ValueError, match=r"None of no confident query has a picture"):
        TrapLab(bench, [traps.find("no confident query")]).save_html(tmp_path / "none.html")
    lab.close()


def test_close_gives_the_memory_back(bench) -> None:
    lab = TrapLab(bench, [traps.find("no-object first")])
    kept = [weakref.ref(thing) for thing in (lab.trial(), lab.views["no-object first"], *lab._links)]
    lab.close()
    gc.collect()
    assert [thing() for thing in kept] == [None] * len(kept)
    assert lab.bench is None
    lab.close()
    with pytest.raises(ValueError, match="at least one trap"):
        TrapLab(bench, [])


def test_dumbbells_hold_their_numbers() -> None:
    figure = plots.dumbbells(["a", "b"], [(70, 5), (60, 65)], ("right", "broken"), "mIoU in percent", limit=100)
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts] == ["5", "65"]
    assert [offsets.get_offsets().tolist() for offsets in ax.collections] == [[[70, 0], [60, 1]], [[5, 0], [65, 1]]]
