"""Layer inputs and output gradients."""

import pytest
import torch
from oracles import batches
from recorder import Recorder, weights_of
from torch import nn
from torch.nn import functional as F

from fishleg_ext.observation.observe import observe


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
    patches = F.unfold(x, 3, padding=1).mT.flatten(0, 1)
    torch.testing.assert_close(recorder.inputs("0.weight"), patches)
    torch.testing.assert_close(recorder.inputs("5.weight"), net[:5](x))
    assert all(len(o.inputs) == 1 and o.count == 0 for o in recorder.seen[:-1])
    assert recorder.seen[-1].count == 21
    assert max(o.inputs["0.weight"].rows.shape[1] for o in recorder.seen if "0.weight" in o.inputs) == 5 * 16
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
    loss_fn = nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 1.0, 2.0, 9.0]) if labels == "data" else None)
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
    assert {name for o in recorder.seen for name in o.output_gradients} == {"1.weight"}
    assert {name for o in recorder.seen for name in o.inputs} == {"1.weight"}  # as many as gradients
    recorder = Recorder(frozenset({"inputs"}))
    observe(model, [samples], F.cross_entropy, recorder, weights, num_grads=21)
    assert len(recorder.inputs("0.5.weight")) == len(recorder.inputs("1.weight")) == 21
