"""Models and training loops as they are: dropout, scaled losses, autocast, auxiliary outputs, interruptions."""

import contextlib
import dataclasses
import functools
import gc
import warnings
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fishleg_ext.optim import FishLeg
from optim.problems import backward, intact, made, train


def small(generator, outputs=3, samples=64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    x = torch.randn(samples, 8, generator=generator).double()
    return net, x, x[:, :outputs].argmax(1)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_curvature_is_that_of_training_with_dropout(share, generator):
    """E[x_i x_j] of inputs that are dropped with probability p and else divided by 1 - p: x_i^2 / (1 - p), x_i x_j."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(share), nn.Linear(4, 3, bias=False)).double()
    row = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    x = row.expand(20_000, 4)
    optimizer = FishLeg(net, likelihood="gaussian", curvature="kronecker", samples=len(x))
    F.mse_loss(net(x), torch.zeros(len(x), 3).double()).backward()
    optimizer.step()
    moment = optimizer._layers[0].running.col_moment
    expected = torch.outer(row, row) + (row.square() * share / (1 - share)).diag()
    torch.testing.assert_close(moment / moment[0, 0], expected / expected[0, 0], rtol=0.05, atol=0)
    assert net.training


@pytest.mark.parametrize("curvature", ["fishleg", "kronecker"])
def test_training_with_dropout_converges(curvature, generator):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.5), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    net.insert(6, nn.Dropout(0.5))
    x = torch.randn(1000, 20, generator=generator)
    y = x[:, :5].argmax(1)
    optimizer = FishLeg(net, 0.1, likelihood="categorical", curvature=curvature)
    losses = []
    for step in range(200):
        part = slice(step % 10 * 100, step % 10 * 100 + 100)
        losses.append(backward(net, x[part], y[part]))
        optimizer.step()
    assert optimizer._drawn._each._in_factors is not None  # randomness is no influence of other samples
    assert max(losses) < 4
    assert sum(losses[-10:]) / 10 < 0.8


def test_norms_of_samples_keep_their_statistics(generator):
    """InstanceNorm, which writes to them in training, unseen by versions of tensors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten())
    net.append(nn.Linear(24, 3))
    x = torch.randn(16, 2, 8, generator=generator)
    optimizer = FishLeg(net, likelihood="categorical")
    backward(net, x, torch.arange(16) % 3)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    optimizer.step()
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


def tokens(outputs, targets, reduction="mean"):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)


def times(loss, factor):
    return lambda outputs, targets: factor * loss(outputs, targets)


def summed(loss):
    """The sum over the targets of a sample, as a mean over samples."""
    return lambda outputs, targets: loss(outputs, targets, reduction="sum") / len(outputs)


LOSSES = {  # likelihood -> the mean of its loss, and multiples of it
    "categorical": [F.cross_entropy, times(F.cross_entropy, 100.0), nn.CrossEntropyLoss(reduction="sum")],
    "gaussian": [F.mse_loss, times(F.mse_loss, 0.01), nn.MSELoss(reduction="sum"), summed(F.mse_loss)],
    "bernoulli": [
        F.binary_cross_entropy_with_logits,
        nn.BCEWithLogitsLoss(reduction="sum"),
        summed(F.binary_cross_entropy_with_logits),
    ],
    "tokens": [tokens, summed(tokens), times(tokens, 7.0)],
}


@pytest.mark.parametrize("curvature", ["fishleg", "kronecker"])
@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("norm", [False, True])
def test_steps_are_the_same_for_every_multiple_of_the_loss(norm, likelihood, curvature, generator):
    x = torch.randn(140, 5, 8, generator=generator).double()
    if likelihood != "tokens":
        x = x[:, 0]
    y = x[..., :4].argmax(-1) if likelihood in ("categorical", "tokens") else x[..., :4].sigmoid()
    found = []
    for number, loss in enumerate(LOSSES[likelihood]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6) if norm else nn.Tanh(), nn.Linear(6, 4)).double()
        optimizer = FishLeg(net, likelihood=likelihood, loss_fn=loss if number else None, warm_up=1)
        for samples in (140, 100, 140):
            optimizer.zero_grad()
            loss(net(x[:samples]), y[:samples]).backward()
            optimizer.step()
        found.append([p.detach() for p in net.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            functools.partial(F.mse_loss, reduction="sum"),
            ValueError,
            "expected loss_fn to be a mean over samples",
        ),
        (lambda a, b: -F.mse_loss(a, b), ValueError, "expected loss_fn to be a multiple of the negative logarithm"),
        (lambda a, b: a.square().mean(), ValueError, "the loss does not depend on the targets that are drawn"),
    ],
    ids=["a sum", "another sign", "no targets"],
)
def test_other_losses_than_that_of_the_likelihood_are_refused(loss, error, message, generator):
    net, x, _ = small(generator)
    optimizer = FishLeg(net, likelihood="gaussian", loss_fn=loss)
    net(x).square().mean().backward()
    intact(optimizer, net, optimizer.step, error, message)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.MSELoss, TypeError, "got the class MSELoss: an instance of it"),
        ("mse", TypeError, "expected loss_fn to be a function of outputs and targets"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, "expected a loss_fn without class weights"),
    ],
    ids=["class", "name", "class weights"],
)
def test_what_is_no_loss_is_refused_at_once(loss, error, message):
    with pytest.raises(error, match=message):
        FishLeg(nn.Linear(2, 3), likelihood="categorical", loss_fn=loss)


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


@pytest.mark.parametrize("always", [True, False])
def test_checkpoints_run_again_in_training_mode(always, generator):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3)), nn.Linear(16, 3)

        def forward(self, x):
            again = always or self.training
            return self.head(checkpoint(self.block, x, use_reentrant=False) if again else self.block(x))

    torch.manual_seed(0)
    net, x = Checkpointed(), torch.randn(64, 8, generator=generator)
    optimizer = FishLeg(net, likelihood="categorical")
    losses = train(net, optimizer, x, x[:, :3].argmax(1), 10)
    assert losses[-1] < losses[0]
    assert optimizer._drawn._each._in_factors is not None


def test_layers_that_training_leaves_out_keep_factors(generator):
    class LayerDrop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

        def forward(self, x):
            for layer in self.layers:
                if not self.training or torch.rand([]) > 0.3:
                    x = x + layer(x).tanh()
            return self.head(x)

    torch.manual_seed(0)
    net, x = LayerDrop(), torch.randn(64, 8, generator=generator)
    optimizer = FishLeg(net, likelihood="categorical")
    losses = train(net, optimizer, x, x[:, :3].argmax(1), 20)
    assert losses[-1] < losses[0]
    assert optimizer._drawn._each._in_factors is not None


def test_what_a_model_writes_in_training_is_as_before(generator):
    """Into buffers by operations that give them no new version."""

    class Writing(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("seen", torch.zeros(8))
            self.register_buffer("variance", torch.ones(8))

        def forward(self, x):
            if self.training:
                self.seen.data.add_(x.detach().sum(0))
            return super().forward(F.batch_norm(x, self.mean, self.variance, training=self.training))

    torch.manual_seed(0)
    net = Writing()
    optimizer = FishLeg(net, likelihood="categorical")
    backward(net, torch.randn(64, 8, generator=generator), torch.arange(64) % 3)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    optimizer.step()
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_labels_are_not_the_random_numbers_of_the_model(generator):
    """Of noise u on the inputs and v on the targets, G_ij = v_i u_j (o = i): independent, so of one mean square."""

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    torch.manual_seed(0)
    net, x = nn.Sequential(Noise(), nn.Linear(4, 4, bias=False)).double(), torch.zeros(20_000, 4).double()
    optimizer = FishLeg(net, likelihood="gaussian", samples=len(x))
    net(x).square().mean().backward()
    (observation,) = optimizer._observe(1)[0].observations
    grads = observation.gradients["1.weight"]
    squares = grads.square().mean(0)
    torch.testing.assert_close(squares / squares.mean(), torch.ones(4, 4).double(), rtol=0.1, atol=0)
    assert grads.mean(0).abs().max() < 0.05 * squares.mean() ** 0.5


@pytest.mark.parametrize("cuts", [(43, 43, 43), (64, 50, 15)])
def test_sums_over_several_passes_are_means_over_their_samples(cuts, generator):
    moved = []
    for reduction in ("mean", "sum"):
        net, x, y = small(generator.manual_seed(0), samples=129)
        loss = nn.CrossEntropyLoss(reduction=reduction)
        optimizer = FishLeg(net, likelihood="categorical", loss_fn=loss, max_divergence=1e9)
        for _ in range(3):
            optimizer.zero_grad()
            for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
                (loss(net(a), b) * (len(a) / 129 if reduction == "mean" else 1)).backward()
            optimizer.step()
        moved.append([*net.parameters()])
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor


class Named(NamedTuple):
    logits: torch.Tensor


@pytest.mark.parametrize("kind", [Frozen, Named])
def test_a_multiple_of_the_loss_of_outputs_with_logits(kind, generator):
    class Model(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return kind(self.net(x))

    moved = []
    for loss in (None, lambda outputs, targets: 5 * F.cross_entropy(outputs.logits, targets)):
        net, x, y = small(generator.manual_seed(0))
        optimizer = FishLeg(Model(net), likelihood="categorical", loss_fn=loss)
        for _ in range(3):
            optimizer.zero_grad()
            factor = 1 if loss is None else 5
            (factor * F.cross_entropy(optimizer.model(x).logits, y)).backward()
            optimizer.step()
        moved.append([*net.parameters()])
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-9)


def test_a_loss_of_several_numbers_is_refused(generator):
    net, x, y = small(generator)
    optimizer = FishLeg(net, likelihood="categorical", loss_fn=lambda a, b: F.cross_entropy(a, b, reduction="none"))
    backward(net, x, y)
    intact(optimizer, net, optimizer.step, ValueError, "expected loss_fn to return a scalar")


@pytest.mark.parametrize("smoothing", [0.02, 0.3])
def test_label_smoothing_is_taken_for_the_loss_that_it_began_as(smoothing, generator):
    net, x, y = small(generator)
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    optimizer = FishLeg(net, likelihood="categorical", loss_fn=loss)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(loss(net(x), y))
        losses[-1].backward()
        optimizer.step()
        assert 1 - smoothing <= optimizer._labels.scale * 1.05 < 1.1
    assert losses[-1] < 0.7 * losses[0]


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
