"""What training does otherwise than evaluation: dropout, checkpoints, layers left out, statistics."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fishleg_ext.optim import FishLeg
from optim.problems import backward, train


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
