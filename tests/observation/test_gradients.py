"""Gradients of groups of samples."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from oracles import batches
from recorder import Recorder, expected_gradients, recorded, weights_of
from torch import nn
from torch.nn import functional as F

from fishleg_ext.observation.gradients import gradient_bytes
from fishleg_ext.observation.observe import observe


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("batch", [1, 5, 21])
def test_gradients_are_those_of_autograd_in_eval_mode(net, samples, group, batch):
    recorder = Recorder()
    count = 21 // group
    used = observe(
        net,
        batches(*samples, batch),
        F.cross_entropy,
        recorder,
        weights_of(net),
        num_grads=count,
        grad_batch_size=group,
    )
    assert used == count == sum(o.count for o in recorder.seen)
    for name, want in expected_gradients(net, *samples, group).items():
        torch.testing.assert_close(recorder.gradients(name), want, rtol=1e-4, atol=1e-6)


class Autocast(nn.Sequential):
    """Computes its products in bfloat16."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@pytest.mark.filterwarnings("error")  # no gradients one by one
def test_gradients_under_autocast_in_the_model(net, samples):
    recorder = recorded(Autocast(*net), [samples], num_grads=21)
    for name, want in expected_gradients(Autocast(*net), *samples, 1).items():
        found = recorder.gradients(name)
        assert found.dtype == torch.float32
        assert (found - want).norm() < 0.02 * want.norm(), name


class WithMean(nn.Module):
    """Outputs that depend on the other samples of a batch."""

    def forward(self, x):
        return x + x.mean(0)


def test_memory_is_bounded_by_chunk_bytes(net, samples):
    """In factors for the gradients of the largest weight; by vmap for copies of all."""
    largest = 4 * max(weight.numel() for weight in weights_of(net).values())
    recorder = recorded(net, batches(*samples), num_grads=21, chunk_bytes=3 * largest)
    assert {o.count for o in recorder.seen} == {3}
    per_gradient = gradient_bytes(weights_of(net).values())
    mixing = nn.Sequential(net, WithMean())
    weights = {f"0.{name}": weight for name, weight in weights_of(net).items()}
    recorder = Recorder()
    observe(mixing, [samples], F.cross_entropy, recorder, weights, num_grads=21, chunk_bytes=7 * per_gradient)
    assert {o.count for o in recorder.seen} == {7}
    recorder = recorded(net, batches(*samples), num_grads=4, chunk_bytes=1)
    assert [o.count for o in recorder.seen] == [1] * 4


def test_masked_gradients_are_zero(net, samples):
    mask = torch.rand(3, 64) < 0.5
    plain, masked = Recorder(), Recorder()
    for recorder, masks in ((plain, {}), (masked, {"5.weight": mask})):
        observe(
            net,
            batches(*samples),
            F.cross_entropy,
            recorder,
            weights_of(net),
            num_grads=21,
            masks=masks,
        )
    torch.testing.assert_close(masked.gradients("5.weight"), plain.gradients("5.weight") * mask)
    assert not any(o.gradient_factors["5.weight"].whole for o in masked.seen)
    assert torch.equal(masked.gradients("0.weight"), plain.gradients("0.weight"))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, a, b):
        return self.fc(a + b)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_tuple_inputs_are_positional_and_dicts_keywords(kind, generator):
    a, b = torch.randn(2, 6, 3, generator=generator)
    y = torch.randint(0, 2, (6,), generator=generator)
    inputs = (a, b) if kind is tuple else {"b": b, "a": a}
    model, recorder = TwoInputs(), Recorder()
    observe(model, [(inputs, y)], F.cross_entropy, recorder, {"fc.weight": model.fc.weight}, num_grads=6)
    plain = Recorder()
    observe(model.fc, [(a + b, y)], F.cross_entropy, plain, {"weight": model.fc.weight}, num_grads=6)
    torch.testing.assert_close(recorder.gradients("fc.weight"), plain.gradients("weight"))


class Branching(nn.Module):
    """Control flow that depends on data, which vmap cannot run."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x) if bool(x.sum() > 0) else self.fc(-x)


def test_models_that_vmap_cannot_run_are_looped_over_with_a_warning(generator):
    model, recorder = Branching(), Recorder()
    x, y = torch.randn(6, 3, generator=generator), torch.randint(0, 2, (6,), generator=generator)
    with pytest.warns(UserWarning, match="vmap cannot run this model"):
        observe(model, [(x, y)], F.cross_entropy, recorder, {"fc.weight": model.fc.weight}, num_grads=6)
    for i in range(6):
        want = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model.fc.weight)[0]
        torch.testing.assert_close(recorder.gradients("fc.weight")[i], want)


def test_bad_gradients_are_named(net, samples):
    x, y = samples
    x = x.clone()
    x[3] = torch.nan
    with pytest.raises(ValueError, match=r"gradients of 0.weight, 5.weight contain NaN or inf"):
        observe(net, [(x, y)], F.cross_entropy, Recorder(), weights_of(net), num_grads=21)


class Legacy(torch.autograd.Function):
    """An autograd function of the old style, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Awkward(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.fc = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.kind == "buffer":
            self.calls += 1
        y = self.fc(x)
        if self.kind == "checkpoint":
            return torch.utils.checkpoint.checkpoint(torch.square, y, use_reentrant=False)
        return Legacy.apply(y) if self.kind == "legacy" else y.square()


@pytest.mark.parametrize("kind", ["buffer", "checkpoint", "legacy"])
@pytest.mark.parametrize("together", [True, False])
def test_what_torch_func_cannot_run_is_run_by_plain_autograd(kind, together, generator):
    """All samples together, in factors; one by one where they influence each other."""
    model, recorder = Awkward(kind), Recorder()
    net = model if together else nn.Sequential(model, WithMean())
    x, y = torch.randn(5, 3, generator=generator), torch.randint(0, 2, (5,), generator=generator)
    weights = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
    expected = contextlib.nullcontext() if together else pytest.warns(UserWarning, match="one by one")
    with expected:
        observe(net, [(x, y)], F.cross_entropy, recorder, weights, num_grads=5)
    assert model.calls == 0
    assert model.fc.weight.grad is None
    for i in range(5):
        outputs = model.fc(x[i : i + 1]).square()
        loss = F.cross_entropy(outputs if together else 2 * outputs, y[i : i + 1])
        want = torch.autograd.grad(loss, model.fc.weight)[0]
        torch.testing.assert_close(recorder.gradients(next(iter(weights)))[i], want)


def test_fewer_samples_than_one_gradient_is_to_have_make_one(net, samples):
    recorder = Recorder()
    with pytest.warns(UserWarning, match="after 1 of num_grads=4"):
        observe(net, batches(*samples), F.cross_entropy, recorder, weights_of(net), num_grads=4, grad_batch_size=32)
    want = expected_gradients(net, *samples, 21)
    torch.testing.assert_close(recorder.gradients("5.weight"), want["5.weight"], rtol=1e-4, atol=1e-6)


PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from fishleg_ext.observation.observe import observe

class Counter:
    observes = frozenset({"gradients"})
    def update(self, observation):
        pass

def mib(field):
    return int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) / 1024

net = nn.Linear(1000, 1000, bias=False)
data = [(torch.randn(128, 1000), torch.randint(0, 1000, (128,)))]
weights = {"weight": net.weight}
mask = {"weight": torch.ones(1000, 1000, dtype=torch.bool)}
loss_fn = nn.functional.cross_entropy
run = lambda count, **kw: observe(net, data, loss_fn, Counter(), weights, masks=mask, num_grads=count, **kw)
run(4)
before = mib("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")
run(128, chunk_bytes=64 * 2**20)
print(mib("VmHWM:") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_that_of_a_chunk_not_of_all_gradients():
    """128 gradients are 488 MiB; with chunk_bytes of 64 MiB the peak must stay near it (allocators hold some more)."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 96


def test_gradients_that_are_all_zero_are_told(net, samples):
    with pytest.warns(UserWarning, match="every gradient is zero"):
        observe(net, [samples], lambda outputs, targets: 0 * outputs.sum(), Recorder(), weights_of(net), num_grads=21)


@pytest.mark.parametrize("most", [1, 5])
def test_where_memory_runs_out_fewer_samples_are_tried(most, net, samples):
    """Once it is known how few, no more are tried."""
    x, y = samples
    expected, found, tried = Recorder(), Recorder(), []
    observe(net, [(x, y)], F.cross_entropy, expected, weights_of(net), num_grads=len(x))

    def refuse(module, inputs):
        tried.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("no memory for this")

    net.register_forward_pre_hook(refuse)
    observe(net, [(x, y), (x, y)], F.cross_entropy, found, weights_of(net), num_grads=2 * len(x))
    for name in weights_of(net):
        twice = torch.cat([expected.gradients(name)] * 2)
        torch.testing.assert_close(found.gradients(name), twice, rtol=1e-4, atol=1e-6)
    assert 0 < sum(number > most for number in tried) <= 5
