"""The switch between plain and fast operations."""

import contextvars

import pytest
import torch

from m2f_lab import build_model, ops, recipes
from m2f_lab.ops import is_plain, plain


def test_operations_are_public_functions():
    assert list(ops.OPERATIONS) == sorted(ops.OPERATIONS)
    for name in ops.OPERATIONS:
        assert callable(getattr(ops, name))
        assert name in ops.__all__
        assert "plain" in getattr(ops, name).__doc__.lower()


def test_plain_switches_all_inside_the_block_only():
    assert not is_plain()
    with plain():
        assert is_plain()
        assert all(is_plain(name) for name in ops.OPERATIONS)
    assert not any(is_plain(name) for name in ops.OPERATIONS)


def test_plain_of_one_operation_leaves_the_others():
    one, other, *_ = ops.OPERATIONS
    with plain(one):
        assert is_plain(one)
        assert not is_plain(other)
        assert not is_plain()
        with plain(other):
            assert is_plain(one)
            assert is_plain(other)
        assert not is_plain(other)


def test_plain_ends_with_an_error_inside():
    with pytest.raises(ZeroDivisionError), plain():
        raise ZeroDivisionError
    assert not is_plain()


def test_plain_stays_within_its_context():
    outside = contextvars.copy_context()
    with plain():
        assert not outside.run(is_plain)


def test_plain_of_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match=r"no operation 'sampling'\. Operations: add_branch, "), plain("sampling"):
        pass


def nodes_behind(tensors) -> set:
    """All nodes of the graph behind some tensors."""
    nodes, waiting = set(), [tensor.grad_fn for tensor in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return nodes


@pytest.mark.parametrize("backbone", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_plain_model_runs_on_ordinary_autograd(backbone):
    """No function with a gradient of its own; the same outputs and gradients as with all operations fast."""
    swin = dict(embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8))
    options = dict(backbone_options=swin, drop_path_rate=0.4) if backbone.startswith("swin") else {}
    torch.manual_seed(0)
    model = build_model(recipes.debug_tiny().vary(model=dict(backbone=backbone, **options)).model).train()
    model.double().requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name:  # at first points lie on the centres of cells, where a bilinear mean has a kink
            torch.nn.init.normal_(parameter)
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)

    def step():
        torch.manual_seed(1)
        output = model(images)
        results = [*output.class_logits, output.masks[-1].dense()]
        loss, parameters = sum(x.square().mean() for x in results), list(model.parameters())
        return results, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    fast, gradients = step()
    with plain():
        expected, expected_gradients = step()
    assert [n for n in nodes_behind(fast) if isinstance(n, torch.autograd.function.BackwardCFunction)]
    assert not [n for n in nodes_behind(expected) if isinstance(n, torch.autograd.function.BackwardCFunction)]
    torch.testing.assert_close(fast, expected)
    torch.testing.assert_close(gradients, expected_gradients)


SWIN = dict(
    backbone="swin_tiny_patch4_window7_224",
    backbone_options=dict(embed_dim=24, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2)),
    drop_path_rate=0.5,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, SWIN], ids=["convnext", "swin"])
def test_compiled_model_is_one_graph(training, options):
    """The switch cannot be traced; a compiled model runs the plain operations."""
    from m2f_lab.model import build_model
    from tests.toy_training import toy_recipe

    model = build_model(toy_recipe().vary(model=options).model).train(training)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)

    def forward(images):
        output = model(images)
        return output.class_logits[-1], output.masks[-1].embeddings, output.masks[-1].features

    explanation = torch._dynamo.explain(forward)(images)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0), explanation.break_reasons
    results = []
    with ops.plain():
        for run in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(0)
            values = run(images)
            model.zero_grad()
            if training:
                sum(value.square().mean() for value in values).backward()
            results.append((*values, *(parameter.grad for parameter in model.parameters() if training)))
    torch.compiler.reset()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
