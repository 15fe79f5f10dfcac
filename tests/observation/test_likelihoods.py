"""Labels drawn from the model's likelihood."""

import pytest
import torch
from oracles import batches
from recorder import Recorder, weights_of
from torch import nn
from torch.nn import functional as F

from fishleg_ext.observation.likelihoods import label_sampler
from fishleg_ext.observation.observe import observe


def drawn_by(loss_fn, likelihood, outputs, generator, count=None, targets=None):
    samples = len(outputs)
    return label_sampler("model", loss_fn, likelihood).draw(generator, outputs, targets, samples, count or samples)


def test_sampled_labels_follow_the_model(generator):
    logits = torch.tensor([[0.0, 2.0, -1.0]]).repeat(20000, 1)
    drawn, scale = drawn_by(F.cross_entropy, None, logits, generator, count=10000)
    frequency = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(frequency, logits[0].softmax(0), rtol=0, atol=0.015)
    assert scale == 2**0.5
    dense, scale = drawn_by(nn.CrossEntropyLoss(), None, torch.randn(2, 3, 4, 5), generator)
    assert dense.shape == (2, 4, 5)
    assert scale == 20**0.5
    gaussian, _ = drawn_by(F.mse_loss, "gaussian", torch.full((20000, 1), 3.0), generator)
    assert abs(gaussian.mean() - 3) < 0.02
    assert abs(gaussian.var() - 0.5) < 0.02
    bernoulli, _ = drawn_by(F.binary_cross_entropy_with_logits, "bernoulli", torch.full((20000,), 1.0), generator)
    assert abs(bernoulli.mean() - torch.tensor(1.0).sigmoid()) < 0.015
    own, scale = drawn_by(F.mse_loss, lambda outputs, generator: outputs + 1, torch.zeros(2), generator)
    assert own.tolist() == [1, 1]
    assert scale == 1
    assert label_sampler("data", F.mse_loss, None) is None


@pytest.mark.parametrize("confidence", [0.0, 4.0, 12.0])
def test_classes_drawn_by_importance_estimate_the_fisher_of_the_logits(confidence, generator):
    """diag(p) - p p^T, within its sampling error, and closer than classes drawn from p where the model is sure."""
    logits = torch.tensor([confidence, 1.0, 0.0, -2.0], dtype=torch.float64)
    p = logits.softmax(0)
    fisher = p.diag() - torch.outer(p, p)
    classes, scale = drawn_by(F.cross_entropy, None, logits.repeat(4000, 1), generator)
    scores = torch.eye(4, dtype=torch.float64) - p
    gradients = scores[classes] * scale[:, None]
    estimate = gradients.mT @ gradients / 4000
    # Every draw has the norm of the whole: what is left is which direction it has.
    torch.testing.assert_close(gradients.square().sum(1), fisher.trace().expand(4000))
    assert (estimate - fisher).norm() < 4 * fisher.trace() / 4000**0.5
    if confidence:
        plain = scores[torch.multinomial(p, 4000, replacement=True, generator=generator)]
        assert (estimate - fisher).norm() < 0.5 * (plain.mT @ plain / 4000 - fisher).norm()


def test_a_model_that_is_certain_has_labels(generator):
    """Nothing is left to draw by where one class has all of the probability."""
    logits = torch.tensor([[2000.0, 0.0, 0.0]]).repeat(5, 1)
    classes, scale = drawn_by(F.cross_entropy, None, logits, generator)
    assert classes.tolist() == [0] * 5
    assert scale.tolist() == [1] * 5


def test_labels_that_cannot_be_told_are_refused():
    with pytest.raises(ValueError, match="likelihood= for the true Fisher matrix"):
        label_sampler("model", F.mse_loss, None)
    with pytest.raises(ValueError, match="bernoulli or a function, got 'poisson'"):
        label_sampler("model", F.mse_loss, "poisson")
    with pytest.raises(ValueError, match="'data' or 'model', got 'true'"):
        label_sampler("true", F.cross_entropy, None)


def test_sampled_labels_depend_on_the_seed_alone(net, samples):
    runs = []
    for seed in (1, 1, 2):
        recorder = Recorder()
        torch.rand(5)
        observe(
            net,
            batches(*samples),
            F.cross_entropy,
            recorder,
            weights_of(net),
            num_grads=21,
            labels="model",
            seed=seed,
        )
        runs.append(recorder.gradients("5.weight"))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_named_likelihoods_want_a_tensor(generator):
    with pytest.raises(TypeError, match="a tensor of outputs, or outputs with logits, got a dict"):
        drawn_by(F.cross_entropy, "categorical", {"logits": torch.zeros(1, 3)}, generator)


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("group", [1, 4])
def test_sampled_gradients_estimate_the_true_fisher(outputs, group, generator):
    """For the mean squared error of a linear model it is the Hessian, 2 / outputs * mean x x^T in each row."""
    model = nn.Linear(3, outputs, bias=False)
    x = torch.randn(8000, 3, generator=generator)
    recorder = Recorder()
    options = {"num_grads": 8000 // group, "grad_batch_size": group, "labels": "model", "likelihood": "gaussian"}
    data = [(x, torch.zeros(8000, outputs))]
    observe(model, data, F.mse_loss, recorder, {"weight": model.weight}, **options)
    gradients = recorder.gradients("weight").flatten(1)
    fisher = gradients.mT @ gradients / len(gradients)
    hessian = torch.block_diag(*[2 / outputs * x.mT @ x / 8000] * outputs)
    error = (fisher - hessian).norm() / hessian.norm()
    assert error < 12 * outputs / len(gradients) ** 0.5  # 1 / sqrt(samples), times the spread of products of four


def test_bad_likelihoods_are_explained(net, samples):
    run = lambda **kw: observe(net, [samples], F.cross_entropy, Recorder(), weights_of(net), labels="model", **kw)
    with pytest.raises(TypeError, match="got None"):
        run(likelihood=lambda outputs, generator: None)
    with pytest.raises(ValueError, match="targets for 21 samples"):
        run(likelihood=lambda outputs, generator: torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        net[5].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="model's outputs.* contain NaN"):
        run()
