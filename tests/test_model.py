"""The whole model, stage by stage, against the reference vectors of the official implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_lab import recipes
from m2f_lab.loss import Criterion
from m2f_lab.model import ModelConfig, build_model
from m2f_lab.model.transformer_decoder import attention_blocked
from m2f_lab.structures import MaskLogits, Target
from m2f_lab.weights import load_weights

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "official_swin.safetensors")


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    settings = json.loads((GOLDEN / "official_swin.json").read_text())["config"]
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(
            num_classes=settings["num_classes"],
            backbone_options=dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
            hidden_dim=settings["hidden_dim"],
            mask_dim=settings["mask_dim"],
            num_queries=settings["num_queries"],
            num_heads=settings["num_heads"],
            num_encoder_layers=settings["encoder_layers"],
            encoder_feedforward_dim=settings["encoder_feedforward_dim"],
            num_decoder_layers=settings["decoder_layers"],
            decoder_feedforward_dim=settings["decoder_feedforward_dim"],
        )
    )
    path = tmp_path_factory.mktemp("official") / "model_final.pth"
    torch.save({"model": {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}}, path)
    load_weights(model, path)
    return model.eval()


def assert_agrees(ours, reference):
    """To 1e-4 relative to the largest value of the reference."""
    assert ours.shape == reference.shape
    difference = (ours - reference).abs().max() / reference.abs().max()
    assert difference < 1e-4, f"relative difference {difference:.1e}"


@torch.no_grad()
def test_every_stage_agrees_with_the_official_model(model, golden):
    pyramid = model.backbone(golden["padded_input"])
    for i, features in enumerate(pyramid):
        assert_agrees(features, golden[f"backbone.res{i + 2}"])
    mask_features, levels = model.pixel_decoder(pyramid)
    assert_agrees(mask_features, golden["pixel_decoder.mask_features"])
    for i, level in enumerate(levels):
        assert_agrees(level, golden[f"pixel_decoder.level.{i}"])
    states = model.transformer_decoder(model.transformer_decoder.prepare(levels, mask_features))
    assert len(states) == 5
    for i, state in enumerate(states):
        assert_agrees(state.class_logits, golden[f"decoder.{i}.class_logits"])
        assert_agrees(MaskLogits(state.embeddings, mask_features).dense(), golden[f"decoder.{i}.mask_logits"])


@torch.no_grad()
@pytest.mark.parametrize("as_float", [False, True])
def test_raw_images_are_normalised_then_padded(model, golden, as_float):
    """Sizes are no multiple of 32; the batch of the reference was padded to its largest image."""
    for i in range(2):
        image = golden[f"image.{i}"].unsqueeze(0)
        height, width = image.shape[2:]
        padded = model.preprocess(image.float() if as_float else image)
        reference = golden["padded_input"][i : i + 1, :, : padded.shape[2], : padded.shape[3]]
        torch.testing.assert_close(padded, reference, atol=1e-5, rtol=1e-5)
        output = model(image.float() if as_float else image)
        assert output.image_size == (height, width)
        assert output.padded_size == (-(-height // 32) * 32, -(-width // 32) * 32)
        if tuple(padded.shape[2:]) == tuple(golden["padded_input"].shape[2:]):
            assert_agrees(output.class_logits[-1][0], golden["decoder.4.class_logits"][i])
            assert_agrees(output.masks[-1].dense()[0], golden["decoder.4.mask_logits"][i])


def test_an_empty_mask_opens_its_row():
    """Blocked everywhere means look everywhere; otherwise softmax over nothing gives NaN."""
    features = torch.tensor([[[1.0, -1.0, -2.0, 3.0]]]).view(1, 1, 2, 2)
    embeddings = torch.tensor([[[1.0], [-1.0], [0.0]]])
    blocked, opened = attention_blocked(embeddings, features)
    assert blocked[0].tolist() == [
        [False, True, True, False],
        [True, False, False, True],
        [False, False, False, False],  # a logit of 0 is probability 0.5: not blocked
    ]
    blocked, opened = attention_blocked(-torch.ones(1, 1, 1), torch.ones(1, 1, 2, 2))
    assert opened.tolist() == [[True]]
    assert not blocked.any()


@torch.no_grad()
def test_decoder_states_explain_the_output_and_change_nothing(model, golden):
    image = golden["image.0"].unsqueeze(0)
    output, explained = model(image), model(image, keep_attention=True)
    assert all(state.cross_attention is None and state.self_attention is None for state in output.states)
    for plain, other in zip(output.class_logits, explained.class_logits, strict=True):
        assert torch.equal(plain, other)
    learned, *after_layers = explained.states
    assert learned.level is None
    assert learned.blocked is None
    for i, state in enumerate(after_layers):
        height, width = explained.level_sizes[state.level]
        # What layer i may not look at is the negative part of the mask predicted before it.
        outside = explained.masks[i].resized((height, width)).flatten(2) < 0
        assert torch.equal(state.blocked, outside & ~state.opened.unsqueeze(2))
        weights = state.cross_attention
        assert weights.shape == (1, 8, 20, height * width)
        assert (weights.masked_select(state.blocked.unsqueeze(1).expand_as(weights)) == 0).all()
        torch.testing.assert_close(weights.sum(3), torch.ones(1, 8, 20))
        torch.testing.assert_close(state.self_attention.sum(3), torch.ones(1, 8, 20))
        # Queries after the layer give its prediction.
        logits, embeddings = model.transformer_decoder.predict(state.queries)
        assert torch.equal(logits, explained.class_logits[i + 1])
        assert torch.equal(embeddings, explained.masks[i + 1].embeddings)


@torch.no_grad()
def test_sampling_weights_of_a_hook_sum_to_one(model, golden):
    seen = []
    attention = model.pixel_decoder.layers[0].attention
    handle = attention.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[1].weights))
    model(golden["image.0"].unsqueeze(0))
    handle.remove()
    torch.testing.assert_close(seen[0].sum(dim=(3, 4)), torch.ones(seen[0].shape[:3]))


@torch.no_grad()
def test_decoder_memory_edits_every_layer_and_rows_cut_the_state(model, golden):
    """`edit_attention` reaches every layer, and `rows` cuts all that the next layer needs."""
    decoder = model.transformer_decoder
    mask_features, levels = model.pixel_decoder(model.backbone(golden["padded_input"]))
    seen = []

    def edit(index, blocked, opened):
        seen.append(index)
        return torch.zeros_like(blocked), torch.ones_like(opened)

    states = decoder(decoder.prepare(levels, mask_features, edit_attention=edit))
    assert seen == [0, 1, 2, 3]
    assert all(state.opened.all() and not state.blocked.any() for state in states[1:])
    memory = decoder.prepare(levels, mask_features)
    rows = torch.tensor([3, 5])
    few = decoder.step(decoder.start(memory).rows(rows), 0, memory)
    assert few.queries.shape[1] == 2
    torch.testing.assert_close(few.positions, decoder.query_positions[rows])


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


def test_no_full_resolution_mask_is_ever_multiplied_out(model):
    images = torch.randint(0, 256, (1, 3, 128, 224), dtype=torch.uint8)
    queries, area = model.config.num_queries, (128 // 4) * (224 // 4)  # no side of a level is Q
    with Shapes() as shapes:
        output = model(images)
    big = [s for s in shapes.seen if queries in s and torch.Size(s).numel() >= queries * area]
    assert not big
    with Shapes() as shapes:
        output.masks[-1].dense()
    assert any(torch.Size(s).numel() == queries * area for s in shapes.seen)  # the net would have caught it


def test_images_of_a_batch_do_not_see_each_other(model):
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together, alone = model(images), model(images[1:])
    torch.testing.assert_close(together.class_logits[-1][1:], alone.class_logits[-1], atol=1e-4, rtol=1e-4)


def test_every_parameter_learns(model):
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    output = model(images)
    points = torch.rand(1, 32, 2)
    loss = sum(c.square().mean() for c in output.class_logits) + sum(m.at(points).square().mean() for m in output.masks)
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    # A key's bias shifts all scores of a query alike, so softmax cancels it; nothing else may be idle.
    assert idle == []


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 31)])
def test_images_smaller_than_the_coarsest_stride(model, size):
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)).numpy()
    assert model.predict(image).label_map.shape == size
    assert all(mask.shape == size for mask in model.predict(image, task="instance").masks)


def test_model_and_losses_under_autocast(model, golden):
    """Whoever writes a loop of their own wraps both; every gradient is there, and the loss is close to float32's."""
    images = golden["image.0"].unsqueeze(0)
    target = Target(golden["target.0.classes"], masks=golden["target.0.masks"])
    criterion = Criterion(num_classes=model.config.num_classes, num_points=256)
    totals = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.manual_seed(0)
            totals.append(criterion(model(images), [target])["total"])
            totals[-1].backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        model.zero_grad()
    assert totals[1].dtype == torch.float32
    torch.testing.assert_close(totals[1], totals[0], rtol=0.05, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.05)])
def test_weights_may_be_of_another_type(dtype, tolerance):
    """Positions are computed in float32 and added in the weights' type; results are of float32's up to rounding."""
    torch.manual_seed(0)
    model = build_model(recipes.debug_tiny(num_classes=3).model).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    expected = model.predict(image, return_scores=True).scores
    model.to(dtype)
    np.testing.assert_allclose(model.predict(image, return_scores=True).scores, expected, rtol=0, atol=tolerance)


def test_images_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\].*\(64, 64, 3\)"):
        model(torch.zeros(64, 64, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
def test_the_gpu_agrees(model, golden):
    image = golden["image.0"].unsqueeze(0)
    expected = model(image)
    try:
        output = model.cuda()(image.cuda())
        torch.testing.assert_close(output.class_logits[-1].cpu(), expected.class_logits[-1], atol=1e-3, rtol=1e-3)
    finally:
        model.cpu()
