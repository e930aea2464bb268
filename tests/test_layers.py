"""Attention and position embeddings against torch's own modules and the published formula."""

import math

import pytest
import torch
from torch import nn

from m2f_lab.model.layers import Attention, sine_positions
from m2f_lab.model.pixel_decoder import EncoderLayer, PixelDecoder
from m2f_lab.recipes import ModelConfig


@pytest.fixture
def pair():
    """Our attention and torch's, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4).double(), nn.MultiheadAttention(16, 4, batch_first=True).double()
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch(pair, masked):
    ours, theirs = pair
    query, key, value = (torch.randn(2, n, 16, dtype=torch.float64) for n in (5, 7, 7))
    blocked = None
    if masked:
        blocked = torch.rand(2, 5, 7) < 0.5
        blocked[..., 0] = False
    output, weights = ours(query, key, value, blocked, return_weights=True)
    copied = None if blocked is None else blocked.repeat_interleave(4, dim=0)
    expected, expected_weights = theirs(query, key, value, attn_mask=copied, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.double(), expected_weights, atol=1e-6, rtol=1e-6)
    if masked:
        assert (weights.masked_select(blocked.unsqueeze(1).expand_as(weights)) == 0).all()


def test_attention_weights_are_built_on_request_only(pair):
    query = torch.randn(1, 3, 16, dtype=torch.float64)
    output, weights = pair[0](query, query, query)
    assert weights is None
    torch.testing.assert_close(output, pair[0](query, query, query, return_weights=True)[0])


def test_sine_positions_equal_the_formula():
    height, width, dim = 3, 5, 16
    embeddings = sine_positions((height, width), dim, torch.device("cpu")).view(height, width, dim)
    y, x = 2, 1
    for half, coordinate, length in ((0, y, height), (dim // 2, x, width)):
        angle = (coordinate + 1) / (length + 1e-6) * 2 * math.pi
        for i in range(dim // 4):
            frequency = 10000 ** (2 * i / (dim // 2))
            assert embeddings[y, x, half + 2 * i].item() == pytest.approx(math.sin(angle / frequency), abs=1e-5)
            assert embeddings[y, x, half + 2 * i + 1].item() == pytest.approx(math.cos(angle / frequency), abs=1e-5)


def kept_by(function):
    """All that autograd keeps, once for each piece of memory."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return result, list(kept.values())


DECODER = ModelConfig(num_classes=3, hidden_dim=64, mask_dim=64, encoder_feedforward_dim=112, num_encoder_layers=1)


def test_encoder_layer_keeps_no_hidden_features():
    torch.manual_seed(0)
    layer, features = EncoderLayer(DECODER), torch.randn(1, 21, 64, requires_grad=True)
    (output, *_), kept = kept_by(
        lambda: layer(features, torch.randn(21, 64), torch.rand(21, 2), [(1, 1), (2, 2), (4, 4)])
    )
    assert not [t.shape for t in kept if t.shape[-1] == 112 and t.shape[0] != 64]
    output.sum().backward()
    assert all(p.grad is not None for p in layer.feedforward.parameters())


def test_pixel_decoder_keeps_one_map_at_stride_4():
    """The input of the last norm; nothing before or behind it."""
    torch.manual_seed(0)
    decoder = PixelDecoder([8, 8, 8, 8], DECODER)
    pyramid = [torch.randn(1, 8, 32 // s, 32 // s, requires_grad=True) for s in (1, 2, 4, 8)]
    (features, _), kept = kept_by(lambda: decoder(pyramid))
    assert len([t for t in kept if t.shape == (1, 64, 32, 32)]) == 1
    features.sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())
