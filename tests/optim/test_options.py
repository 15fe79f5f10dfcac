"""Groups, schedulers, states and bad input."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext.curvature import Adam, CurvatureError
from fishleg_ext.optim import FishLeg
from optim.problems import CURVATURES, backward, intact, made, train, trained

pytestmark = pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")  # nn.GRU


def test_groups_have_options_of_their_own(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": [net[2].weight], "weight_decay": 0.5}]
    optimizer = FishLeg(net, 0.1, likelihood="categorical", params=groups)
    before = copy.deepcopy(net.state_dict())
    twin = copy.deepcopy(net)
    train(net, optimizer, x, y, 1)
    for name in ("0.weight", "0.bias", "2.bias"):
        assert torch.equal(net.state_dict()[name], before[name])
    plain = [{"params": twin[0].parameters(), "lr": 0.0}, {"params": [twin[2].weight]}]
    train(twin, FishLeg(twin, 0.1, likelihood="categorical", params=plain), x, y, 1)
    torch.testing.assert_close(net[2].weight, twin[2].weight - 0.1 * 0.5 * before["2.weight"])


def test_schedulers_change_the_step(generator):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
    optimizer = FishLeg(net, likelihood="categorical")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
    train(net, optimizer, x, y, 1)
    scheduler.step()
    before = net.weight.detach().clone()
    train(net, optimizer, x, y, 1)
    assert torch.equal(net.weight, before)


def test_scaled_losses_are_unscaled_first(generator):
    nets = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
        optimizer, scaler = FishLeg(net, likelihood="categorical"), torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        nets.append(net)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["mean", "smoothed"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_run_that_was_killed_goes_on_to_the_bit(curvature, loss, problem, tmp_path):
    net, x, y = problem
    options = made(curvature, warm_up=3, update_every=2, invert_every=4, loss_fn=loss)
    optimizer = FishLeg(net, likelihood="categorical", **options)
    train(net, optimizer, x, y, 5)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other = copy.deepcopy(net)
    train(net, optimizer, x, y, 6)
    for p in other.parameters():
        p.data.zero_()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    resumed = FishLeg(other, likelihood="categorical", **options)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, x, y, 6)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_of_the_model_keep_nothing(problem):
    net, x, y = problem
    optimizer = FishLeg(net, likelihood="categorical")
    train(net, optimizer, x, y, 1)
    copied = copy.deepcopy(net)
    copied(x)
    before = optimizer._forward.called
    copied(x + 1)
    assert optimizer._forward.called is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected likelihood=, which labels for the curvature are drawn from: 'categorical'"),
        ({"likelihood": "poisson"}, "expected likelihood to be one of categorical"),
        ({"likelihood": lambda outputs, generator: outputs}, "expected loss_fn=, the loss that is minimised"),
        ({"likelihood": "gaussian", "lr": -1}, "expected lr to be finite and >= 0, got -1"),
        ({"likelihood": "gaussian", "damping": 0}, "expected damping to be finite and > 0, got 0"),
        ({"likelihood": "gaussian", "momentum": 1}, r"expected momentum in \[0, 1\), got 1"),
        ({"likelihood": "gaussian", "curvature": "block"}, "expected curvature to be 'fishleg' or 'kronecker'"),
        (
            {"likelihood": "gaussian", "invert_every": 3},
            "expected invert_every to be a multiple of update_every=2, got 3",
        ),
        ({"likelihood": "gaussian", "adam": Adam()}, r"expected adam=Adam\(steps=None, scaled=False"),
        (
            {"likelihood": "gaussian", "params": [nn.Parameter(torch.ones(2))]},
            "expected parameters of the model, got 1",
        ),
        ({"likelihood": "gaussian", "params": []}, "empty parameter list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FishLeg(nn.Linear(2, 2), **options)


def test_what_is_not_finite_changes_nothing(generator):
    net, optimizer, x, y = trained(generator)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y) * torch.nan
        loss.backward()
        return loss

    intact(
        optimizer, net, lambda: optimizer.step(closure), ValueError, "expected closure to return a finite loss, got nan"
    )
    backward(net, x, y)
    net[2].weight.grad[0, 0] = torch.inf
    intact(optimizer, net, optimizer.step, ValueError, r"the gradients of 2\.weight contain NaN or inf")
    backward(net, x, y)
    assert math.isfinite(optimizer.step(lambda: backward(net, x, y)))


def test_a_likelihood_that_fails_changes_nothing(generator):
    net, optimizer, x, y = trained(generator, warm_up=100)
    backward(net, x, y)

    def failing(*args):
        raise ValueError("the likelihood fails")

    optimizer._labels._sampler.draw = failing
    intact(optimizer, net, optimizer.step, ValueError, "the likelihood fails")


@pytest.mark.parametrize("where", ["masks", "_measure"])
def test_errors_within_a_step_change_nothing(where, generator):
    net, optimizer, x, y = trained(generator, warm_up=100)
    backward(net, x, y)

    def failing(*args):
        raise RuntimeError("out of memory")

    if where == "masks":
        optimizer.follow_masks(failing)
    else:
        optimizer._measure = failing
    intact(optimizer, net, optimizer.step, RuntimeError, "out of memory")


def test_moments_that_cannot_be_inverted_change_nothing(generator, monkeypatch):
    net, optimizer, x, y = trained(generator, warm_up=100)
    backward(net, x, y)

    monkeypatch.setattr(optimizer._layers[1].running, "invert", lambda damping: torch.ones(()))
    intact(optimizer, net, optimizer.step, CurvatureError, r"the factors of 2\.weight have no inverse")


def test_options_of_groups_and_copies(generator):
    net, optimizer, x, y = trained(generator)
    with pytest.raises(ValueError, match=r"expected momentum in \[0, 1\), got 1"):
        FishLeg(net, likelihood="categorical", params=[{"params": net[0].parameters(), "momentum": 1.0}])
    optimizer.param_groups[0]["lr"] = math.nan
    backward(net, x, y)
    intact(optimizer, net, optimizer.step, ValueError, "expected learning rates to be finite and >= 0, got nan")
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    net.float()
    backward(net, x.float(), y)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced in the model, moved, or changed"):
        optimizer.step()


def test_models_that_were_not_called_changed_or_replaced(generator):
    net, optimizer, x, y = trained(generator)
    fresh = nn.Linear(4, 3)
    other = FishLeg(fresh, likelihood="categorical")
    for p in fresh.parameters():
        p.grad = torch.ones_like(p)
    intact(other, fresh, other.step, RuntimeError, "the model was not called with gradients enabled")
    backward(net, x, y)
    weight = net[2].weight
    net[2].weight = nn.Parameter(weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"2\.weight was replaced in the model, moved, or changed its shape"):
        optimizer.step()
    net[2].weight = weight
    with pytest.raises(NotImplementedError, match="takes no parameters later on"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_states_of_others_are_refused(generator):
    net, optimizer, *_ = trained(generator)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    intact(
        optimizer, net, lambda: optimizer.load_state_dict(sgd.state_dict()), ValueError, "expected the state of FishLeg"
    )
    wide = nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))
    state = FishLeg(wide, likelihood="categorical").state_dict()
    message = r"expected row_moment|expected col_moment of 0\.weight of shape \[13, 13\], got \[14, 14\]"
    intact(optimizer, net, lambda: optimizer.load_state_dict(state), ValueError, message)
