"""The backbone: Swin pads first, weights load unchanged, and what has no pyramid is refused."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformerBlock

from m2f_lab.model.backbone import Backbone
from m2f_lab.model.swin import SwinBlock
from m2f_lab.recipes import ModelConfig

SMALL_SWIN = dict(
    backbone="swin_tiny_patch4_window7_224",
    backbone_options=dict(embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8)),
    drop_path_rate=0.0,
)


def build(backbone, **changes):
    return Backbone(ModelConfig(num_classes=3, backbone=backbone, **(dict(drop_path_rate=0.0) | changes)))


@pytest.mark.parametrize(
    "name", ["resnet18", "test_resnet", "convnext_atto", "mobilenetv3_small_050", "swin_s3_tiny_224"]
)
def test_pyramid_of_any_timm_name(name):
    backbone = build(name).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 96, 64))
    assert [tuple(x.shape[1:]) for x in features] == [
        (c, 96 // s, 64 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", r"strides \(16, 16, 16, 16\).*needs strides \(4, 8, 16, 32\)"),
        ("swinv2_tiny_window8_256", "cannot process an image of 64 × 96"),
        ("resnet5O", "Did you mean .*resnet50"),
    ],
)
def test_backbones_without_a_pyramid_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build(name)


def test_stochastic_depth_that_a_backbone_lacks_is_refused():
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.0"):
        build("vgg11", drop_path_rate=0.1)


def test_no_stochastic_depth_means_none():
    """timm's own default for Swin is 0.1."""
    assert not [m for m in build(**SMALL_SWIN).modules() if isinstance(m, DropPath)]
    rates = [m.drop_prob for m in build(**SMALL_SWIN | {"drop_path_rate": 0.3}).modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(0.3)


def window_attention_as_published(block, x):
    """Shifted-window attention by timm's attention module, in the order of the Swin paper's code."""
    _, height, width, _ = x.shape
    size, shift = block.window[0], block.shift[0]
    x = torch.nn.functional.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    padded_height, padded_width = x.shape[1:3]
    region = torch.zeros(1, padded_height, padded_width, 1)
    bands = [slice(0, -size), slice(-size, -shift), slice(-shift, None)] if shift else [slice(None)]
    for i, rows in enumerate(bands):
        for j, columns in enumerate(bands):
            region[:, rows, columns] = 3 * i + j
    x = torch.roll(x, (-shift, -shift), (1, 2))

    def windows(maps):
        b, h, w, c = maps.shape
        return maps.view(b, h // size, size, w // size, size, c).transpose(2, 3).reshape(-1, size * size, c)

    regions = windows(region)  # (windows, cells, 1)
    mask = torch.where(regions != regions.transpose(1, 2), -100.0, 0.0)
    attended = block.attn(windows(x), mask=mask)
    attended = attended.view(x.shape[0], padded_height // size, padded_width // size, size, size, -1)
    attended = attended.transpose(2, 3).reshape(x.shape)
    return torch.roll(attended, (shift, shift), (1, 2))[:, :height, :width]


@pytest.mark.parametrize("size", [(14, 14), (16, 24), (5, 9), (8, 8)])
def test_swin_pads_before_the_shift(size):
    torch.manual_seed(0)
    block = build(**SMALL_SWIN).eval().network.layers[1].blocks[1]
    assert any(block.shift)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = timms_block(block)
    x = torch.randn(2, *size, 24)
    with torch.no_grad():
        ours, normalised = block.attend(x), block.norm1(x)
        torch.testing.assert_close(ours, window_attention_as_published(block, normalised), atol=1e-5, rtol=1e-5)
        timms_order = theirs._attn(normalised)
    if size == (14, 14):  # whole windows: nothing to pad, both orders agree
        torch.testing.assert_close(timms_order, ours)
    else:  # the trap is real
        assert (timms_order - ours).abs().max() > 0.1 * ours.abs().max()


def timms_block(block):
    """A block of timm's with the parameters of ours."""
    theirs = SwinTransformerBlock(
        24, (7, 7), num_heads=2, window_size=7, shift_size=block.shift, always_partition=True, dynamic_mask=True
    )
    theirs.load_state_dict(block.state_dict())
    return theirs


def test_swin_blocks_are_all_replaced_and_keep_their_names():
    backbone = build(**SMALL_SWIN)
    assert not [m for m in backbone.modules() if isinstance(m, SwinTransformerBlock)]
    assert len([m for m in backbone.modules() if isinstance(m, SwinBlock)]) == 5
    theirs = timm.create_model(SMALL_SWIN["backbone"], num_classes=0, **SMALL_SWIN["backbone_options"])
    names = [name for name in theirs.state_dict() if not name.startswith("norm.")]
    assert list(backbone.network.state_dict()) == names


@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {}), (SMALL_SWIN["backbone"], SMALL_SWIN["backbone_options"])]
)
def test_weights_from_a_timm_file_load_unchanged(name, options, tmp_path):
    torch.manual_seed(0)
    classifier = timm.create_model(name, **options)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    backbone = build(name, backbone_options=options, backbone_weights=str(tmp_path / "weights.pth"))
    theirs = classifier.state_dict()
    ours = backbone.network.state_dict()
    assert len(ours) > 50
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_missing_weights_are_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*True to download"):
        build("resnet18", backbone_weights="nowhere.pth")


NAMES_THAT_FILTER = ["resnet18", "swin_tiny_patch4_window7_224", "hgnetv2_b0", "convnext_atto", "tf_efficientnet_lite0"]


@pytest.mark.parametrize("name", NAMES_THAT_FILTER)
def test_a_file_that_lacks_a_weight_is_refused(name, tmp_path):
    """timm itself takes what fits, and leaves the rest random without an error."""
    state = timm.create_model(name).state_dict()
    torch.save(state, tmp_path / "whole.pth")
    build(name, backbone_weights=str(tmp_path / "whole.pth"))
    last = [key for key in state if "stages.3" in key or "layers.3" in key or "layer4" in key or "blocks.6" in key][-2]
    torch.save({key: value for key, value in state.items() if key != last}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=rf"cut\.pth lacks 1 of \d+ tensors of '{name}'.*complete checkpoint"):
        build(name, backbone_weights=str(tmp_path / "cut.pth"))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda key: f"backbone.{key}", "begin with 'backbone.'.*load_weights"),
        (lambda key: f"model.encoder.{key}", "begin with 'model.encoder.'"),
        (lambda key: key.upper(), "its own keys are CONV1.WEIGHT, BN1.WEIGHT"),
        (None, "lacks 100 of 100 tensors of 'resnet18', first conv1.weight, .*its own keys are none"),
    ],
    ids=["prefix", "long prefix", "other names", "empty"],
)
def test_a_file_of_another_network_is_refused_by_its_keys(rename, message, tmp_path):
    state = timm.create_model("resnet18").state_dict() if rename else {}
    torch.save({rename(key): value for key, value in state.items()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        build("resnet18", backbone_weights=str(tmp_path / "other.pth"))


def test_pretrained_batch_norms_stay_frozen(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    frozen = build("resnet18", backbone_weights=str(tmp_path / "weights.pth")).train()
    fresh = build("resnet18").train()
    for backbone, moves in ((frozen, False), (fresh, True)):
        norm = backbone.network.bn1
        before = norm.running_mean.clone()
        backbone(torch.randn(2, 3, 64, 64))
        assert norm.weight.requires_grad is moves
        assert torch.equal(norm.running_mean, before) is not moves


@pytest.mark.parametrize("batch_norm", ["frozen", "measured", "trained"])
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_frozen_stages_stay_as_they_are(name, batch_norm, tmp_path):
    """Whatever the features at strides 4 and 8 need, statistics included; the others learn as they would."""
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    common = dict(backbone_weights=str(tmp_path / "weights.pth"), batch_norm=batch_norm)
    whole, frozen = build(name, **common), build(name, **common, frozen_stages=2)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    images = torch.randn(2, 3, 64, 96)
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], lr=0.1)
    expected = [f.detach() for f in frozen.eval()(images)]
    sum(f.square().mean() for f in frozen.train()(images)).backward()
    optimizer.step()
    changed = {key for key, value in frozen.state_dict().items() if not torch.equal(value, before[key])}
    features = frozen.eval()(images)
    assert all(torch.equal(features[i], expected[i]) for i in (0, 1))
    assert not torch.equal(features[2], expected[2])
    learned = {key for key, p in frozen.named_parameters() if p.requires_grad}
    assert learned < {key for key, p in whole.named_parameters() if p.requires_grad}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert set() < {key for key in changed if not key.endswith(statistics)} <= learned
    measured = {key for key in changed if key.endswith("running_mean")}
    assert bool(measured) == (batch_norm != "frozen")


def test_only_pretrained_stages_can_be_frozen():
    with pytest.raises(ValueError, match="frozen_stages is 0 to 4, and 0 for a backbone from random weights, got 1"):
        build("resnet18", frozen_stages=1)
    with pytest.raises(ValueError, match="got 5"):
        build("resnet18", backbone_weights=True, frozen_stages=5)
