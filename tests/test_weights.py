"""Loading, strictly and with a report; saving, atomically; and the error messages in between."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f_lab.data import Classes
from m2f_lab.model import ModelConfig, build_model
from m2f_lab.model.eomt import build_eomt
from m2f_lab.networks import settled
from m2f_lab.structures import MaskLogits
from m2f_lab.weights import eomt_to_huggingface, load_model, load_weights, save_weights, to_huggingface, to_official

GOLDEN = Path(__file__).parent / "golden"
SWIN = dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
OFFICIAL_CONFIG = ModelConfig(
    num_classes=7, backbone_options=SWIN, hidden_dim=64, mask_dim=64, num_queries=20, num_encoder_layers=2,
    num_decoder_layers=4, decoder_feedforward_dim=128,
)  # fmt: skip
TINY = ModelConfig(
    num_classes=3, backbone="resnet18", hidden_dim=32, mask_dim=32, num_queries=4, num_heads=4, num_encoder_layers=1,
    encoder_feedforward_dim=32, num_decoder_layers=1, decoder_feedforward_dim=32, drop_path_rate=0.0,
)  # fmt: skip


def golden_weights(golden):
    return {name.removeprefix("weights."): tensor for name, tensor in golden.items() if name.startswith("weights.")}


def assert_agrees(ours, reference):
    """To 1e-4 relative to the largest value of the reference."""
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() / reference.abs().max() < 1e-4


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def official():
    return load_file(GOLDEN / "official_swin.safetensors")


@pytest.fixture(scope="module")
def sssegmentation():
    return load_file(GOLDEN / "sssegmentation_swin.safetensors")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(1)  # tests start from seed 0: their fresh models have other weights, and loading shows
    return build_model(TINY).eval()


# -- weights of others compute what they computed there --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pkl", "pth", "safetensors"])
@torch.no_grad()
def test_official_checkpoint(official, tmp_path, kind):
    weights = golden_weights(official)
    path = tmp_path / f"model_final.{kind}"
    if kind == "pkl":  # as in the model zoo
        weights["sem_seg_head.predictor.static_query.weight"] = weights.pop("sem_seg_head.predictor.query_feat.weight")
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    elif kind == "pth":
        torch.save({"model": weights, "optimizer": {"state": {}}, "iteration": 3}, path)
    else:
        save_file(weights, path)
    model = build_model(OFFICIAL_CONFIG).eval()
    report = load_weights(model, path)

    assert report.format == "official Mask2Former"
    assert report.num_tensors == len(model.state_dict())
    assert report.inside == ("" if kind == "safetensors" else "model")
    assert not report.converted
    assert not report.kept
    assert sorted(name for names in report.ignored.values() for name in names) == sorted(
        name for name in weights if name.endswith("relative_position_index") or name == "criterion.empty_weight"
    )
    image = official["image.0"].unsqueeze(0)
    output = model(image)
    assert output.padded_size == tuple(official["padded_input"].shape[2:])
    for i in range(5):
        assert_agrees(output.class_logits[i][0], official[f"decoder.{i}.class_logits"][0])
        assert_agrees(output.masks[i].dense()[0], official[f"decoder.{i}.mask_logits"][0])


@torch.no_grad()
def test_sssegmentation_checkpoint(sssegmentation, tmp_path):
    torch.save({"model": golden_weights(sssegmentation), "cur_epoch": 130}, tmp_path / "checkpoints-epoch-130.pth")
    model = build_model(
        replace(OFFICIAL_CONFIG, num_classes=19, encoder_feedforward_dim=128, decoder_feedforward_dim=128)
    ).eval()
    report = load_weights(model, tmp_path / "checkpoints-epoch-130.pth")
    assert report.format == "SSSegmentation"
    (reordered,) = report.converted.values()
    assert len(reordered) == 9
    assert all("downsample" in name for name in reordered)

    pyramid = model.backbone(sssegmentation["input"])
    for i, features in enumerate(pyramid):
        assert_agrees(features, sssegmentation[f"backbone.{i}"])
    mask_features, levels = model.pixel_decoder(pyramid)
    last = model.transformer_decoder(model.transformer_decoder.prepare(levels, mask_features))[-1]
    probabilities = last.class_logits.softmax(2)[..., :-1]  # (B, Q, K)
    masks = (
        MaskLogits(last.embeddings, mask_features).resized(sssegmentation["input"].shape[2:]).sigmoid()
    )  # (B, Q, H, W)
    assert_agrees(torch.einsum("bqk,bqhw->bkhw", probabilities, masks), sssegmentation["semantic"])


def test_the_report_is_readable(sssegmentation, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": golden_weights(sssegmentation)}, path)
    config = replace(OFFICIAL_CONFIG, num_classes=19, encoder_feedforward_dim=128, decoder_feedforward_dim=128)
    report = str(load_weights(build_model(config), path))
    assert report.splitlines()[0] == f"Loaded 263 tensors (0.69 M values) from {path}"
    assert "SSSegmentation, found under model" in report
    assert "converted  9 × patch merging" in report
    assert "ignored    1 × class weights of the loss, no part of the model: criterion.empty_weight" in report
    assert max(map(len, report.splitlines())) < 300


def test_frozen_batch_norms_have_no_counters(tiny, tmp_path):
    """detectron2 freezes them and saves four tensors of five; the counter stays the model's."""
    weights = {k: v for k, v in to_official(tiny.state_dict()).items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "a.pth")
    model = build_model(TINY)
    report = load_weights(model, tmp_path / "a.pth")
    assert_same(model, tiny)
    assert sorted(name for names in report.kept.values() for name in names) == sorted(
        name for name in tiny.state_dict() if name.endswith("num_batches_tracked")
    )


def test_half_precision_is_reported(tiny, tmp_path):
    save_file({name: tensor.half() for name, tensor in tiny.state_dict().items()}, tmp_path / "a.safetensors")
    report = load_weights(build_model(TINY), tmp_path / "a.safetensors")
    assert "from torch.float16 to torch.float32" in str(report)


@pytest.mark.parametrize("backbone", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_eomt_checkpoint(tmp_path, backbone):
    sizes = dict(embed_dim=32, depth=2, num_heads=4)
    config = ModelConfig(
        num_classes=3, backbone=backbone, backbone_options=sizes, num_queries=4, num_decoder_layers=1,
        drop_path_rate=0.0,
    )  # fmt: skip
    model, other = build_eomt(config), build_eomt(config)
    save_file(eomt_to_huggingface(model.state_dict()), tmp_path / "model.safetensors")
    assert load_weights(other, tmp_path).format.startswith("Hugging Face EoMT")
    assert_same(other, model)
    save_weights(model, tmp_path)
    assert_same(load_model(tmp_path, build=build_eomt), model)
    with pytest.raises(ValueError, match="was trained on 3 classes, the model has 5"):
        load_weights(build_eomt(replace(config, num_classes=5)), tmp_path)


# -- our own format ----------------------------------------------------------------------------------------------


def test_save_and_load_model(tmp_path, tiny):
    tiny.classes = Classes(("wall", "floor", "lamp"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)), frozenset({2}))
    folder = save_weights(tiny, tmp_path / "runs" / "best")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    model = load_model(folder)
    assert_same(model, tiny)
    assert not model.training
    assert model.config == settled(tiny.config)
    assert model.classes == tiny.classes
    images = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(images).class_logits[-1], tiny(images).class_logits[-1])
    tiny.classes = None


@pytest.mark.parametrize("part", ["", "model.safetensors"])
def test_own_weights_into_a_model(tmp_path, tiny, part):
    save_weights(tiny, tmp_path)
    model = build_model(TINY)
    report = load_weights(model, tmp_path / part)
    assert_same(model, tiny)
    assert report.format == "m2f_lab"
    assert (report.converted, report.ignored, report.kept) == ({}, {}, {})
    bare = tmp_path / "renamed.bin"
    (tmp_path / "model.safetensors").rename(bare)
    load_weights(model, bare)


def test_the_home_folder(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_weights(tiny, "~/model") == tmp_path / "model"
    assert_same(load_model("~/model"), tiny)


def test_the_backbone_of_a_saved_model_is_not_downloaded_again(tmp_path, tiny):
    save_weights(tiny, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["model"]["backbone_weights"] = "/nowhere/resnet18.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_same(load_model(tmp_path), tiny)


@pytest.mark.parametrize("moment", [0, 1])
def test_overwriting_is_atomic(tmp_path, tiny, monkeypatch, moment):
    """If the disk fills up while saving, whichever file it is at, the old checkpoint is still there and whole."""
    save_weights(tiny, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = build_model(TINY)
    flushed = []

    def fills_up(number):
        flushed.append(number)
        if len(flushed) > moment:
            raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        with pytest.raises(OSError, match="No space left"):
            save_weights(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_weights(other, tmp_path)
    assert_same(load_model(tmp_path), other)


def test_load_model_needs_our_config(tmp_path, tiny):
    save_file(to_huggingface(tiny.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mask2former"}')
    with pytest.raises(ValueError, match=r"no config\.json written by save_weights.*load_weights\(model, path\)"):
        load_model(tmp_path)


# -- what does not fit is named, and the model stays as it was --------------------------------------------------------


@pytest.fixture
def refused(tiny, tmp_path):
    """Asserts that a state dict is refused with these words, by a model that does not change."""

    def check(state, *messages, model=None, config=None):
        model = tiny if model is None else model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError) as error:
            load_weights(model, tmp_path)
        for message in messages:
            assert message in str(error.value), str(error.value)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    return check


def changed(model):
    """Other numbers under the same names: if any were loaded, the model would change."""
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


def test_another_number_of_classes(tiny, refused, tmp_path):
    other = build_model(replace(TINY, num_classes=150))
    refused(
        changed(other), "was trained on 150 classes, the model has 3", "ModelConfig(num_classes=150)",
        "load_weights(model, path, reset_classifier=True)",
    )  # fmt: skip
    refused(to_huggingface(changed(other)), "was trained on 150 classes, the model has 3")

    save_file(changed(other), tmp_path / "model.safetensors")
    model = build_model(TINY)
    head = model.transformer_decoder.class_head.weight.clone()
    report = load_weights(model, tmp_path, reset_classifier=True)
    assert torch.equal(model.transformer_decoder.class_head.weight, head)
    for name, tensor in changed(other).items():
        if "class_head" not in name:
            assert torch.equal(model.state_dict()[name], tensor), name
    text = str(report)
    assert "kept       2 × the model's own class head, because of reset_classifier=True" in text
    assert "ignored    2 × its class head, because of reset_classifier=True" in text


def test_missing_and_unexpected_keys(tiny, refused):
    state = to_official(changed(tiny))
    del state["sem_seg_head.predictor.decoder_norm.weight"]
    state["sem_seg_head.predictor.extra.weight"] = torch.zeros(1)
    state["backbone.res9.0.conv1.weight"] = torch.zeros(1)
    refused(
        state, "official Mask2Former", "missing in the file: transformer_decoder.decoder_norm.weight\n",
        "2 keys of the file have no place in the model: ", "sem_seg_head.predictor.extra.weight", "backbone.res9.0",
    )  # fmt: skip


def test_a_part_of_a_joined_tensor_is_missing(tiny, refused):
    state = to_huggingface(changed(tiny))
    missing = "model.transformer_module.decoder.layers.0.self_attn.k_proj.weight"
    del state[missing]
    refused(state, f"transformer_decoder.layers.0.self_attention.in_proj_weight (the file lacks {missing})")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (dict(num_queries=9), ["query_features is [4, 32] in the model and [9, 32]", "num_queries=9 (now 4)"]),
        (dict(num_decoder_layers=2), ["no place in the model", "num_decoder_layers=2 (now 1)"]),
        (dict(num_encoder_layers=2, mask_dim=64), ["num_encoder_layers=2 (now 1)", "mask_dim=64 (now 32)"]),
        (
            dict(backbone="resnet26"),
            ["ResNet with 2, 2, 2, 2 bottleneck blocks, the model's is a ResNet with 2, 2, 2, 2 basic blocks"],
        ),
        (
            dict(backbone="swin_tiny_patch4_window7_224", backbone_options=SWIN),
            ["a Swin with embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8) and windows of 7"],
        ),
        (dict(backbone="convnext_atto"), ["a network of another family", "choose the file's with ModelConfig(ba"]),
    ],
)  # fmt: skip
def test_another_architecture(refused, change, messages):
    refused(changed(build_model(replace(TINY, **change))), "does not fit the model", *messages)


def test_choices_that_shapes_do_not_show(tiny, refused, tmp_path):
    """Four heads of 8 channels have the weights of eight heads of 4; Hugging Face and we note how many there were."""
    save_weights(build_model(replace(TINY, num_heads=8, num_sampling_points=2)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    refused(changed(tiny), "num_heads = 8 (the model has 4)", "num_sampling_points = 2", config=config)
    theirs = {"num_attention_heads": 8, "pre_norm": True, "backbone_config": {"model_type": "resnet"}}
    theirs["backbone_config"]["downsample_in_bottleneck"] = True
    refused(
        to_huggingface(changed(tiny)), "num_attention_heads = 8 (the model has 4)", "pre_norm = True",
        "backbone_config.downsample_in_bottleneck = True (the model has False)", config=theirs,
    )  # fmt: skip


def test_another_normalisation_of_images(tiny, refused, tmp_path):
    state = to_official(changed(tiny))
    state["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)  # blue first
    state["pixel_std"] = torch.ones(3, 1, 1)
    refused(
        state,
        "expects RGB images normalised with mean [103.53, 116.28, 123.675]",
        "Set model.pixel_mean and model.pixel_std",
    )
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    refused(to_huggingface(changed(tiny)), "expects RGB images normalised with mean [127.5, 127.5, 127.5]")
    ours = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours))
    load_weights(build_model(TINY), tmp_path)


def test_unknown_keys(refused):
    refused({"encoder.weight": torch.zeros(1)}, "of no known format", "encoder.weight", "Known are m2f_lab, official")
    backbone = {"layer1.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}
    refused(backbone, "looks like a backbone alone", "ModelConfig(backbone_weights=…)")


# -- outer prefixes, averages, and rows of the class head ------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "net.segmenter."])
def test_an_outer_prefix_is_seen_through(tiny, official, tmp_path, prefix):
    """Lightning's modules call the model what they like."""
    torch.save(
        {"state_dict": {f"{prefix}{n}": t for n, t in tiny.state_dict().items()}, "epoch": 3}, tmp_path / "a.pth"
    )
    fresh = build_model(TINY)
    report = load_weights(fresh, tmp_path / "a.pth")
    assert_same(fresh, tiny)
    assert report.inside.startswith("state_dict → ")
    torch.save({f"{prefix}{n}": t for n, t in golden_weights(official).items()}, tmp_path / "b.pth")
    assert load_weights(build_model(OFFICIAL_CONFIG), tmp_path / "b.pth").format == "official Mask2Former"


def test_the_report_names_an_average_that_was_not_taken(tiny, tmp_path):
    averaged = {n: t + 1 if t.is_floating_point() else t for n, t in tiny.state_dict().items()}
    torch.save({"model": tiny.state_dict(), "model_ema": averaged}, tmp_path / "a.pth")
    fresh = build_model(TINY)
    assert 'model_ema; load_weights(…, entry="model_ema") takes it' in str(load_weights(fresh, tmp_path / "a.pth"))
    assert_same(fresh, tiny)
    load_weights(fresh, tmp_path / "a.pth", entry="model_ema")
    assert torch.equal(fresh.state_dict()["pixel_decoder.mask_projection.weight"],
                       averaged["pixel_decoder.mask_projection.weight"])  # fmt: skip


def named(*names: str) -> Classes:
    return Classes(names, ((0, 0, 0),) * len(names))


def test_rows_of_classes_that_both_know_are_kept(tmp_path):
    old, new = build_model(replace(TINY, num_classes=4)), build_model(replace(TINY, num_classes=3))
    old.classes, new.classes = named("sky", "road", "car", "tree"), named("tree", "boat", "sky")
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    report = load_weights(new, save_weights(old, tmp_path / "old"), reset_classifier=True, keep_classes=True)
    assert "2 classes and no object, by name" in str(report)
    for part in ("weight", "bias"):
        name = f"transformer_decoder.class_head.{part}"
        ours, theirs = new.state_dict()[name], old.state_dict()[name]
        assert torch.equal(ours[[0, 2, -1]], theirs[[3, 0, -1]])
        assert torch.equal(ours[1], before[name][1]), "nobody has seen a boat"
    others = [name for name in before if "class_head" not in name]
    assert all(torch.equal(new.state_dict()[name], old.state_dict()[name]) for name in others)


def test_classes_are_kept_by_name_or_not_at_all(tiny, tmp_path):
    model = build_model(replace(TINY, num_classes=2))
    folder = save_weights(tiny, tmp_path / "nameless")
    with pytest.raises(ValueError, match=r"the model has no classes; set model\.classes"):
        load_weights(model, folder, reset_classifier=True, keep_classes=True)
    model.classes = named("a", "b")
    with pytest.raises(ValueError, match="nameless names no classes"):
        load_weights(model, folder, reset_classifier=True, keep_classes=True)
    with pytest.raises(ValueError, match="pass both"):
        load_weights(model, folder, keep_classes=True)
