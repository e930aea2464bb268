"""EoMT: parity with transformers on random weights, key maps, annealing of masks, states, and training."""

import numpy as np
import pytest
import torch

import m2f_lab.ops._torchvision  # noqa: F401  isort: skip  (before transformers, which imports torchvision)
from timm.layers import resample_abs_pos_embed
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
)
from transformers.utils import logging

from m2f_lab.data import Classes
from m2f_lab.evaluation import evaluate
from m2f_lab.explore import CounterfactualExplorer, PixelExplorer, QueryExplorer, SamplingExplorer
from m2f_lab.inference import predict
from m2f_lab.loss import Criterion
from m2f_lab.model.eomt import EoMT, build_eomt
from m2f_lab.recipes import ModelConfig
from m2f_lab.structures import Target
from m2f_lab.training import train
from m2f_lab.weights import load_model, load_weights, save_weights
from m2f_lab.weights.eomt import EOMT, EOMT_DINOV3, EOMT_OFFICIAL, eomt_to_huggingface
from tests.toy_training import StopAt, assert_same_run, toy_recipe

CLASSES, QUERIES, DEPTH, BLOCKS, WIDTH, HEADS = 5, 7, 4, 3, 32, 4
SMALL = dict(
    hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, num_blocks=BLOCKS, num_queries=QUERIES,
    num_labels=CLASSES,
)  # fmt: skip


def small_eomt(backbone: str = "vit_small_patch14_reg4_dinov2", **options) -> EoMT:
    sizes = dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    return build_eomt(
        ModelConfig(
            num_classes=CLASSES,
            backbone=backbone,
            backbone_options={**sizes, **options},
            num_queries=QUERIES,
            num_decoder_layers=BLOCKS,
            drop_path_rate=0.0,
        )
    ).eval()


@torch.no_grad()
def scramble(model: torch.nn.Module) -> None:
    """Make every number random: fresh models have zero biases and registers, which would hide mistakes."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name not in ("attn_mask_probs", "mask_probabilities"):
            tensor.add_(torch.randn_like(tensor), alpha=0.05)


def build_theirs(kind: type = EomtForUniversalSegmentation, config: type = EomtConfig, **options):
    theirs = kind(config(**SMALL, **options)).eval()
    scramble(theirs)
    return theirs


@torch.no_grad()
def predictions_of(theirs, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mask logits, class logits) of all predictions; the model itself returns the last one."""
    found, predict = [], theirs.predict
    theirs.predict = lambda tokens: found.append(predict(tokens)) or found[-1]
    theirs(pixel_values=images)
    theirs.predict = predict
    return found


@torch.no_grad()
def assert_same_predictions(ours: EoMT, theirs, size: tuple[int, int], count: int, **options) -> None:
    """Class and mask logits of all predictions, relative to the largest."""
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    torch.manual_seed(1)
    expected = predictions_of(theirs, ours.preprocess(images))
    torch.manual_seed(1)
    output = ours(images, **options)
    assert output.num_predictions == len(expected) == count
    for masks, class_logits, (their_masks, their_class_logits) in zip(
        output.masks, output.class_logits, expected, strict=True
    ):
        torch.testing.assert_close(class_logits, their_class_logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(masks.dense(), their_masks, rtol=0, atol=1e-4)
        assert 0.05 < (their_masks > 0).float().mean() < 0.95  # there is something to mask


@pytest.mark.parametrize(
    ("patch", "registers", "side", "upscales"), [(16, 4, 64, 2), (16, 2, 96, 2), (14, 4, 70, 1), (8, 1, 48, 1)]
)
def test_eomt_predicts_as_transformers(patch, registers, side, upscales):
    theirs = build_theirs(image_size=side, patch_size=patch, num_register_tokens=registers, num_upscale_blocks=upscales)
    ours = small_eomt(img_size=side, patch_size=patch, reg_tokens=registers)
    ours.load_state_dict(EOMT.to_ours(theirs.state_dict()).tensors)
    assert_same_predictions(ours, theirs, (side, side), BLOCKS + 1)


def test_eomt_of_a_wide_image_predicts_as_transformers():
    """Transformers has square grids only; its position embedding is resampled here, as timm does it for ours."""
    theirs = build_theirs(image_size=64, patch_size=16)
    ours = small_eomt(img_size=64, patch_size=16)
    ours.load_state_dict(EOMT.to_ours(theirs.state_dict()).tensors)
    table = resample_abs_pos_embed(ours.backbone.network.pos_embed, [3, 6], [4, 4], num_prefix_tokens=0)[0]
    theirs.embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(table.detach())
    theirs.embeddings.position_ids = torch.arange(18)[None]
    theirs.grid_size = (3, 6)
    assert_same_predictions(ours, theirs, (45, 90), BLOCKS + 1)  # padded to 48 × 96


@pytest.mark.parametrize(("probabilities", "count"), [((0, 0, 0), 1), ((0, 1, 1), 3), ((0, 0, 1), 2)])
def test_eomt_in_evaluation_predicts_only_to_mask(probabilities, count):
    theirs = build_theirs(image_size=64, patch_size=16)
    theirs.attn_mask_probs.copy_(torch.tensor(probabilities))
    ours = small_eomt(img_size=64, patch_size=16)
    ours.load_state_dict(EOMT.to_ours(theirs.state_dict()).tensors)
    assert_same_predictions(ours, theirs, (64, 64), count)
    images = torch.randint(0, 256, (1, 3, 64, 64))
    last, explained = ours(images), ours(images, keep_attention=True)
    assert explained.num_predictions == len(explained.states) == BLOCKS + 1
    torch.testing.assert_close(last.masks[-1].dense(), explained.masks[-1].dense())


def test_eomt_in_training_predicts_as_transformers():
    """With the same random queries spared from masks."""
    theirs = build_theirs(image_size=64, patch_size=16).train()
    theirs.attn_mask_probs.copy_(torch.tensor([0.0, 0.4, 0.8]))
    ours = small_eomt(img_size=64, patch_size=16).train()
    ours.load_state_dict(EOMT.to_ours(theirs.state_dict()).tensors)
    assert_same_predictions(ours, theirs, (64, 64), BLOCKS + 1)


def test_eomt_with_swiglu_predicts_as_transformers():
    theirs = build_theirs(image_size=64, patch_size=16, use_swiglu_ffn=True)
    ours = small_eomt("vit_giant_patch14_reg4_dinov2", img_size=64, patch_size=16, mlp_ratio=5.5)
    translated = EOMT.to_ours(theirs.state_dict()).tensors
    ours.load_state_dict(translated)
    assert_same_predictions(ours, theirs, (64, 64), BLOCKS + 1)
    assert_same_names(ours, theirs)
    joined = EOMT.to_ours({"layers.2.mlp.weights_in.bias": torch.ones(176)})  # as files of release 4 have it
    assert joined.tensors.keys() == {"backbone.network.blocks.2.mlp.fc1.bias"}


def test_eomt_with_dinov3_predicts_as_transformers():
    theirs = build_theirs(
        EomtDinov3ForUniversalSegmentation, EomtDinov3Config, image_size=64, intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    ours = small_eomt("vit_small_patch16_dinov3_qkvb", img_size=64)
    ours.load_state_dict(EOMT_DINOV3.to_ours(theirs.state_dict()).tensors)
    assert_same_predictions(ours, theirs, (64, 64), BLOCKS + 1)
    assert_same_predictions(ours, theirs, (64, 64), BLOCKS + 1, keep_attention=True)
    assert_same_names(ours, theirs)


def assert_same_names(ours: EoMT, theirs) -> None:
    """What is written is what was read, tensor by tensor."""
    written = eomt_to_huggingface(ours.state_dict())
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if name != "criterion.empty_weight"}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_eomt_key_map_goes_both_ways():
    theirs = build_theirs(image_size=64, patch_size=16)
    translation = EOMT.to_ours(theirs.state_dict())
    assert EOMT.recognises(theirs.state_dict())
    assert not translation.unknown
    assert not translation.incomplete
    ours = small_eomt(img_size=64, patch_size=16)
    ours.load_state_dict(translation.tensors)
    assert_same_names(ours, theirs)


def test_eomt_official_key_map_goes_both_ways():
    """The names that the authors' network gives its tensors, one of each kind."""
    ours = small_eomt(img_size=64, patch_size=16)
    theirs = EOMT_OFFICIAL.to_theirs(ours.state_dict())
    assert {
        "network.attn_mask_probs", "network.q.weight", "network.class_head.bias", "network.mask_head.4.weight",
        "network.upscale.1.conv1.bias", "network.upscale.1.conv2.weight", "network.upscale.0.norm.weight",
        "network.encoder.backbone.cls_token", "network.encoder.backbone.reg_token",
        "network.encoder.backbone.pos_embed", "network.encoder.backbone.patch_embed.proj.weight",
        "network.encoder.backbone.blocks.0.attn.qkv.bias", "network.encoder.backbone.blocks.3.ls2.gamma",
        "network.encoder.backbone.norm.bias",
    } < theirs.keys()  # fmt: skip
    theirs["criterion.empty_weight"] = torch.ones(CLASSES + 1)
    theirs["network.encoder.pixel_mean"] = theirs["network.encoder.pixel_std"] = torch.ones(1, 3, 1, 1)
    translation = EOMT_OFFICIAL.to_ours(theirs)
    assert EOMT_OFFICIAL.recognises(theirs)
    assert not translation.unknown
    ours.load_state_dict(translation.tensors)


def test_eomt_anneals_masks_block_by_block():
    """Published for ADE20K and four blocks: from step 6520 to 32600 of 39120, which are sixths."""
    model = small_eomt(img_size=64, patch_size=16)
    found = []
    for progress in (0, 0.2, 0.3, 0.4, 0.5, 0.8, 1):
        model.anneal(progress)
        found.append(model.mask_probabilities.tolist())
    expected = [[1, 1, 1], [1, 1, 1], [0.5**0.9, 1, 1], [0, 1, 1], [0, 0.5**0.9, 1], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)


def test_eomt_half_annealed_masks_the_given_share():
    model = small_eomt(img_size=64, patch_size=16).train()
    model.mask_probabilities.copy_(torch.tensor([0.25, 1.0, 0.0]))
    states = model(torch.randint(0, 256, (200, 3, 32, 32))).states
    assert states[1].opened.float().mean() == pytest.approx(0.75, abs=0.05)
    assert not states[2].opened.any()
    assert not states[3].opened.any()
    assert not states[3].blocked.any()
    assert not states[1].blocked[states[1].opened].any()


def test_eomt_in_evaluation_repeats_its_draw():
    model = small_eomt(img_size=64, patch_size=16)
    model.mask_probabilities.fill_(0.5)
    image = torch.randint(0, 256, (1, 3, 64, 64))
    first, second = model(image), model(image)
    assert torch.equal(first.masks[-1].dense(), second.masks[-1].dense())


@pytest.mark.parametrize(
    "backbone", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_small_patch16_224"]
)
def test_eomt_states_hold_what_queries_attended_to(backbone):
    model = small_eomt(backbone, patch_size=16, img_size=64)
    scramble(model)
    output = model(torch.randint(0, 256, (2, 3, 40, 70)), keep_attention=True)  # padded to 48 × 80: 15 patches
    assert output.level_sizes == ((3, 5),)
    assert output.padded_size == (48, 80)
    assert output.image_size == (40, 70)
    assert len(output.states) == BLOCKS + 1
    assert output.states[0].level is output.states[0].blocked is output.states[0].cross_attention is None
    torch.testing.assert_close(output.states[0].queries[1], model.query_features)
    for state, class_logits, masks in zip(output.states, output.class_logits, output.masks, strict=True):
        assert state.class_logits is class_logits
        assert state.embeddings is masks.embeddings
    for before, state in zip(output.masks, output.states[1:], strict=False):
        assert state.level == 0
        assert state.opened.shape == (2, QUERIES)
        assert torch.equal(state.blocked, before.resized((3, 5)).flatten(2) <= 0)
        assert state.cross_attention.shape == (2, HEADS, QUERIES, 15)
        assert state.self_attention.shape == (2, HEADS, QUERIES, QUERIES)
        assert not state.cross_attention[state.blocked[:, None].expand(-1, HEADS, -1, -1)].any()
        total = state.cross_attention.sum(-1) + state.self_attention.sum(-1)
        assert (total < 1).all()
        assert (total > 0.5).all()


def test_eomt_predicts_the_same_with_attention_kept():
    model = small_eomt(img_size=64, patch_size=16)
    scramble(model)
    images = torch.randint(0, 256, (1, 3, 64, 64))
    plain, kept = model(images), model(images, keep_attention=True)
    torch.testing.assert_close(plain.masks[-1].dense(), kept.masks[-1].dense(), rtol=1e-4, atol=1e-5)
    assert plain.states[-1].cross_attention is None


def test_eomt_recomputes_blocks_to_the_same_gradient():
    model = small_eomt(img_size=64, patch_size=16).train()
    images = torch.randint(0, 256, (1, 3, 64, 64))
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.backbone.checkpointed = checkpointed
        output = model(images)
        sum(masks.dense().square().mean() for masks in output.masks).backward()
        gradients.append([parameter.grad.clone() for parameter in model.backbone.parameters()])
    torch.testing.assert_close(*gradients)


def test_eomt_refuses_what_is_no_vit():
    with pytest.raises(ValueError, match="EoMT takes a ViT"):
        build_eomt(ModelConfig(num_classes=2, backbone="test_resnet", drop_path_rate=0.0))
    with pytest.raises(ValueError, match="EoMT takes a ViT"):
        build_eomt(ModelConfig(num_classes=2, backbone="vit_of_my_dreams"))
    with pytest.raises(ValueError, match="has 4 blocks"):
        build_eomt(
            ModelConfig(num_classes=2, backbone="vit_tiny_patch16_224", backbone_options={"depth": 4}, num_queries=4)
        )
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        small_eomt(img_size=64)(torch.zeros(1, 4, 32, 32))


def rectangles(count: int) -> tuple[torch.Tensor, list[Target]]:
    """Images with a bright rectangle each, of class 1 on class 0."""
    images, targets = torch.full((count, 3, 48, 64), 60.0), []
    for i, image in enumerate(images):
        label = torch.zeros(48, 64, dtype=torch.long)
        label[8 + i : 32, 10 : 40 + 4 * i] = 1
        image[:, label == 1] = 200.0
        targets.append(Target.from_label_map(label))
    return images, targets


@pytest.mark.parametrize("backbone", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_eomt_learns_with_the_library_s_criterion(backbone):
    model = small_eomt(backbone, img_size=64, patch_size=16, init_values=1.0).train()
    criterion = Criterion(num_classes=CLASSES, num_points=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images, targets = rectangles(3)
    totals = []
    for step in range(30):
        model.anneal(step / 30)
        losses = criterion(model(images), targets)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        totals.append(losses["total"].item())
    assert sum(totals[-3:]) < 0.5 * sum(totals[:3])
    assert len([name for name in losses if name != "total"]) == 3 * (BLOCKS + 1)


def test_eomt_trains_resumes_reopens_and_is_explored(root, tmp_path):
    sizes = dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, img_size=64, patch_size=16)
    recipe = toy_recipe("vit_small_patch14_reg4_dinov2").vary(model=dict(backbone_options=sizes, drop_path_rate=0.1))
    whole = train(recipe, root, tmp_path / "whole", build=build_eomt)
    with pytest.raises(RuntimeError):
        train(recipe, root, tmp_path / "stopped", [StopAt(3, RuntimeError())], build=build_eomt)
    resumed = train(recipe.vary(builder="m2f_lab.model.eomt:build_eomt"), root, tmp_path / "stopped")
    assert_same_run(resumed, whole)
    model = whole.model()
    assert isinstance(model, EoMT)
    assert model.mask_probabilities.tolist() == [0, 0]  # annealed to the end
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    label_map = predict(model, image).label_map
    assert label_map.shape == (50, 70)
    save_weights(model, tmp_path / "saved")
    assert np.array_equal(predict(load_model(tmp_path / "saved"), image).label_map, label_map)
    assert evaluate(model, recipe, root)["mIoU"] >= 0


def test_load_weights_reads_eomt_of_transformers(tmp_path):
    logging.disable_progress_bar()
    theirs = build_theirs(image_size=64, patch_size=16)
    theirs.save_pretrained(tmp_path)
    ours = small_eomt(img_size=64, patch_size=16)
    assert load_weights(ours, tmp_path).format == "Hugging Face EoMT"
    assert_same_predictions(ours, theirs, (64, 64), BLOCKS + 1)


def test_load_weights_reads_the_authors_eomt(tmp_path):
    saved, loaded = (small_eomt(img_size=64, patch_size=16) for _ in range(2))
    torch.save(EOMT_OFFICIAL.to_theirs(saved.state_dict()), tmp_path / "pytorch_model.bin")
    assert load_weights(loaded, tmp_path / "pytorch_model.bin").format == "official EoMT"
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())


def test_eomt_opens_in_explorers(tmp_path):
    model = small_eomt(img_size=64, patch_size=16)
    scramble(model)
    model.mask_probabilities.copy_(torch.tensor([0.0, 0.0, 1.0]))  # annealed but for the last block
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    model.classes = Classes(tuple("abcde"), tuple((50 * i, 0, 0) for i in range(CLASSES)))
    explorer = QueryExplorer(model, image)
    trace = explorer.trace
    assert trace.num_predictions == BLOCKS + 1
    assert trace.missing == ()
    assert [cells.shape for cells in trace.blocked] == [(QUERIES, 4, 5)] * BLOCKS
    assert [cells.any() for cells in trace.blocked] == [False, False, True]
    assert trace.strides == (16,) * BLOCKS
    assert [weights.shape for weights in trace.attention] == [(QUERIES, HEADS, 4, 5)] * BLOCKS
    explorer.layer, explorer.head = 2, 1
    explorer.save_html(tmp_path / "queries.html")
    explorer.close()
    PixelExplorer(model, image).close()
    for tool in (SamplingExplorer, CounterfactualExplorer):
        with pytest.raises((TypeError, ValueError), match="EoMT"):
            tool(model, image)
