"""Counterfactuals are exact: every run is compared with the model, or with the decoder taken apart by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from m2f_lab.data import Classes
from m2f_lab.explore import EditHistory, ForceClass, Mute, PaintAttention, QueryExplorer, Replay, Unmask
from m2f_lab.explore.counterfactuals.edits import describe, with_edit
from m2f_lab.explore.counterfactuals.label_change import compare_label_maps
from m2f_lab.inference import postprocess
from m2f_lab.model import Mask2Former
from m2f_lab.model.transformer_decoder import DecoderMemory, TransformerDecoder, attention_blocked
from m2f_lab.structures import DecoderState, MaskLogits, Output
from tests.toy_model import CLASSES, IMAGE, LAYERS, QUERIES, sure_model


@pytest.fixture(scope="module")
def model() -> Mask2Former:
    return sure_model()


@pytest.fixture(scope="module")
def replay(model: Mask2Former) -> Replay:
    return Replay(model, IMAGE)


def forward(model: Mask2Former) -> Output:
    with torch.inference_mode():
        return copy.deepcopy(model).eval()(torch.from_numpy(IMAGE).permute(2, 0, 1)[None], keep_attention=True)


def assert_same(one: Output, other: Output, queries: list[int] | slice = slice(None)) -> None:
    """To the last bit, in every prediction; `queries` chooses rows of the first."""
    assert one.num_predictions == other.num_predictions
    for i in range(one.num_predictions):
        assert torch.equal(one.class_logits[i][:, queries], other.class_logits[i])
        assert torch.equal(one.masks[i].embeddings[:, queries], other.masks[i].embeddings)
        assert torch.equal(one.masks[i].features, other.masks[i].features)


def seen(output: Output, layer: int, name: str) -> Tensor:
    """A field of the state that a layer, from 1, left behind."""
    return getattr(output.states[layer], name)[0]


def assert_same_scores(one: Output, other: Output) -> None:
    """Semantic scores that differ by the rounding of mask logits only.

    On some processors and numbers of threads, a product of seven rows is summed in another order than one of eight. A
    mask logit, here up to 200, then moves by one float32 step of the largest one, and a score with it.
    """
    step = np.finfo(np.float32).eps * float(one.masks[-1].dense().abs().max())
    mine, theirs = (postprocess.semantic(output, return_scores=True) for output in (one, other))
    np.testing.assert_allclose(mine.scores, theirs.scores, rtol=0, atol=step)
    assert np.array_equal(mine.label_map, theirs.label_map)


def probabilities(output: Output, prediction: int = -1) -> Tensor:
    return output.class_logits[prediction][0].softmax(-1)


# ----------------------------------------------------------------------------------------------------------- the replay


def test_without_edits_it_is_the_model_to_the_last_bit(model: Mask2Former, replay: Replay) -> None:
    expected = forward(model)
    for output in (replay.output, replay.run(), replay.run(attention_weights=False)):
        assert_same(output, expected)
        assert (output.image_size, output.padded_size) == ((50, 90), (64, 96))
    for mine, theirs in zip(replay.run().states, expected.states, strict=True):
        for name, one, other in zip(DecoderState._fields, mine, theirs, strict=True):
            assert torch.equal(one, other) if isinstance(other, Tensor) else one == other, name
    assert replay.output.level_sizes == expected.level_sizes
    assert np.array_equal(replay.label_map(replay.output), model.predict(IMAGE).label_map)
    assert model.training
    assert all(module.training for module in model.modules())


def test_the_model_may_see_the_image_smaller(model: Mask2Former) -> None:
    small = Replay(model, IMAGE, shortest_edge=32)
    assert small.output.image_size == (32, 58)
    assert np.array_equal(small.label_map(small.run()), model.predict(IMAGE, shortest_edge=32).label_map)


@pytest.mark.parametrize(
    ("edit", "layers"),
    [
        (Mute(1, from_layer=1), [1, 2, 3, 4]),
        (Mute(1, from_layer=3), [3, 4]),
        (Unmask(4), [4]),
        (PaintAttention(2, 0, np.zeros((4, 6), bool)), [2, 3, 4]),
        (ForceClass(1, 0), []),
        (Mute(1, from_layer=None), []),
    ],
)
def test_only_the_layers_from_the_edit_on_are_run(model: Mask2Former, replay: Replay, edit, layers) -> None:
    run = []
    handles = [
        module.register_forward_hook(lambda *_, number=number: run.append(number))
        for number, module in enumerate(model.transformer_decoder.layers, start=1)
    ]
    output = replay.run([edit], attention_weights=False)
    for handle in handles:
        handle.remove()
    assert run == layers
    for i in range(min(layers, default=LAYERS)):
        assert output.class_logits[i] is replay.output.class_logits[i]
    for i in layers:
        assert not torch.equal(output.class_logits[i], replay.output.class_logits[i])
    assert_same(output, replay.run([edit]))


def test_a_run_opens_in_the_query_explorer(replay: Replay) -> None:
    output = replay.run([Mute(2, from_layer=2), ForceClass(1, "car")])
    explorer = QueryExplorer.from_output(output, IMAGE, classes=CLASSES)
    assert np.array_equal(explorer.trace.class_probabilities[-1, 2], [0, 0, 0, 0, 1])
    assert not explorer.trace.attention[1][2].any()  # it is no longer there to look
    assert explorer.trace.attention[0][2].any()
    assert explorer.order[0] == 1
    explorer.close()


# --------------------------------------------------------------------------------------------------------------- muting


@pytest.mark.parametrize("muted", [[3], [0, 7]])
def test_muting_from_the_start_equals_removing_the_query_by_hand(model, replay: Replay, muted: list[int]) -> None:
    kept = [query for query in range(QUERIES) if query not in muted]
    smaller = copy.deepcopy(model)
    decoder = smaller.transformer_decoder
    decoder.query_features = nn.Parameter(decoder.query_features[kept])
    decoder.query_positions = nn.Parameter(decoder.query_positions[kept])
    expected = forward(smaller)
    output = replay.run([Mute(query) for query in muted])
    assert_same(replace(output, class_logits=output.class_logits[1:], masks=output.masks[1:]),
                replace(expected, class_logits=expected.class_logits[1:], masks=expected.masks[1:]), kept)  # fmt: skip
    for layer in range(1, LAYERS + 1):
        assert torch.equal(seen(output, layer, "cross_attention")[:, kept], seen(expected, layer, "cross_attention"))
        within = seen(output, layer, "self_attention")
        assert torch.equal(within[:, kept][:, :, kept], seen(expected, layer, "self_attention"))
        assert not within[:, muted].any()
        assert not within[:, :, muted].any()
    assert_same_scores(output, expected)
    assert replay.change(output).num_changed > 0


@pytest.mark.parametrize("first", [2, 3, 4])
def test_muting_from_a_layer_on_equals_dropping_the_row_there(model, replay: Replay, first: int) -> None:
    kept = [0, 1, 2, 4, 5, 6, 7]
    decoder, memory = model.transformer_decoder, replay._memory
    output = replay.run([Mute(3, from_layer=first)])
    with torch.inference_mode():
        queries = seen(replay.output, first - 1, "queries")[None, kept]
        embeddings = replay.output.masks[first - 1].embeddings[:, kept]
        for layer in range(first, LAYERS + 1):
            level = (layer - 1) % 3
            blocked, _ = attention_blocked(embeddings, memory.small_mask_features[level])
            queries, *_ = decoder.layers[layer - 1](
                queries, decoder.query_positions[kept], memory.features[level], memory.keys[level], blocked
            )
            class_logits, embeddings = decoder.predict(queries)
            assert torch.equal(output.class_logits[layer][:, kept], class_logits)
            assert torch.equal(output.masks[layer].embeddings[:, kept], embeddings)
            assert probabilities(output, layer)[3].tolist() == [0, 0, 0, 0, 1]
            assert seen(output, layer, "blocked")[3].all()
            assert not seen(output, layer, "opened")[3]
    for i in range(first):
        assert torch.equal(output.class_logits[i], replay.output.class_logits[i])


@pytest.mark.parametrize("first", [1, 3, None])
def test_a_muted_query_adds_exactly_nothing_to_any_result(replay: Replay, first: int | None) -> None:
    output = replay.run([Mute(3, from_layer=first)])
    assert probabilities(output)[3].tolist() == [0, 0, 0, 0, 1]
    assert not output.masks[-1].dense()[:, 3].any()
    kept = [0, 1, 2, 4, 5, 6, 7]
    dropped = replace(
        output,
        class_logits=[logits[:, kept] for logits in output.class_logits],
        masks=[MaskLogits(masks.embeddings[:, kept], masks.features) for masks in output.masks],
    )
    assert_same_scores(output, dropped)
    options = {"things": [1, 2], "object_mask_threshold": 0.3, "overlap_threshold": 0.1}
    mine, theirs = (postprocess.panoptic(o, **options) for o in (output, dropped))
    assert np.array_equal(mine.segments_map, theirs.segments_map)
    assert len(mine.segments) == len(theirs.segments) > 0
    mine, theirs = (postprocess.instance(o, score_threshold=1e-9) for o in (output, dropped))
    assert np.array_equal(mine.masks, theirs.masks)
    assert 3 not in {segment.query for segment in mine.segments}
    everything = postprocess.instance(output)  # with pairs of no score at all
    assert all(np.isfinite(segment.score) for segment in everything.segments)


def test_muting_in_the_result_only_leaves_the_decoder_alone(replay: Replay) -> None:
    output = replay.run([Mute(3, from_layer=None)])
    for i in range(LAYERS):
        assert torch.equal(output.class_logits[i], replay.output.class_logits[i])
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(output.class_logits[-1][:, others], replay.output.class_logits[-1][:, others])
    assert not torch.equal(output.class_logits[-1], replay.run([Mute(3, from_layer=1)]).class_logits[-1])


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(("label", "expected"), [(2, 2), ("car", 2), (4, 4), ("no object", 4)])
def test_a_forced_class_is_certain_and_changes_the_result_only(replay: Replay, label, expected: int) -> None:
    output = replay.run([ForceClass(5, label)])
    assert probabilities(output)[5].tolist() == [float(k == expected) for k in range(5)]
    rest = [query for query in range(QUERIES) if query != 5]
    assert torch.equal(output.class_logits[-1][:, rest], replay.output.class_logits[-1][:, rest])
    for i in range(LAYERS + 1):
        assert torch.equal(output.masks[i].embeddings, replay.output.masks[i].embeddings)
        assert (i == LAYERS) or torch.equal(output.class_logits[i], replay.output.class_logits[i])
    everywhere = replay.run([ForceClass(5, label, every_prediction=True)])
    assert all(probabilities(everywhere, i)[5, expected] == 1 for i in range(LAYERS + 1))


def test_what_is_muted_stays_muted(replay: Replay) -> None:
    for edits in ([Mute(5), ForceClass(5, 1)], [ForceClass(5, 1, every_prediction=True), Mute(5)]):
        assert probabilities(replay.run(edits))[5, 4] == 1


# ------------------------------------------------------------------------------------------------------ attention masks


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_painting_the_mask_that_was_there_changes_nothing(replay: Replay, layer: int) -> None:
    """For a row that the fallback opened, too: nothing is hidden there, and the painted row says so."""
    for query in range(QUERIES):
        edit = PaintAttention(layer, query, replay.hidden(layer, query))
        output = replay.run([edit], attention_weights=False)
        assert_same(output, replay.output)
        for other in range(1, LAYERS + 1):
            was = seen(replay.output, other, "blocked")
            assert torch.equal(seen(output, other, "blocked"), was)
        assert replay.change(output).num_changed == 0


def test_some_rows_were_opened_by_the_fallback(replay: Replay) -> None:
    """Else the test above would not try them."""
    assert any(seen(replay.output, layer, "opened").any() for layer in range(1, LAYERS + 1))


def test_a_painted_row_is_what_the_layer_sees(model, replay: Replay) -> None:
    painted = np.random.default_rng(1).random(replay.grid(2)) < 0.5
    output = replay.run([PaintAttention(2, 4, painted)])
    cross = seen(output, 2, "cross_attention")[:, 4].unflatten(1, replay.grid(2)).numpy()
    assert (cross[:, painted] == 0).all()
    assert (cross[:, ~painted] > 0).all()
    blocked = seen(replay.output, 2, "blocked").clone()
    blocked[4] = torch.from_numpy(painted).flatten()
    memory, decoder = replay._memory, model.transformer_decoder
    with torch.inference_mode():
        queries, *_ = decoder.layers[1](
            seen(replay.output, 1, "queries")[None], decoder.query_positions, memory.features[1], memory.keys[1],
            blocked[None],
        )  # fmt: skip
    assert torch.equal(seen(output, 2, "queries"), queries[0])


def test_a_row_painted_shut_is_opened_by_the_fallback(replay: Replay) -> None:
    shut = np.ones(replay.grid(3), bool)
    output, open_by_hand = replay.run([PaintAttention(3, 4, shut)]), replay.run([Unmask(3, 4)])
    assert_same(output, open_by_hand)
    assert seen(output, 3, "opened")[4]
    assert not seen(open_by_hand, 3, "opened")[4]
    assert not seen(output, 3, "blocked")[4].any()


def test_masking_is_switched_off_for_one_query_or_for_all(replay: Replay) -> None:
    one, everyone = replay.run([Unmask(2, 1)]), replay.run([Unmask(2)])
    was = seen(replay.output, 2, "blocked")
    rest = [query for query in range(QUERIES) if query != 1]
    assert not seen(one, 2, "blocked")[1].any()
    assert torch.equal(seen(one, 2, "blocked")[rest], was[rest])
    assert was.any()
    assert not seen(everyone, 2, "blocked").any()
    assert (seen(everyone, 2, "cross_attention") > 0).all()
    assert_same(everyone, replay.run([Unmask(2, query) for query in range(QUERIES)]))


def test_the_later_of_two_edits_holds(replay: Replay) -> None:
    painted = np.zeros(replay.grid(2), bool)
    painted[0] = True
    paint, unmask = PaintAttention(2, 1, painted), Unmask(2)
    assert seen(replay.run([unmask, paint]), 2, "blocked").sum() == 6
    assert not seen(replay.run([paint, unmask]), 2, "blocked").any()
    assert probabilities(replay.run([ForceClass(1, 0), ForceClass(1, 3)]))[1, 3] == 1
    assert_same(replay.run([Mute(1, from_layer=4), Mute(1, from_layer=2)]), replay.run([Mute(1, from_layer=2)]))


def test_grids_cover_the_padding(replay: Replay) -> None:
    """50 × 90 pixels are padded to 64 × 96: padding has cells that the model looks at, and so may a person."""
    assert [replay.grid(layer) for layer in range(1, 5)] == [(2, 3), (4, 6), (8, 12), (2, 3)]
    assert replay.coverage == (96 / 90, 64 / 50)
    hidden = replay.hidden(3, 4).copy()
    hidden[7:] = ~hidden[7:]  # rows of cells below the image: 8 pixels each, the image ends in the seventh
    assert not torch.equal(replay.run([PaintAttention(3, 4, hidden)]).class_logits[3], replay.output.class_logits[3])


def test_replay_runs_decoder_variants() -> None:
    """Start and step are the decoder's own: queries of another kind, and an order of levels of its own."""

    class Variant(TransformerDecoder):
        def start(self, memory: DecoderMemory) -> DecoderState:
            queries = self.query_features.neg().expand(len(memory.mask_features), -1, -1)
            return DecoderState(queries, *self.predict(queries), self.query_positions)

        def step(self, state: DecoderState, index: int, memory: DecoderMemory) -> DecoderState:
            after = super().step(state, index, memory)
            queries = after.queries + 0.5 * state.queries
            class_logits, embeddings = self.predict(queries)
            return after._replace(queries=queries, class_logits=class_logits, embeddings=embeddings)

        def level_of(self, index: int) -> int:
            return 2 - super().level_of(index)

    model = sure_model()
    decoder = Variant(model.config)
    decoder.load_state_dict(model.transformer_decoder.state_dict())
    model.transformer_decoder = decoder
    replay = Replay(model, IMAGE)
    assert_same(replay.run(), forward(model))
    assert [replay.grid(layer) for layer in range(1, 4)] == [(8, 12), (4, 6), (2, 3)]
    edits = [Mute(3, from_layer=2), PaintAttention(1, 4, np.eye(8, 12, dtype=bool)), ForceClass(1, 0)]
    output = replay.run(edits)
    assert_same(output, replay.run(edits, attention_weights=False))
    assert seen(output, 1, "blocked")[4].sum() == 8
    smaller = copy.deepcopy(model)
    kept = [0, 1, 2, 4, 5, 6, 7]
    for name in ("query_features", "query_positions"):
        setattr(smaller.transformer_decoder, name, nn.Parameter(getattr(decoder, name)[kept]))
    expected, muted = forward(smaller), replay.run([Mute(3)])
    for layer in range(1, LAYERS + 1):
        assert torch.equal(muted.class_logits[layer][:, kept], expected.class_logits[layer])


def test_replay_names_decoders_that_do_not_edit() -> None:
    class Stubborn(TransformerDecoder):
        def attention_mask(self, state: DecoderState, index: int, memory: DecoderMemory) -> tuple[Tensor, Tensor]:
            return super().attention_mask(state, index, memory._replace(edit_attention=None))

    model = sure_model()
    model.transformer_decoder = Stubborn(model.config)
    replay = Replay(model, IMAGE)
    with pytest.raises(ValueError, match=r"Layer 2 of this Stubborn does not use memory\.edit_attention"):
        replay.run([Unmask(2)])
    replay.run([Mute(1), ForceClass(2, 1)])


def test_edits_do_not_change_what_is_kept(replay: Replay) -> None:
    kept = [tensor.clone() for state in replay._states for tensor in state if isinstance(tensor, Tensor)]
    replay.run(
        [Mute(0), Mute(1, None), ForceClass(2, 1, True), Unmask(1), PaintAttention(2, 3, np.eye(4, 6, dtype=bool))]
    )
    now = [tensor for state in replay._states for tensor in state if isinstance(tensor, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    painted = np.zeros((4, 6), bool)
    edit = PaintAttention(2, 3, torch.from_numpy(painted))
    painted[:] = True
    assert not edit.blocked.any()


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Mute(8), "no query 8; they are numbered 0…7"),
        (Mute(-1), "no query -1"),
        (Mute(None), "no query None"),
        (Mute(0, from_layer=5), r"no layer 5; layers are numbered 1…4.* from_layer=None"),
        (Unmask(0), r"no layer 0; layers are numbered 1…4\.$"),
        (ForceClass(0, 5), "no class 5; they are numbered 0…3, 4: no object"),
        (ForceClass(0, "bus"), "no class 'bus'; there are road, sky, car, tree, no object"),
        (PaintAttention(3, 0, np.zeros((7, 12), bool)), "8 × 12 cells of stride 8, padding included, .* 7 × 12"),
    ],
)
def test_edits_that_do_not_fit_are_refused(replay: Replay, edit, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replay.run([edit])


def test_other_things_are_refused(replay: Replay) -> None:
    with pytest.raises(TypeError, match="ForceClass, PaintAttention or Unmask, got str"):
        replay.run(["mute"])
    with pytest.raises(ValueError, match=r"boolean map \[h, w\].* got float64 \[2, 3\]"):
        PaintAttention(1, 0, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="All 8 queries are muted"):
        replay.run([Mute(query) for query in range(QUERIES)])
    with pytest.raises(TypeError, match="layer by layer; this function has none"):
        Replay(lambda images: None, IMAGE)
    with pytest.raises(ValueError, match="no layer 5"):
        replay.grid(5)


def test_weights_that_diverged_are_refused() -> None:
    broken = sure_model()
    with torch.no_grad():
        broken.transformer_decoder.class_head.bias[0] = np.nan
    with pytest.raises(ValueError, match="class logits of prediction 0 hold NaN"):
        Replay(broken, IMAGE)


def test_a_truth_of_another_size_is_refused(replay: Replay) -> None:
    with pytest.raises(ValueError, match=r"truth is \[3, 4\], but the label maps are \[50, 90\]"):
        replay.change(replay.output, np.zeros((3, 4), int))


def test_class_names_must_fit(model) -> None:
    with pytest.raises(ValueError, match="predicts 4 classes, but there are 2 class names"):
        Replay(model, IMAGE, classes=Classes(("a", "b"), ((0, 0, 0), (9, 9, 9))))


# --------------------------------------------------------------------------------------- history, words, and comparison


def test_history() -> None:
    history = EditHistory()
    mute, force, remute = Mute(1), ForceClass(1, 2), Mute(1, from_layer=3)
    assert (history.edits, history.can_undo, history.can_redo) == ((), False, False)
    assert history.undo() == history.redo() == ()
    history.apply(mute)
    assert history.apply(force) == (mute, force)
    assert history.undo() == (mute,)
    assert history.redo() == (mute, force)
    assert history.apply(remute) == (force, remute)  # in place of the earlier one
    assert history.reset() == ()
    assert history.reset() == ()  # nothing to drop, so nothing more to undo
    assert history.undo() == (force, remute)
    assert history.undo() == (mute, force)
    history.apply(Unmask(2))  # what was undone cannot be made again
    assert not history.can_redo
    assert history.redo() == (mute, force, Unmask(2))


def test_a_new_stroke_takes_the_place_of_the_last() -> None:
    first, second = (PaintAttention(2, 1, np.full((2, 2), value)) for value in (True, False))
    edits = (first, Unmask(3, 1), Unmask(2))
    assert with_edit(edits, second) == (Unmask(3, 1), Unmask(2), second)


def test_edits_say_what_they_do() -> None:
    painted = PaintAttention(2, 1, np.eye(3, dtype=bool))
    edits = [Mute(3), Mute(3, None), ForceClass(1, 2), ForceClass(1, 4, True), painted, Unmask(2), Unmask(2, 7)]
    assert [describe(edit, CLASSES.names) for edit in edits] == [
        "query 3: muted from layer 1 on",
        "query 3: muted in the result only",
        "query 1: called car",
        "query 1: called no object in every prediction",
        "query 1, layer 2: attention mask painted, 3 of 9 cells hidden",
        "all queries, layer 2: masking off",
        "query 7, layer 2: masking off",
    ]


def test_label_maps_are_compared_by_hand() -> None:
    before = np.array([[0, 0, 1], [2, 2, 2]], np.uint8)
    after = np.array([[0, 1, 1], [0, 0, 2]], np.uint8)
    truth = np.array([[0, 0, 255], [0, 0, 2]], np.uint8)
    change = compare_label_maps(before, after, 4, truth)
    assert change.changed.tolist() == [[False, True, False], [True, True, False]]
    assert (change.num_changed, change.share_changed) == (3, 0.5)
    assert change.pixels_before.tolist() == [2, 1, 3, 0]
    assert change.pixels_after.tolist() == [3, 2, 1, 0]
    assert change.flows() == [(2, 0, 2), (0, 1, 1)]
    assert change.iou_before == (50, None, pytest.approx(100 / 3), None)
    assert change.iou_after == (75, None, 100, None)
    assert compare_label_maps(before, after, 3).iou_after is None
    with pytest.raises(ValueError, match="of one size"):
        compare_label_maps(before, after.T, 4)
    with pytest.raises(ValueError, match=r"before holds 0…2, but classes are 0…1"):
        compare_label_maps(before, after, 2)


def test_a_replay_compares_with_what_the_model_says(model, replay: Replay) -> None:
    truth = model.predict(IMAGE).label_map
    change = replay.change(replay.run([Mute(6)]), truth)
    assert np.array_equal(change.before, truth)
    assert change.num_changed > 0
    assert change.iou_before[1] == 100 > change.iou_after[1]
    assert replay.change(replay.output).num_changed == 0
