"""The emulated device: what a GPU does, counts known by hand, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.emulated_cuda import EmulatedTensor, Kind, Log, emulated_cuda, launches_for_lists, why_not_emulated
from m2f_lab import ops
from m2f_lab.training.planning import probe
from tests.test_emulated_device import small_recipe

pytestmark = pytest.mark.skipif(bool(why_not_emulated()), reason=why_not_emulated() or "")


@pytest.fixture
def log() -> Iterator[Log]:
    with emulated_cuda() as log:
        yield log


def names(log: Log, kind: Kind = Kind.LAUNCH) -> list[str]:
    return [event.name for event in log.events if event.kind is kind]


# ------------------------------------------------------------------------------------------------------------- a device


def test_a_tensor_says_that_it_is_on_the_device(log: Log) -> None:
    for x in (torch.zeros(2, device="cuda"), torch.tensor([1, 2], device="cuda"), torch.ones(2).cuda(), ones().to(0)):
        assert isinstance(x, EmulatedTensor)
        assert x.is_cuda
        assert x.device == (x + 1)[:1].device == torch.device("cuda", 0)
        assert x.cpu().device.type == "cpu"


def ones() -> torch.Tensor:
    return torch.ones(2)


def test_devices_do_not_mix(log: Log) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    for mix in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: here[None] @ there,
        lambda: torch.where(there > 0, there, here),
        lambda: torch.ones(()).add_(there[0]),
        lambda: F.linear(there[None], here[None]),
        lambda: there.index_put_((torch.zeros(1, dtype=torch.long, device="cuda"),), here[:1]),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            mix()
    assert (there + torch.ones(())).is_cuda  # a number on the CPU is welcome
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()


def test_autocast_is_that_of_a_gpu(log: Log) -> None:
    x, w = torch.ones(4, 4, device="cuda"), torch.ones(4, 4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        product = x @ w
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
        assert F.layer_norm(product, (4,)).dtype == torch.float32  # not on a CPU
        assert product.sum().dtype == torch.float32
        assert F.scaled_dot_product_attention(*3 * [x[None, None]]).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ w).dtype == torch.float32


def test_a_parameter_that_moves_stays_the_same_object(log: Log) -> None:
    module = nn.Linear(2, 2)
    weight = module.weight
    assert module.to("cuda").weight is weight
    assert weight.is_cuda
    assert isinstance(weight, nn.Parameter)


def test_a_training_step_gives_what_the_cpu_gives() -> None:
    """In float32, with grid_sample, as Triton kernels do not run: the loss and the norm of two steps."""
    recipe = small_recipe(precision="float32").vary(model=dict(drop_path_rate=0.0))

    def rows(device: torch.device) -> list[dict]:
        torch.manual_seed(0)
        learner, batch = probe.learner_for(recipe, device), probe.noise(recipe)
        with ops.plain():
            return [learner.step(batch, iteration) for iteration in range(2)]

    expected = rows(torch.device("cpu"))
    with emulated_cuda():
        found = rows(torch.device("cuda", 0))
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_attention_is_that_of_the_cpu(log: Log) -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    mask = torch.rand(2, 1, 7, 7) > 0.5
    mask[..., 0] = True
    here = [x.clone().requires_grad_() for x in (q, k, v)]
    there = [x.cuda().requires_grad_() for x in (q, k, v)]
    outputs = [F.scaled_dot_product_attention(*here, mask), F.scaled_dot_product_attention(*there, mask.cuda())]
    for output in outputs:
        output.square().sum().backward()
    for a, b in zip([outputs[0], *(x.grad for x in here)], [outputs[1], *(x.grad for x in there)], strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- counting


def test_views_and_empty_tensors_are_free(log: Log) -> None:
    x = torch.zeros(4, 6, device="cuda")
    log.clear()
    x.view(6, 4).transpose(0, 1)[1:].unsqueeze(0).expand(3, -1, -1).detach()
    torch.empty(3, device="cuda")
    torch.zeros(0, device="cuda").add_(1)
    assert log.events == []
    x.reshape(24), x.t().reshape(24)  # the second one copies
    assert names(log) == ["clone"]


def test_launches_of_a_linear_map_by_hand(log: Log) -> None:
    module = nn.Linear(3, 5).to("cuda")
    x = torch.ones(2, 3, device="cuda", requires_grad=True)
    log.clear()
    output = module(x)
    assert names(log) == ["addmm"]
    output.backward(torch.ones_like(output))
    assert sorted(names(log)) == ["addmm", "mm", "mm", "ones_like", "sum"]
    module(x).backward(torch.ones_like(output))
    assert names(log).count("add") + names(log).count("add_") == 3  # gradients are accumulated: of x, weight and bias


def test_synchronisations_and_copies_by_hand(log: Log) -> None:
    x = torch.arange(4.0).cuda()
    index = torch.tensor([0, 2])
    for work, syncs, copies in (
        (lambda: x.sum().item(), 1, 1),
        (lambda: x.tolist(), 1, 1),
        (lambda: bool(x[0] > 0), 1, 1),
        (lambda: x.to("cpu", non_blocking=True), 0, 1),
        (lambda: x.nonzero(), 1, 0),
        (lambda: x[x > 1], 1, 0),
        (lambda: x[index], 1, 1),
        (lambda: x[index.cuda()], 1, 1),
        (lambda: x[index.pin_memory().to("cuda", non_blocking=True)], 0, 1),
        (lambda: x[0].add_(index[0]), 0, 0),
        (lambda: torch.zeros(4).copy_(x), 1, 1),
        (lambda: torch.zeros(4).pin_memory().copy_(x, non_blocking=True), 0, 1),
        (lambda: x.copy_(torch.zeros(4)), 1, 1),
        (lambda: torch.tensor([1.0, 2.0], device="cuda"), 1, 1),
        (lambda: torch.cuda.synchronize(), 1, 0),
        (lambda: torch.cuda.Event().synchronize(), 1, 0),
        (lambda: torch.repeat_interleave(x, torch.ones_like(x).long(), output_size=4), 0, 0),
        (lambda: torch.repeat_interleave(x, torch.ones_like(x).long()), 1, 0),
    ):
        log.clear()
        work()
        assert (log.count(Kind.SYNC), log.count(Kind.COPY)) == (syncs, copies), log.events


@pytest.mark.parametrize(
    ("sizes", "num_lists", "launches"),
    [
        ([10] * 36, 4, 1),
        ([10] * 37, 4, 2),
        ([10] * 110 + [0] * 5, 1, 1),
        ([320 * 65536], 4, 1),
        ([320 * 65536 + 1], 4, 2),
        ([65536 * 200, 65536 * 200], 4, 2),
        ([], 4, 0),
    ],
)
def test_launches_for_lists(sizes: list[int], num_lists: int, launches: int) -> None:
    assert launches_for_lists(sizes, num_lists) == launches


def test_an_optimiser_step_takes_few_launches(log: Log) -> None:
    """80 tensors: AdamW works on four lists, 36 tensors at once, clipping on one, 110 at once."""
    parameters = [nn.Parameter(torch.ones(3, device="cuda")) for _ in range(80)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    log.clear()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    counts = dict(log.top(Kind.LAUNCH, lambda event: event.name))
    assert {name: counts[name] for name in counts if name.startswith("_f")} == {
        "_fused_adamw_": 3, "_foreach_norm": 1, "_foreach_mul_": 1, "_foreach_add_": 1,
    }  # fmt: skip
    assert log.count(Kind.SYNC) == 0


def test_backward_belongs_to_the_line_and_the_phase_of_its_forward(log: Log) -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    log.phase = "first"
    y = x.exp()
    line = int(log.events[-1].callers[0].rpartition(":")[2])
    log.phase = "second"
    z = y * 2
    log.phase = "backward"
    log.clear()
    z.sum().backward()
    assert [(e.name, e.phase) for e in log.events if e.phase != "backward"] == [("mul", "second"), ("mul", "first")]
    assert log.events[-1].callers[0] == f"tests/test_emulated_cuda.py:{line}"


def test_nothing_is_left_behind() -> None:
    before = torch.cuda.is_available(), F.scaled_dot_product_attention, torch.Tensor.pin_memory
    with emulated_cuda() as log:
        assert torch.cuda.is_available()
        x = torch.ones(2, device="cuda")
        with pytest.raises(RuntimeError, match="There is a GPU"), emulated_cuda():
            pass
    assert before == (torch.cuda.is_available(), F.scaled_dot_product_attention, torch.Tensor.pin_memory)
    assert not torch.accelerator.is_available()
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device="cuda")
    assert log.count(Kind.LAUNCH) == 1
