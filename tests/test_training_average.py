"""The exponential moving average of the weights: its formula, and that it is what is measured and kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from m2f_lab import evaluate
from m2f_lab.training import Run, train
from m2f_lab.training.average import WeightAverage
from m2f_lab.weights import load_model
from tests.toy_training import StopAt, all_tensors, assert_same_run, assert_same_tensors, timeless, toy_recipe

AVERAGED = toy_recipe(ema_decay=0.8)


def test_the_average_follows_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4))
    average = WeightAverage(model, decay=0.3)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decays = [2 / 11, 3 / 12, 0.3, 0.3]  # (1 + n) / (10 + n) at first
    for step, decay in enumerate(decays, start=1):
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update(step)
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    got = average.model.state_dict()
    for name, _ in model.named_parameters():
        torch.testing.assert_close(got[name], expected[name])
    for name, buffer in model.named_buffers():
        assert torch.equal(got[name], buffer), "statistics are averages already"
    assert got["1.num_batches_tracked"] == 4
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


@pytest.fixture(scope="module")
def averaged(root, tmp_path_factory) -> Run:
    return train(AVERAGED, root, tmp_path_factory.mktemp("runs") / "averaged")


def test_the_average_changes_no_step(whole, averaged):
    assert timeless(averaged.steps) == timeless(whole.steps)
    there, here = (all_tensors(run.checkpoint("last")) for run in (whole, averaged))
    assert_same_tensors({name: here[name] for name in there}, there)
    assert {name for name in here if name not in there} == {f"average/{n}" for n in there if n.startswith("model.")}


def test_the_average_is_measured_kept_and_opened(root, whole, averaged):
    """`model` gives it, and its figures are those of the evaluation."""
    raw, average = load_model(averaged.checkpoint("last")), averaged.model("last")
    assert any(not torch.equal(a, b) for a, b in zip(raw.parameters(), average.parameters(), strict=True))
    assert evaluate(average, AVERAGED, root)["mIoU"] == pytest.approx(averaged.last["mIoU"], abs=1e-9)
    assert evaluate(raw, AVERAGED, root)["mIoU"] == pytest.approx(whole.last["mIoU"], abs=1e-9)
    best = averaged.model("best")
    assert evaluate(best, AVERAGED, root)["mIoU"] == pytest.approx(averaged.best["mIoU"], abs=1e-9)
    if averaged.best["iteration"] == averaged.last["iteration"]:
        assert_same_tensors(best.state_dict(), average.state_dict())


def test_a_killed_run_continues_with_the_same_average(root, averaged, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        train(AVERAGED, root, tmp_path / "run", callbacks=[StopAt(5, RuntimeError("power cut"))])
    assert_same_run(train(AVERAGED, root, tmp_path / "run"), averaged)


def test_a_run_without_an_average_is_not_continued_with_one(root, whole):
    with pytest.raises(ValueError, match=r"optimization\.ema_decay: None there, 0\.8 here"):
        train(AVERAGED, root, whole.path)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5])
def test_a_decay_is_a_share(decay):
    with pytest.raises(ValueError, match="ema_decay is a share"):
        toy_recipe(ema_decay=decay)
