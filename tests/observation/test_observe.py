"""What is left as it was, and what data may be."""

import copy

import pytest
import torch
from oracles import batches
from recorder import Recorder, expected_gradients, weights_of
from torch import nn
from torch.nn import functional as F

from fishleg_ext.observation.observe import observe


def test_only_the_first_samples_are_read(net, samples):
    recorder, pulled = Recorder(), []

    def data():
        for i, batch in enumerate(batches(*samples, 4)):
            pulled.append(i)
            yield batch

    observe(net, data(), F.cross_entropy, recorder, weights_of(net), num_grads=6)
    assert pulled == [0, 1]
    want = expected_gradients(net, samples[0][:6], samples[1][:6], 1)
    torch.testing.assert_close(recorder.gradients("0.weight"), want["0.weight"], rtol=1e-4, atol=1e-6)


def test_the_model_and_the_rng_are_as_before(net, samples):
    net[1].eval()
    net[5].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = copy.deepcopy(net.state_dict())
    flags = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    observe(
        net,
        batches(*samples),
        F.cross_entropy,
        Recorder(),
        weights_of(net),
        num_grads=21,
        labels="model",
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net[5].weight.requires_grad
    assert (net[0].weight.grad == 1).all()
    assert net[5].weight.grad is None


def test_flags_return_after_an_exception(net, samples):
    net.train()

    def fail(outputs, targets):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        observe(net, batches(*samples), fail, Recorder(), weights_of(net))
    assert all(m.training for m in net.modules())


def test_bad_data_is_explained(net, samples):
    run = lambda data, **kw: observe(net, data, F.cross_entropy, Recorder(), weights_of(net), **kw)
    x, y = samples
    with pytest.raises(ValueError, match="at least one sample"):
        run([])
    with pytest.raises(ValueError, match="at least one sample"):
        run([(x[:0], y[:0])])
    with pytest.raises(TypeError, match="pairs, got Tensor"):
        run([x])
    with pytest.raises(TypeError, match="DataLoader"):
        run([(x[0], 3)])
    with pytest.raises(ValueError, match=r"as many samples each, got \[20, 21\]"):
        run([(x, y[:20])])
    with pytest.raises(TypeError, match="structure of the first"):
        run([(x, y), ((x, x), y)], num_grads=64)
    with pytest.warns(UserWarning, match="after 21 of num_grads=64"):
        assert run([(x, y)], num_grads=64) == 21


def test_what_cannot_be_observed_together_is_refused():
    model = nn.Linear(2, 2)
    for observes in ({"gradients", "inputs"}, {"hessian"}, set()):
        with pytest.raises(ValueError, match="to observe gradients and perhaps fisher_products, or inputs"):
            observe(model, [], F.mse_loss, Recorder(frozenset(observes)), dict(model.named_parameters()))


def test_other_devices_are_not_seeded(net, samples, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds every GPU"))
    observe(net, [samples], F.cross_entropy, Recorder(), weights_of(net), num_grads=4)


def test_a_loss_that_is_no_scalar_is_explained(net, samples):
    with pytest.raises(ValueError, match=r"loss_fn to return a scalar, got a tensor of shape \[1\]"):
        observe(net, [samples], nn.CrossEntropyLoss(reduction="none"), Recorder(), weights_of(net))
