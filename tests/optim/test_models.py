"""Training loops as they are: groups that rest, auxiliary losses, autocast, accumulation, interruptions."""

import contextlib
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext.optim import FishLeg
from optim.problems import backward, intact, made, small, train


@pytest.mark.parametrize("curvature", ["fishleg", "kronecker"])
def test_a_group_that_does_not_move_holds_no_other_back(curvature, generator):
    """As if it were left out; and half the learning rate of one is half of its step in the measurement."""
    moved = []
    for groups in (False, True):
        net, x, y = small(generator.manual_seed(0))
        head = [*net[2].parameters()]
        given = [{"params": net[0].parameters(), "lr": 0.0}, {"params": head}] if groups else head
        optimizer = FishLeg(net, 0.2, likelihood="categorical", params=given, curvature=curvature)
        train(net, optimizer, x, y, 5)
        moved.append(head)
    torch.testing.assert_close(*moved, rtol=1e-9, atol=1e-12)


def test_the_length_is_measured_of_the_step_that_is_taken(generator):
    net, x, y = small(generator)
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.4}]
    optimizer = FishLeg(net, likelihood="categorical", params=groups, momentum=0.0, max_divergence=1e9, memory=0.0)
    backward(net, x, y)
    measured, observe = [], optimizer._observe
    optimizer._observe = lambda number: measured.append(observe(number)) or measured[-1]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.step()
    steps = {name: before[name] - p.detach() for name, p in net.named_parameters()}
    (observation,) = measured[0][1].observations
    along = sum((observation.gradients[name].flatten(1) @ step.flatten()) for name, step in steps.items())
    bend = along.square().mean() + optimizer.damping * sum(step.square().sum() for step in steps.values())
    slope = sum((net.get_parameter(name).grad * step).sum() for name, step in steps.items())
    torch.testing.assert_close(bend, 0.4 * slope)  # c = 0.4 of the minimum along it


def test_what_the_labels_do_not_reach_does_not_move(generator):
    """A loss beside that of the likelihood; once the outputs depend on it, it moves."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aside = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 3)
            self.scale, self.whole = nn.Parameter(torch.ones(3)), False

        def forward(self, x):
            h = self.body(x).tanh()
            self.auxiliary = self.aside(h) * self.scale
            return self.head(h) + (self.auxiliary if self.whole else 0)

    torch.manual_seed(0)
    net, x = Two().double(), torch.randn(64, 8, generator=generator).double()
    y = x[:, :3].argmax(1)
    optimizer = FishLeg(net, likelihood="categorical", warm_up=1)
    names = ("scale", "aside.weight", "aside.bias")
    before = {name: net.get_parameter(name).detach().clone() for name in names}

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        (loss + 0.3 * F.cross_entropy(net.auxiliary, y)).backward()
        optimizer.step()
        return loss.item()

    with pytest.warns(UserWarning, match=r"scale, aside\.weight, aside\.bias did not move: the loss has gradients by"):
        losses = [step()]
    losses += [step() for _ in range(5)]  # warnings are errors here: once is enough
    assert losses[-1] < losses[0]
    for name in names:
        assert torch.equal(net.get_parameter(name), before[name])
    net.whole = True
    losses = [step() for _ in range(8)]
    for name in names:
        assert not torch.equal(net.get_parameter(name), before[name])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("curvature", ["fishleg", "kronecker", "adam"])
@pytest.mark.parametrize("where", ["within", "step", "features"])
def test_autocast(where, curvature, generator):
    class Within(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x).float()

    net, x, y = small(generator)
    net, x = net.float(), x.float()
    model = Within(net) if where == "within" else net
    optimizer = FishLeg(model, likelihood="categorical", **made(curvature))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        if where == "within":
            loss = F.cross_entropy(model(x), y)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x.bfloat16() if where == "features" else x), y)
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "step"):
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    if where == "within":
        assert optimizer._drawn._each._in_factors is not None


def test_a_model_in_half_precision_under_autocast(generator):
    net, x, y = small(generator)
    net, x = net.bfloat16(), x.bfloat16()
    optimizer = FishLeg(net, likelihood="categorical")
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_directions_that_float16_cannot_hold_change_nothing(generator):
    torch.manual_seed(0)
    net = nn.Linear(8, 3).half()
    x = torch.randn(512, 8, generator=generator)
    x[:, 7] = 0
    x[300, 7] = 200  # which no drawn gradient is of
    optimizer = FishLeg(net, likelihood="gaussian", damping=1e-3)
    F.mse_loss(net(x.half()).float(), torch.ones(512, 3)).backward()
    optimizer.step()
    optimizer.zero_grad()
    F.mse_loss(net(x.half()).float(), torch.ones(512, 3)).backward()
    intact(optimizer, net, optimizer.step, ValueError, "the step of weight overflows; use more damping")


def test_accumulated_passes_keep_no_more_than_the_gradient(generator):
    torch.manual_seed(0)
    net = nn.Linear(40, 30)
    optimizer = FishLeg(net, likelihood="gaussian")
    held = []
    for _ in range(6):
        F.mse_loss(net(torch.randn(5, 40, generator=generator)), torch.zeros(5, 30)).backward()
        held.append(len(optimizer._forward._seen))
    # n (o^2 + i^2 + o i) < o i (o + i) up to n = 23
    assert held == [1, 2, 3, 4, 0, 0]
    optimizer.step()
    optimizer.zero_grad()
    net(torch.randn(5, 40, generator=generator)).square().mean().backward()
    assert len(optimizer._forward._seen) == 1


def test_inputs_that_the_model_overwrites_are_refused(generator):
    class Normalising(nn.Linear):
        def forward(self, x):
            return super().forward(x.sub_(5).div_(2))

    net = Normalising(8, 3)
    optimizer = FishLeg(net, likelihood="gaussian")
    net(torch.randn(16, 8, generator=generator)).square().mean().backward()
    intact(optimizer, net, optimizer.step, RuntimeError, "the model wrote into its inputs during its forward pass")


@pytest.mark.parametrize("optimizers", [1, 2])
def test_an_interrupted_pass_leaves_nothing_behind(optimizers, generator):
    class Interrupted(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.depth = net, -1

        def forward(self, x, depth=2):
            if depth == self.depth:
                raise KeyboardInterrupt
            return self(x, depth - 1) if depth else self.net(x)

    net, x, y = small(generator)
    net = Interrupted(net)
    optimizer, *_ = held = [FishLeg(net, likelihood="categorical") for _ in range(optimizers)]
    backward(net, x, y)
    net.depth = 0
    with pytest.raises(KeyboardInterrupt):
        net(x)
    net.depth = -1
    assert torch._C._len_torch_function_stack() == 3 * len(held)  # of three calls within each other
    backward(net, x, y)
    assert torch._C._len_torch_function_stack() == 0
    before = net.net[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(net.net[0].weight, before)


def test_nothing_refers_to_an_optimizer_that_is_gone(generator):
    net, x, y = small(generator)
    optimizer = FishLeg(net, likelihood="categorical")
    train(net, optimizer, x, y, 2)
    held = [weakref.ref(part) for part in (optimizer._drawn, optimizer._forward, optimizer._layers[0].running)]
    gc.disable()
    try:
        del optimizer
        assert [reference() for reference in held] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_models_can_be_traced(generator):
    net, x, y = small(generator)
    optimizer = FishLeg(net, likelihood="categorical")
    train(net, optimizer, x, y, 1)
    traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), net(x))


def test_one_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match="the models of 2 would drift apart"):
        FishLeg(nn.Linear(2, 2), likelihood="gaussian")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net: net(torch.zeros(0, 8)), ValueError, "expected the model to have been called with samples, got an"),
        (lambda net: net(torch.zeros(4, 8), torch.ones(1, 8)), ValueError, r"no batch of samples: .* got \[1, 4\]$"),
        (lambda net: net(torch.zeros(4, 8), dtype=torch.float), TypeError, "no batch of samples: .* got a dtype$"),
    ],
    ids=["empty", "broadcast", "other"],
)
def test_what_is_no_batch_is_refused(call, error, message):
    class Scaled(nn.Linear):
        def forward(self, x, by=None, dtype=None):
            return super().forward(x if by is None else x * by)

    net = Scaled(8, 3)
    optimizer = FishLeg(net, likelihood="categorical")
    call(net).sum().backward()
    intact(optimizer, net, optimizer.step, error, message)


def test_a_state_of_the_other_curvature_is_refused(generator):
    net, x, y = small(generator)
    optimizer, other = (FishLeg(net, likelihood="categorical", curvature=name) for name in ("fishleg", "kronecker"))
    train(net, optimizer, x, y, 1)
    message = "expected the state of curvature='kronecker', got that of 'fishleg'"
    intact(other, net, lambda: other.load_state_dict(optimizer.state_dict()), ValueError, message)


def test_no_curvature_at_all_is_no_step(generator):
    """Of a classifier that is sure of its answers, and wrong."""
    net = nn.Linear(4, 4, bias=False)
    net.weight.data = 120 * torch.eye(4)
    optimizer = FishLeg(net, likelihood="categorical")
    for warned in (True, False):
        backward(net, torch.eye(4), (torch.arange(4) + 1) % 4)
        with pytest.warns(UserWarning, match="weight did not move") if warned else contextlib.nullcontext():
            optimizer.step()
        assert torch.equal(net.weight.data, 120 * torch.eye(4))


def test_parameters_without_elements(generator):
    net, x, y = small(generator)
    net.empty = nn.Parameter(torch.empty(0).double())
    optimizer = FishLeg(net, likelihood="categorical")
    losses = train(net, optimizer, x, y, 5)
    assert losses[-1] < losses[0]
    optimizer.load_state_dict(optimizer.state_dict())


def test_warnings_that_are_errors_come_after_the_step(generator):
    net, x, y = small(generator)
    net.aside = nn.Parameter(torch.ones(()).double())
    optimizer = FishLeg(net, likelihood="categorical")
    before = net[0].weight.detach().clone()
    (F.cross_entropy(net(x), y) + net.aside).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="aside did not move"):
            optimizer.step()
    assert not torch.equal(net[0].weight, before)
    assert optimizer._steps == 1
