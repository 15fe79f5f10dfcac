"""Gradients, layer inputs, labels, BatchNorm statistics."""

import copy
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from oracles import batches
from torch import nn
from torch.nn import functional as F

from fishleg_ext.observation.batchnorm import recalibrate_batchnorm
from fishleg_ext.observation.gradients import gradient_bytes
from fishleg_ext.observation.layer_inputs import input_rows
from fishleg_ext.observation.likelihoods import label_sampler
from fishleg_ext.observation.observe import observe
from fishleg_ext.observation.types import Observation


@dataclass
class Recorder:
    observes: frozenset = frozenset({"gradients"})
    seen: list[Observation] = field(default_factory=list)

    def update(self, observation):
        self.seen.append(observation)

    def gradients(self, name):
        return torch.cat([o.gradients[name] for o in self.seen])

    def inputs(self, name):
        return torch.cat([o.inputs[name] for o in self.seen if name in o.inputs], dim=-2)

    def output_gradients(self, name):
        return torch.cat([o.output_gradients[name] for o in self.seen if name in o.output_gradients])


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def samples(generator):
    return torch.randn(21, 2, 4, 4, generator=generator), torch.randint(0, 3, (21,), generator=generator)


def weights_of(net):
    return {n: p for n, p in net.named_parameters() if n in ("0.weight", "5.weight")}


def recorded(net, data, **options):
    """What `observe` hands over for the cross entropy of a small net."""
    recorder = Recorder()
    observe(net, data, F.cross_entropy, recorder, weights_of(net), **options)
    return recorder


def expected_gradients(net, inputs, targets, group, loss_fn=F.cross_entropy):
    net = copy.deepcopy(net).eval()
    rows = {n: [] for n in weights_of(net)}
    whole = len(inputs) - len(inputs) % group  # what is left over is not used
    for x, y in zip(inputs[:whole].split(group), targets[:whole].split(group), strict=True):
        grads = torch.autograd.grad(loss_fn(net(x), y), list(weights_of(net).values()))
        for name, grad in zip(rows, grads, strict=True):
            rows[name].append(grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


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


def test_memory_is_bounded_by_chunk_bytes(net, samples):
    per_gradient = gradient_bytes(weights_of(net).values())
    recorder = recorded(net, batches(*samples), num_grads=21, chunk_bytes=3 * per_gradient)
    assert {o.count for o in recorder.seen} == {3}
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
    assert torch.equal(masked.gradients("0.weight"), plain.gradients("0.weight"))


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


def test_bad_gradients_are_named(net, samples):
    x, y = samples
    x = x.clone()
    x[3] = torch.nan
    with pytest.raises(ValueError, match=r"gradients of 0.weight, 5.weight contain NaN or inf"):
        observe(net, [(x, y)], F.cross_entropy, Recorder(), weights_of(net), num_grads=21)


# labels


def drawn_by(loss_fn, likelihood, outputs, generator, count=None):
    samples = len(outputs)
    return label_sampler("model", loss_fn, likelihood).draw(generator, outputs, samples, count or samples)


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


# layer inputs


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(5, 3), (4, 5)),
        (nn.Linear(5, 3), (4, 2, 5)),
        (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="circular"), (2, 4, 5, 5)),
        (nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (1, 2, 3, 4, 3)),
    ],
)
def test_input_rows_times_the_weight_are_the_outputs(layer, shape, generator):
    x = torch.randn(shape, generator=generator)
    rows = input_rows(layer, x)
    output = layer(x)
    if isinstance(layer, nn.Linear):
        product = rows @ layer.weight.mT
        expected = (output - layer.bias).flatten(0, -2)
    else:
        weight = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))  # [g, out / g, fan_in]
        product = rows.reshape(layer.groups, -1, rows.shape[-1]) @ weight.mT  # [g, rows, out / g]
        product = product.transpose(0, 1).flatten(1)
        expected = output.movedim(1, -1).flatten(0, -2) - layer.bias
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


def test_layer_inputs_come_layer_by_layer_in_bounded_chunks(net, samples):
    net.eval()
    recorder = Recorder(frozenset({"inputs"}))
    used = observe(
        net,
        batches(*samples),
        F.cross_entropy,
        recorder,
        weights_of(net),
        num_grads=21,
        chunk_bytes=4 * 18 * 16 * 5,
    )
    assert used == 21
    x = samples[0]
    torch.testing.assert_close(recorder.inputs("0.weight"), input_rows(net[0], x))
    torch.testing.assert_close(recorder.inputs("5.weight"), net[:5](x))
    assert all(len(o.inputs) == 1 for o in recorder.seen)
    assert max(o.inputs["0.weight"].shape[0] for o in recorder.seen if "0.weight" in o.inputs) == 5 * 16
    assert not net[0]._forward_hooks


@pytest.mark.parametrize("labels", ["data", "model"])
def test_output_gradients_and_inputs_make_up_the_gradients(labels, net, samples):
    """Each sample's gradient is the sum over positions of output gradients times inputs."""
    net[2] = nn.ReLU(inplace=True)
    options = {"num_grads": 21, "labels": labels}
    plain, recorder = Recorder(), Recorder(frozenset({"inputs", "output_gradients"}))
    observe(net, batches(*samples), F.cross_entropy, plain, weights_of(net), **options)
    observe(net, batches(*samples), F.cross_entropy, recorder, weights_of(net), **options, chunk_bytes=4 * 18 * 16 * 5)
    for name in ("0.weight", "5.weight"):
        inputs, gradients = recorder.inputs(name), recorder.output_gradients(name)
        products = torch.einsum("spo,spi->soi", gradients.unflatten(0, (21, -1)), inputs.unflatten(0, (21, -1)))
        expected = plain.gradients(name)
        torch.testing.assert_close(products, expected.flatten(2), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in net.parameters())
    assert not net[0]._forward_hooks


@pytest.mark.parametrize("labels", ["data", "model"])
def test_output_gradients_belong_to_their_samples_wherever_these_lie(labels, generator):
    """In a layer of sequences first, and with a loss whose mean weighs samples by their classes."""

    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 5, bias=False)

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).sum(0)

    torch.manual_seed(0)
    model = SequenceFirst()
    data = [(torch.randn(8, 8, 3, generator=generator), torch.randint(0, 5, (8,), generator=generator))]
    loss_fn = nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 1.0, 2.0, 9.0]))
    plain, recorder = Recorder(), Recorder(frozenset({"inputs", "output_gradients"}))
    weights = {"inner.weight": model.inner.weight}
    for observer in (plain, recorder):
        observe(model, data, loss_fn, observer, weights, num_grads=8, labels=labels)
    inputs, gradients = recorder.inputs("inner.weight"), recorder.output_gradients("inner.weight")
    products = torch.einsum("tso,tsi->soi", gradients.view(8, 8, 5), inputs.view(8, 8, 3))
    torch.testing.assert_close(products, plain.gradients("inner.weight"), rtol=1e-4, atol=1e-6)


def test_a_layer_that_runs_without_gradients_has_none(net, samples):
    class Frozen(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    net[5] = Frozen(64, 3)
    model = nn.Sequential(net, nn.Linear(3, 3))
    weights = {n: p for n, p in model.named_parameters() if n in ("0.5.weight", "1.weight")}
    recorder = Recorder(frozenset({"inputs", "output_gradients"}))
    observe(model, [samples], F.cross_entropy, recorder, weights, num_grads=21)
    assert len(recorder.inputs("0.5.weight")) == 21
    assert {name for o in recorder.seen for name in o.output_gradients} == {"1.weight"}


def test_named_likelihoods_want_a_tensor(generator):
    with pytest.raises(TypeError, match="expected a tensor of outputs, got a dict"):
        drawn_by(F.cross_entropy, "categorical", {"logits": torch.zeros(1, 3)}, generator)


def test_inputs_of_other_layers_are_refused(generator):
    model = nn.Embedding(3, 2)
    with pytest.raises(NotImplementedError, match="Embedding"):
        observe(
            model,
            [(torch.zeros(2, dtype=torch.long),) * 2],
            F.mse_loss,
            Recorder(frozenset({"inputs"})),
            dict(model.named_parameters()),
        )


def test_what_cannot_be_observed_together_is_refused():
    model = nn.Linear(2, 2)
    for observes in ({"gradients", "inputs"}, {"hessian"}, set()):
        with pytest.raises(ValueError, match="to observe gradients and perhaps fisher_products, or inputs"):
            observe(model, [], F.mse_loss, Recorder(frozenset(observes)), dict(model.named_parameters()))


def test_recalibrated_statistics_are_those_of_the_data(net, generator):
    """Whatever the batches: 300 samples in batches of 100 are forwarded as 128, 128 and 44, and weighted so."""
    x = torch.randn(300, 2, 4, 4, generator=generator)
    net.train()
    net[1].momentum = 0.3
    flags = [m.training for m in net.modules()]
    assert recalibrate_batchnorm(net, batches(x, x, 100)) == 300
    features = net[0](x)
    torch.testing.assert_close(net[1].running_mean, features.mean((0, 2, 3)))
    variances = torch.stack([part.var((0, 2, 3)) for part in features.split(128)])
    shares = torch.tensor([128, 128, 44]) / 300
    torch.testing.assert_close(net[1].running_var, shares @ variances)
    assert [m.training for m in net.modules()] == flags
    assert net[1].momentum == 0.3


def test_a_single_sample_left_over_has_no_variance_and_is_left_out(generator):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    x = torch.randn(129, 3, generator=generator)
    assert recalibrate_batchnorm(net, [(x, x)]) == 128
    torch.testing.assert_close(net[1].running_mean, net[0](x[:128]).mean(0))


def test_a_failed_recalibration_changes_nothing(net, samples):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="at least one sample"):
        recalibrate_batchnorm(net, [])
    with pytest.raises(TypeError):
        recalibrate_batchnorm(net, [*[samples] * 7, 3])  # the first chunk has been used by then
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net[1].momentum == 0.1
    assert recalibrate_batchnorm(nn.Linear(2, 2), []) == 0


# what vmap cannot run


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
def test_what_torch_func_cannot_run_is_run_by_plain_autograd(kind, generator):
    model, recorder = Awkward(kind), Recorder()
    x, y = torch.randn(5, 3, generator=generator), torch.randint(0, 2, (5,), generator=generator)
    with pytest.warns(UserWarning, match="one by one"):
        observe(model, [(x, y)], F.cross_entropy, recorder, {"fc.weight": model.fc.weight}, num_grads=5)
    assert model.calls == 0
    assert model.fc.weight.grad is None
    for i in range(5):
        loss = F.cross_entropy(model.fc(x[i : i + 1]).square(), y[i : i + 1])
        want = torch.autograd.grad(loss, model.fc.weight)[0]
        torch.testing.assert_close(recorder.gradients("fc.weight")[i], want)


def test_fewer_samples_than_one_gradient_is_to_have_make_one(net, samples):
    recorder = Recorder()
    with pytest.warns(UserWarning, match="after 1 of num_grads=4"):
        observe(net, batches(*samples), F.cross_entropy, recorder, weights_of(net), num_grads=4, grad_batch_size=32)
    want = expected_gradients(net, *samples, 21)
    torch.testing.assert_close(recorder.gradients("5.weight"), want["5.weight"], rtol=1e-4, atol=1e-6)


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


def test_other_devices_are_not_seeded(net, samples, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds every GPU"))
    observe(net, [samples], F.cross_entropy, Recorder(), weights_of(net), num_grads=4)


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


def test_a_loss_that_is_no_scalar_is_explained(net, samples):
    with pytest.raises(ValueError, match=r"loss_fn to return a scalar, got a tensor of shape \[1\]"):
        observe(net, [samples], nn.CrossEntropyLoss(reduction="none"), Recorder(), weights_of(net))


def test_gradients_that_are_all_zero_are_told(net, samples):
    with pytest.warns(UserWarning, match="every gradient is zero"):
        observe(net, [samples], lambda outputs, targets: 0 * outputs.sum(), Recorder(), weights_of(net), num_grads=21)
