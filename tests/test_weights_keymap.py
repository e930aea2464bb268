"""The tables of names: complete, in both directions, and right about the order of channels."""

import pytest
import torch
import torch.nn.functional as F

from m2f_lab.model import ModelConfig, build_model
from m2f_lab.weights import to_huggingface, to_official, to_sssegmentation
from m2f_lab.weights.huggingface import HUGGINGFACE
from m2f_lab.weights.keymap import KeyMap, Rule
from m2f_lab.weights.official import OFFICIAL
from m2f_lab.weights.sssegmentation import SSSEGMENTATION, UNFOLD

SMALL = dict(
    num_classes=5, hidden_dim=32, mask_dim=32, num_queries=6, num_heads=4, num_encoder_layers=2,
    encoder_feedforward_dim=40, num_decoder_layers=3, decoder_feedforward_dim=48, drop_path_rate=0.0,
)  # fmt: skip
CONFIGS = {
    "swin": ModelConfig(**SMALL, backbone_options=dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))),
    "bottleneck": ModelConfig(**SMALL, backbone="resnet26"),
    "basic": ModelConfig(**SMALL, backbone="resnet18"),
}


@pytest.fixture(scope="module")
def states():
    """Every tensor holds numbers of its own, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: {
            key: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + number
            for number, (key, tensor) in enumerate(build_model(config).state_dict().items())
        }
        for name, config in CONFIGS.items()
    }


ROUND_TRIPS = [
    (OFFICIAL, to_official, "swin"),
    (OFFICIAL, to_official, "bottleneck"),
    (OFFICIAL, to_official, "basic"),
    (HUGGINGFACE, to_huggingface, "swin"),
    (HUGGINGFACE, to_huggingface, "bottleneck"),
    (HUGGINGFACE, to_huggingface, "basic"),
    (SSSEGMENTATION, to_sssegmentation, "swin"),
]


@pytest.mark.parametrize(("format", "export", "name"), ROUND_TRIPS, ids=lambda x: getattr(x, "name", None))
def test_out_and_in_again_changes_nothing(states, format, export, name):
    state = states[name]
    exported = export(state)
    assert not set(exported) & set(state)
    assert format.recognises(exported)
    back = format.to_ours(exported)
    assert not back.unknown
    assert not back.incomplete
    assert not back.ignored
    assert set(back.tensors) == set(state)
    for key in state:
        assert torch.equal(back.tensors[key], state[key]), key


@pytest.mark.parametrize("format", [OFFICIAL, HUGGINGFACE, SSSEGMENTATION], ids=lambda format: format.name)
def test_every_line_of_the_tables_is_used(states, format):
    known = [states[name] for table, _, name in ROUND_TRIPS if table is format]
    unused = [rule.ours for rule in format.rules if not any(rule.our_regex[0].fullmatch(k) for s in known for k in s)]
    assert not unused


def test_official_names_of_a_resnet(states):
    """detectron2's names, written down by hand."""
    exported, state = to_official(states["bottleneck"]), states["bottleneck"]
    for theirs, ours in {
        "backbone.stem.conv1.weight": "backbone.network.conv1.weight",
        "backbone.stem.conv1.norm.running_var": "backbone.network.bn1.running_var",
        "backbone.res2.0.shortcut.weight": "backbone.network.layer1.0.downsample.0.weight",
        "backbone.res2.0.shortcut.norm.bias": "backbone.network.layer1.0.downsample.1.bias",
        "backbone.res5.1.conv3.weight": "backbone.network.layer4.1.conv3.weight",
        "backbone.res3.0.conv2.norm.weight": "backbone.network.layer2.0.bn2.weight",
    }.items():
        assert torch.equal(exported[theirs], state[ours]), theirs


def test_older_official_names(states):
    """The published model zoo says static_query; before that, pixel decoders had no prefix of their own."""
    exported = to_official(states["swin"])
    aged = {key.replace("query_feat", "static_query"): tensor for key, tensor in exported.items()}
    assert set(OFFICIAL.to_ours(aged).tensors) == set(states["swin"])
    older = {key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): tensor for key, tensor in aged.items()}
    assert set(OFFICIAL.to_ours(older).tensors) == set(states["swin"])


def test_query_key_and_value_are_joined_in_this_order(states):
    exported = to_huggingface(states["swin"])
    prefix = "model.pixel_level_module.encoder.encoder.layers.1.blocks.0.attention.self"
    joined = states["swin"]["backbone.network.layers.1.blocks.0.attn.qkv.bias"]
    assert torch.equal(exported[f"{prefix}.query.bias"], joined[:24])
    assert torch.equal(exported[f"{prefix}.key.bias"], joined[24:48])
    assert torch.equal(exported[f"{prefix}.value.bias"], joined[48:])
    del exported[f"{prefix}.key.bias"]
    translation = HUGGINGFACE.to_ours(exported)
    assert translation.incomplete == {"backbone.network.layers.1.blocks.0.attn.qkv.bias": [f"{prefix}.key.bias"]}


def test_patch_merging_order_against_torch_unfold():
    """MMSegmentation merges patches with unfold, the original by concatenating slices; both must give the same."""
    torch.manual_seed(0)
    x = torch.randn(1, 5, 6, 8)  # (B, C, H, W)
    theirs = torch.randn(10, 20)
    unfolded = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)  # (B, H/2 · W/2, 4 C)
    y = x.permute(0, 2, 3, 1)
    sliced = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], dim=3).flatten(1, 2)
    assert not torch.allclose(unfolded @ theirs.T, sliced @ theirs.T)
    torch.testing.assert_close(unfolded @ theirs.T, sliced @ UNFOLD.to_ours(theirs).T)
    assert torch.equal(UNFOLD.to_ours(unfolded), sliced)  # a vector, such as the norm's weight, goes the same way
    assert torch.equal(UNFOLD.to_theirs(UNFOLD.to_ours(theirs)), theirs)


def test_numbers_shift_and_several_names_join():
    table = KeyMap("test", "a.", (Rule("b.{i+1}.*", "a.{i}.*"), Rule("c.{i}", ("d.{i-1}.x", "d.{i-1}.y"))))
    state = {"b.3.norm.weight": torch.tensor([1.0]), "c.1": torch.tensor([2.0, 3.0])}
    exported = table.to_theirs(state)
    assert set(exported) == {"a.2.norm.weight", "d.0.x", "d.0.y"}
    back = table.to_ours(exported | {"else": torch.zeros(1)})
    assert back.unknown == ["else"]
    assert back.joined == ["c.1"]
    assert back.origins["c.1"] == ("d.0.x", "d.0.y")
    assert {key: tensor.tolist() for key, tensor in back.tensors.items()} == {"b.3.norm.weight": [1], "c.1": [2, 3]}


@pytest.mark.parametrize("export", [to_official, to_huggingface, to_sssegmentation])
def test_a_backbone_without_names_elsewhere_is_refused(export):
    state = {"backbone.network.stages_0.blocks.0.conv_dw.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"has no names for 1 of 1 tensors: backbone\.network\.stages_0.*save_weights"):
        export(state)
