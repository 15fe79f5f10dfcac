"""Gradients in factors: whose rows they are, that they make up the gradient of each group, and what has none."""

from dataclasses import replace

import pytest
import torch
from models.functions import Experts, SharedRows, Tokens
from recorder import Recorder, small_net, weights_of
from torch import nn
from torch.nn import functional as F

from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.curvature import BlockFisher, DiagonalFisher
from fishleg_ext.observation import gradient_factors
from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.factors import FactorObserver, NoFactors
from fishleg_ext.observation.observe import observe
from fishleg_ext.observation.verification import Verifier
from fishleg_ext.sparsity.parameters import orientations_of

MODELS = ("plain", "flat", "positions first", "one by one")


def observer(model, weights, orientations=None, biases=None, draw=None):
    return FactorObserver(model, F.cross_entropy, weights, draw, orientations or {}, biases or {})


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_factors_make_up_the_gradient_of_each_group(kind, group, generator):
    model = Tokens(kind).double().eval()
    x = torch.randn(6, 6, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (6,), generator=generator)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    biases = {
        n: (b, model.get_parameter(b))
        for n in weights
        if (b := n.replace("weight", "bias")) in dict(model.named_parameters())
    }
    orientations = orientations_of(model, weights)
    factors, _, _ = observer(model, weights, orientations, biases).factors(Chunk(x, y, 6), 6 // group)
    assert factors.keys() == weights.keys()
    for s in range(6 // group):
        own = slice(s * group, (s + 1) * group)
        wanted = {**weights, **dict(biases.values())}
        expected = dict(
            zip(wanted, torch.autograd.grad(F.cross_entropy(model(x[own]), y[own]), list(wanted.values())), strict=True)
        )
        for n, of_name in factors.items():
            matrix = orientations[n].to_matrix(expected[n]).flatten(1)
            torch.testing.assert_close(of_name.gradients()[s], matrix)
            torch.testing.assert_close(of_name.part(s, s + 1).gradients()[0], matrix)
            inputs, gradients = of_name.matrices()
            assert inputs.shape[1] == of_name.rows
            torch.testing.assert_close(gradients[s].mT @ inputs[s], matrix)
            if n in biases:
                torch.testing.assert_close(of_name.bias_gradients()[s], expected[biases[n][0]])


@pytest.mark.parametrize("part_bytes", [1, 200, 2**22])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_some_rows_at_a_time_make_up_the_gradients(kind, masked, part_bytes, generator, monkeypatch):
    monkeypatch.setattr(gradient_factors, "CACHE_BYTES", part_bytes)
    monkeypatch.setattr(gradient_factors, "MOST_BYTES", part_bytes)
    model = Tokens(kind).double().eval()
    x = torch.randn(6, 6, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (6,), generator=generator)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    factors, _, _ = observer(model, weights, orientations_of(model, weights)).factors(Chunk(x, y, 6), 6)
    numbers = set()
    for of_name in factors.values():
        whole = of_name.part(2, 5).gradients()
        if masked:
            mask = torch.rand(of_name.shape, generator=generator) < 0.5
            of_name, whole = replace(of_name, mask=mask), whole * mask
            assert not of_name.whole
            torch.testing.assert_close(of_name.part(2, 5).gradients(), whole)
        for multiple in (1, 3):
            parts = list(of_name.part(2, 5).rows_at_a_time(multiple))
            assert all(first % multiple == 0 for first, _ in parts)
            torch.testing.assert_close(torch.cat([part for _, part in parts], dim=1), whole)
            assert [first for first, _ in parts[1:]] == [first + part.shape[1] for first, part in parts[:-1]]
            numbers.add(len(parts))
        squares = of_name.part(2, 5).sum_of_squares(torch.float64)
        torch.testing.assert_close(squares, whole.square().sum(0))
    assert (max(numbers) > 1) == (part_bytes < 2**22)


@pytest.mark.parametrize("block_size", [3, 8, 20])
def test_curvature_is_the_same_some_rows_at_a_time(block_size, generator, monkeypatch):
    """Blocks that begin within a row, and a last one that is filled up; squares of one row of each, and of masks."""
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(9, 6, dtype=torch.float64, generator=generator), torch.randint(0, 3, (9,), generator=generator)
    weights = weights_of(net)
    masks = {"0.weight": torch.rand(7, 6, generator=generator) < 0.5}
    found = []
    for part_bytes in (1, 2**22):
        monkeypatch.setattr(gradient_factors, "CACHE_BYTES", part_bytes)
        monkeypatch.setattr(gradient_factors, "MOST_BYTES", part_bytes)
        for recipe in (BlockFisher(block_size, 0.1), DiagonalFisher(0.1)):
            estimate = recipe.start(weights)
            observe(net, [(x, y)], F.cross_entropy, estimate, weights, masks=masks, num_grads=9)
            found.append(estimate.diag())
    gradients = {name: torch.zeros(9, *w.shape, dtype=torch.float64) for name, w in weights.items()}
    for s in range(9):
        loss = F.cross_entropy(net(x[s : s + 1]), y[s : s + 1])
        for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            gradients[name][s] = g * masks.get(name, 1)
    for name, g in gradients.items():
        diagonal = 1 / (g.square().mean(0) + 0.1)
        layout = BlockLayout(g.shape[1:], block_size)
        blocks = layout.to_blocks(g).transpose(0, 1)  # [K, m, B]
        fisher = blocks.mT @ blocks / 9 + 0.1 * torch.eye(layout.block_size, dtype=torch.float64)
        of_blocks = layout.from_blocks(torch.linalg.inv(fisher).diagonal(dim1=1, dim2=2))
        for i, expected in enumerate([of_blocks, diagonal] * 2):
            torch.testing.assert_close(found[i][name], expected)


def test_factors_of_convolutions_in_float32(generator):
    net = small_net().eval()
    x, y = torch.randn(64, 2, 4, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    factors, _, _ = observer(net, weights_of(net)).factors(Chunk(x, y, 64), 64)
    for s in (0, 31, 63):
        loss = F.cross_entropy(net(x[s : s + 1]), y[s : s + 1])
        expected = torch.autograd.grad(loss, list(weights_of(net).values()))
        for of_name, gradient in zip(factors.values(), expected, strict=True):
            torch.testing.assert_close(of_name.gradients()[s], gradient.flatten(1), rtol=1e-4, atol=1e-6)


def test_grouped_and_shared_weights(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
            self.shared = nn.Linear(6, 6)

        def forward(self, x):
            x = self.grouped(x).tanh().mean(-1).mT  # [N, positions, 6]
            return self.shared(self.shared(x).tanh()).mean(1)

    net = Net().double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 6, (5,), generator=generator)
    weights = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
    factors, _, _ = observer(net, weights).factors(Chunk(x, y, 5), 5)
    assert not factors["grouped.weight"].whole
    for s in range(5):
        expected = torch.autograd.grad(F.cross_entropy(net(x[s : s + 1]), y[s : s + 1]), list(weights.values()))
        for of_name, gradient in zip(factors.values(), expected, strict=True):
            torch.testing.assert_close(of_name.gradients()[s], gradient.flatten(1))


def test_weights_without_factors_are_left_to_others(generator):
    """Experts have rows of some samples alone, norms do not multiply matrices, and an embedding is looked up."""
    model = Experts("skipped", used=3).double().eval()
    x, y = (
        torch.randn(6, 6, 8, dtype=torch.float64, generator=generator),
        torch.randint(0, 3, (6,), generator=generator),
    )
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    orientations = orientations_of(model, weights)
    orientations["experts"] = type(orientations["experts"]).of((3, 8, 8), num_out=2)
    factors, _, _ = observer(model, weights, orientations).factors(Chunk(x, y, 6), 6)
    assert factors.keys() == weights.keys() - {"experts"}
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3))
    tokens, y = torch.randint(0, 5, (6, 3), generator=generator), torch.randint(0, 3, (6,), generator=generator)
    weights = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
    factors, _, _ = observer(net, weights).factors(Chunk(tokens, y, 6), 6)
    assert factors.keys() == {"3.weight"}


def test_rows_of_several_samples_have_no_factors(generator):
    model = SharedRows().eval()
    x, y = torch.randn(6, 8, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    with pytest.raises(NoFactors, match="rows of the inputs of project.weight belong to several samples"):
        observer(model, {"project.weight": model.project.weight}).factors(Chunk(x, y, 6), 6)


def test_a_later_batch_whose_samples_influence_each_other_is_noticed(generator):
    """Though its sequence of products is that of the first."""

    class Late(nn.Linear):
        coupled = False

        def forward(self, x):
            return super().forward(x + x.mean(0)) if self.coupled else super().forward(x)

    net = Late(4, 3)
    x, y = torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    source = observer(net, {"weight": net.weight})
    source.factors(Chunk(x, y, 6), 6)
    net.coupled = True
    with pytest.raises(NoFactors, match="weight are others for a single sample"):
        source.factors(Chunk(x, y, 6), 6)


def test_labels_are_drawn_from_the_same_outputs(generator):
    """One forward pass serves the labels and the gradients, which are scaled as the labels say."""
    net, calls = nn.Linear(4, 3), []
    net.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(6, 4, generator=generator), torch.zeros(6, dtype=torch.long)
    scale = torch.arange(1.0, 7.0)
    draw = lambda outputs, targets, samples, count: (outputs.argmin(1), scale)
    source = observer(net, {"weight": net.weight}, draw=draw)
    source.factors(Chunk(x, y, 6), 6)
    source.factors(Chunk(x, y, 6), 6)
    before = len(calls)
    factors, targets, _ = source.factors(Chunk(x, y, 6), 6)  # the third, which is not compared with a single sample
    assert len(calls) == before + 1
    assert torch.equal(targets, net(x).argmin(1))
    for s in range(6):
        loss = F.cross_entropy(net(x[s : s + 1]), targets[s : s + 1])
        want = scale[s] * torch.autograd.grad(loss, net.weight)[0]
        torch.testing.assert_close(factors["weight"].gradients()[s], want)


class SequenceFirst(nn.Module):
    """Positions first, as many as the inputs have."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x.transpose(0, 1)).tanh().mean(0)


class Routed(nn.Module):
    """Two experts; each token goes to the one that its first number says."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])

    def forward(self, x):
        flat = x.flatten(0, 1)
        out = flat.new_zeros(len(flat), 3)
        for sign, expert in zip((1, -1), self.experts, strict=True):
            index = (sign * flat[:, 0] > 0).nonzero()[:, 0]
            out = out.index_add(0, index, expert(flat[index]).tanh())
        return out.unflatten(0, x.shape[:2]).mean(1)


def assert_gradients_are_those_of_autograd(net, batches):
    recorder = Recorder()
    weights = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
    observe(net, batches, F.cross_entropy, recorder, weights, num_grads=sum(len(y) for _, y in batches))
    for name, weight in weights.items():
        losses = [F.cross_entropy(net(x[s : s + 1]), y[s : s + 1]) for x, y in batches for s in range(len(y))]
        expected = [torch.autograd.grad(loss, weight, allow_unused=True)[0] for loss in losses]
        expected = torch.stack([torch.zeros_like(weight) if g is None else g for g in expected])
        torch.testing.assert_close(recorder.gradients(name), expected)


def test_whose_rows_they_are_is_told_anew_for_other_lengths(generator):
    """At one position both orders are the same."""
    draw = lambda n: torch.randn(6, n, 4, dtype=torch.float64, generator=generator)
    batches = [(draw(n), torch.randint(0, 3, (6,), generator=generator)) for n in (1, 1, 4, 1, 4, 5)]
    assert_gradients_are_those_of_autograd(SequenceFirst().double(), batches)


def of_lengths(lengths, generator):
    draw = lambda n: torch.randn(6, n, 4, dtype=torch.float64, generator=generator)
    return [(draw(n), torch.randint(0, 3, (6,), generator=generator)) for n in lengths]


def test_ever_fewer_of_the_lengths_are_verified(generator, monkeypatch):
    """Of ten lengths those that are the first, the second, the fourth and the eighth."""
    verified = []
    verify = Verifier.verify
    monkeypatch.setattr(Verifier, "verify", lambda self, chunk: verified.append(chunk.inputs) or verify(self, chunk))
    batches = of_lengths((3, 2, 4, 6, 5, 7, 6, 8, 9, 1, 10, 3), generator)
    assert_gradients_are_those_of_autograd(SequenceFirst().double(), batches)
    assert [x.shape[1] for x in verified] == [3, 2, 6, 9]


class MixedWhereLong(nn.Linear):
    """Samples influence each other from five positions on."""

    def forward(self, x):
        h = super().forward(x).tanh().mean(1)
        return h + h.mean(0) if x.shape[1] > 4 else h


class SharedWhereLong(nn.Linear):
    """The same, but for gradients, whose rows tell nothing of it."""

    def forward(self, x):
        h = super().forward(x).tanh().mean(1)
        return (h + h.mean(0).detach()).sin() if x.shape[1] > 4 else h.sin()


class Windows(nn.Module):
    """Windows of four are cut from all tokens, across samples where these are not multiples of four."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.q(x).flatten(0, 1)
        h = F.pad(h, (0, 0, 0, -len(h) % 4)).unflatten(0, (-1, 4))
        h = (h + (h @ h.mT / 2).softmax(-1) @ h).flatten(0, 1)
        return self.o(h[: x.shape[0] * x.shape[1]].unflatten(0, x.shape[:2]).tanh()).mean(1)


class PositionsFirstWhereLong(nn.Linear):
    """In another order from five positions on."""

    def forward(self, x):
        return (
            super().forward(x.transpose(0, 1)).tanh().mean(0) if x.shape[1] > 4 else super().forward(x).tanh().mean(1)
        )


class LateCounts(nn.Module):
    """Positions first in a product without gradients, of which no order can be told, up to four positions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        late = (torch.arange(x.shape[1]) >= 4).to(x)[:, None, None]
        return self.a(x).tanh().mean(1) + (self.b(x.transpose(0, 1)).tanh() * late).sum(0)


@pytest.mark.parametrize("lengths", [(3, 2, 6, 5), (3, 2, 6, 4, 5, 7, 8, 6), (4, 8, 6, 7, 5), (3, 2, 7, 1, 5)])
@pytest.mark.parametrize("kind", [MixedWhereLong, SharedWhereLong, Windows, PositionsFirstWhereLong, LateCounts])
def test_what_lengths_change_is_noticed_at_those_that_are_not_verified(kind, lengths, generator):
    """Among them as many positions as samples, where the shape of the inputs does not tell which are which."""
    net = kind(4, 3) if issubclass(kind, nn.Linear) else kind()
    assert_gradients_are_those_of_autograd(net.double(), of_lengths(lengths, generator))


class Selected(nn.Module):
    """Tokens that begin with a positive number go through `w`, the rows of all samples one after the other."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        flat = x.flatten(0, 1)
        index = (flat[:, 0] > 0).nonzero()[:, 0]
        out = flat.new_zeros(len(flat), 3).index_add(0, index, self.w(flat[index]).tanh())
        return out.unflatten(0, x.shape[:2]).sum(1) + self.v(x).tanh().mean(1)


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")
@pytest.mark.parametrize("counts", [(3, 0, 0, 1, 1, 1), (2, 0, 2, 0, 1, 1), (1, 1, 1, 3, 0, 0), (2, 2, 2, 0, 0, 0)])
def test_as_many_rows_as_samples_need_not_be_one_of_each(counts, generator):
    """At a third length, after two that have one row of each sample; counts say how many the samples have there."""
    batches = of_lengths((3, 2, 4), generator)
    for (x, _), of_each in zip(batches, ((1,) * 6, (1,) * 6, counts), strict=True):
        chosen = torch.arange(x.shape[1]) < torch.tensor(of_each)[:, None]
        x[..., 0] = torch.where(chosen, x[..., 0].abs(), -x[..., 0].abs())
    assert_gradients_are_those_of_autograd(Selected().double(), batches)


class NothingToChoose(nn.Module):
    """The first position of `q` makes no difference but by rounding, as the query of a first token."""

    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        h, first = self.q(x), (torch.arange(x.shape[1]) == 0).to(x)[:, None]
        nothing = (0.1 * h - 0.3 * h + 0.2 * h) * first
        return (self.v(x) + nothing + h * (1 - first)).tanh().mean(1)


def test_rounding_belongs_to_no_other_sample(generator):
    net = NothingToChoose().eval()
    weights = {"q.weight": net.q.weight, "v.weight": net.v.weight}
    x, y = torch.randn(6, 4, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    factors, _, _ = observer(net, weights).factors(Chunk(x, y, 6), 6)
    assert factors.keys() == weights.keys()


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")
def test_whose_rows_they_are_is_told_anew_where_the_data_routes_them(generator):
    """The experts have as many rows in the third batch as in the others, but not two of each sample."""
    batches = []
    for even in (True, True, False, True, True, False):
        x = torch.randn(6, 4, 4, dtype=torch.float64, generator=generator)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(6, 4).clone()
        if not even:
            signs[0], signs[1] = 1.0, -1.0
        x[..., 0] = x[..., 0].abs() * signs
        batches.append((x, torch.randint(0, 3, (6,), generator=generator)))
    assert_gradients_are_those_of_autograd(Routed().double(), batches)


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")
def test_a_model_of_single_samples_is_run_on_these(generator):
    class Single(nn.Linear):
        def forward(self, x):
            if len(x) > 1:
                raise ValueError("one at a time, please")
            return super().forward(x)

    x, y = torch.randn(5, 4, dtype=torch.float64, generator=generator), torch.randint(0, 3, (5,), generator=generator)
    assert_gradients_are_those_of_autograd(nn.Sequential(Single(4, 3).double()), [(x, y)])


def test_labels_are_drawn_once_though_factors_fail_afterwards(generator):
    """A loss that samples do not have of their own is found after the labels were drawn."""
    net, drawn = nn.Linear(4, 3).double(), []
    x, y = torch.randn(5, 4, dtype=torch.float64, generator=generator), torch.randint(0, 3, (5,), generator=generator)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x), torch.zeros(3)

    likelihood = lambda outputs, generator: (drawn.append(1), outputs[0].argmax(1))[1]
    loss = lambda outputs, targets: F.cross_entropy(outputs[0] + outputs[1], targets)
    recorder = Recorder()
    weights = {"net.weight": net.weight}
    observe(Pair(), [(x, y)], loss, recorder, weights, num_grads=5, labels="model", likelihood=likelihood)
    assert len(drawn) == 2  # the second is compared with the first, once
    assert recorder.gradients("net.weight").shape == (5, 3, 4)
