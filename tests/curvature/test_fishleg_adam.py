"""FishLeg by Adam, with and without probes, against dense float64."""

import copy

import pytest
import torch
from oracles import batches, kronecker_matrix, trained
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner, prune
from fishleg_ext.curvature import Adam, CurvatureError, FishLeg
from fishleg_ext.curvature.fishleg_adam import AdamFactors
from fishleg_ext.curvature.kronecker import Factors
from fishleg_ext.curvature.learned_factors import DenseGradients
from fishleg_ext.observation.observe import observe
from fishleg_ext.observation.types import Observation

DAMPING = 0.1
SETTINGS = {
    "exact": {},
    "log-determinant": {"loss": "log_determinant"},
    "gaussian": {"probes": "gaussian", "num_probes": 64},
    "gradients": {"probes": "gradients", "num_probes": 16},
    "gaussian, not preconditioned": {"probes": "gaussian", "num_probes": 64, "preconditioned": False},
}


@pytest.fixture
def grads(generator):
    """Per-sample gradients [256, 4, 6] of a Kronecker-factored Fisher matrix."""
    mix = [torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (4, 6)]
    return mix[0] @ torch.randn(256, 4, 6, dtype=torch.float64, generator=generator) @ mix[1] / 5


def start(apart):
    """Far from any optimum, and not symmetric in rows or columns."""
    row = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    return Factors(row if apart else row.diag(), torch.linspace(1, 3, 6, dtype=torch.float64).diag())


def fisher_of(grads):
    g = grads.flatten(1)
    return g.mT @ g / len(g) + DAMPING * torch.eye(g.shape[1], dtype=g.dtype)


def auxiliary(q, fisher):
    return float(0.5 * (q @ fisher @ q).trace() - q.trace())


def log_determinant(q, fisher):
    return float(0.5 * (q @ fisher).trace() - 0.5 * torch.logdet(q))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("loss", "dense"), [("auxiliary", auxiliary), ("log_determinant", log_determinant)])
def test_the_loss_is_that_of_the_dense_matrix(loss, dense, apart, grads):
    learner = AdamFactors(Adam(loss=loss, steps=50), DAMPING, start(apart), 0)
    for _ in range(3):  # with a scale that is learned
        q = kronecker_matrix(*learner.factors())
        assert float(learner.learn(DenseGradients(grads))) == pytest.approx(dense(q, fisher_of(grads)), rel=1e-9)
    assert learner.scale.unique().numel() > 1


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_way_goes_down(setting, apart, grads):
    """Of the distance to the least loss of any Q most is gone, from a start at which the gradient is large."""
    learner = AdamFactors(Adam(learning_rate=0.05, steps=400, **SETTINGS[setting]), DAMPING, start(apart), 0)
    fisher = fisher_of(grads)
    dense = log_determinant if setting == "log-determinant" else auxiliary
    least = dense(torch.linalg.inv(fisher), fisher)
    before = dense(kronecker_matrix(*learner.factors()), fisher)
    for step in range(400):
        learner.learn(DenseGradients(grads.roll(16 * step, 0)[:64]))
    after = dense(kronecker_matrix(*learner.factors()), fisher)
    assert least < after < before
    assert (after - least) < 0.5 * (before - least)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_step_of_probes_is_that_of_the_papers(preconditioned, grads, monkeypatch):
    """<s, Q u> / |u| |v|, s = Q r or r a constant, on the dense matrices and by autograd: value and gradient."""
    stepped = []
    step = AdamFactors._step
    monkeypatch.setattr(
        AdamFactors, "_step", lambda self, loss: (stepped.append(float(loss.detach())), step(self, loss))
    )
    factors = start(False)
    learner = AdamFactors(
        Adam(probes="gaussian", num_probes=3, preconditioned=preconditioned, learning_rate=1e-6), DAMPING, factors, 0
    )
    u, v = learner.probe()
    fisher = fisher_of(grads)
    fisher_v = (v.flatten(1) @ fisher - DAMPING * v.flatten(1)).reshape(v.shape)
    roots = [x.clone().requires_grad_() for x in (learner.row, learner.col, learner.scale)]
    q = kronecker_matrix(roots[0].mT @ roots[0], roots[1] @ roots[1].mT, roots[2])
    flat = u.flatten(1)
    residual = (flat @ q @ fisher - flat).detach()
    s = residual @ q.detach() if preconditioned else residual
    norms = flat.norm(dim=1) * (flat @ q).detach().norm(dim=1)
    expected = ((s * (flat @ q)).sum(1) / norms).mean()
    expected.backward()
    before = [x.clone() for x in (learner.row, learner.col, learner.scale)]
    learner.follow(u, v, fisher_v)
    assert stepped == [pytest.approx(float(expected.detach()), rel=1e-9)]
    for root, old, new in zip(roots, before, (learner.row, learner.col, learner.scale), strict=True):
        significant = root.grad.abs() > 1e-6 * root.grad.abs().max()
        assert torch.equal((new - old).sign()[significant], -root.grad.sign()[significant])


def test_memory_is_counted(grads):
    curvature = FishLeg(0.1, batch_size=16, adam=Adam(warm_up=16))
    curvature = curvature.start({"w": grads[0]})
    curvature.update(Observation(64, gradients={"w": grads[:64]}))
    learner = curvature._descended["w"]
    moments = [x for state in learner._optimizer.state.values() for x in state.values() if x.numel() > 1]
    roots = [learner.row, learner.col, learner.scale]
    held = 8 * sum(x.numel() for x in (*roots, *(root.grad for root in roots), *moments))
    plain = FishLeg(0.1, batch_size=16).state_bytes("w", grads[0], 64)
    assert curvature.recipe.state_bytes("w", grads[0], 64) - plain == held


def test_what_adam_makes_infinite_is_named(grads):
    curvature = FishLeg(0.1, batch_size=16, adam=Adam(warm_up=16))
    curvature = curvature.start({"w": grads[0]})
    curvature.update(Observation(16, gradients={"w": grads[:16]}))
    with pytest.raises(CurvatureError, match="w: Adam's loss is not finite"):
        curvature.update(Observation(16, gradients={"w": grads[:16] * torch.inf}))


def test_nothing_changes_after_the_last_step(grads):
    learner = AdamFactors(Adam(steps=2), DAMPING, start(False), 0)
    seen = []
    for _ in range(4):
        learner.learn(DenseGradients(grads))
        seen.append(kronecker_matrix(*learner.factors()))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[3])


def test_roots_of_what_rounding_made_indefinite():
    col = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-7]])
    learner = AdamFactors(Adam(), DAMPING, Factors(torch.ones(2), col), 0)
    torch.testing.assert_close(learner.factors().col, col)
    assert torch.linalg.slogdet(learner.col).logabsdet.isfinite()


# Products with the Fisher matrix of a network.


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()


class Products:
    observes = frozenset({"gradients", "fisher_products"})

    def __init__(self, v):
        self.v, self.total, self.count = v, None, 0

    def update(self, observation):
        product = observation.fisher_product(self.v)
        flat = torch.cat([product[name].flatten() for name in self.v]) * observation.count
        self.total = flat if self.total is None else self.total + flat
        self.count += observation.count


def fisher_by_jacobians(net, weights, inputs, likelihood):
    """The mean over samples of J^T H J, one sample at a time, H of the mean over its outputs' terms by autograd."""
    total = 0.0
    for x in inputs:

        def outputs(*values, x=x):
            return torch.func.functional_call(net, dict(zip(weights, values, strict=True)), (x[None],))[0]

        jacobian = torch.autograd.functional.jacobian(outputs, tuple(weights.values()))
        jacobian = torch.cat([j.flatten(1) for j in jacobian], 1)
        y = outputs(*weights.values()).detach()
        if likelihood == "categorical":
            h = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, torch.tensor(0)), y)
        elif likelihood == "gaussian":
            h = torch.autograd.functional.hessian(lambda z: F.mse_loss(z, torch.zeros_like(z)), y)
        else:
            h = torch.autograd.functional.hessian(lambda z: F.binary_cross_entropy_with_logits(z, 0 * z.detach()), y)
        total = total + jacobian.mT @ h @ jacobian
    return total / len(inputs)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_fisher_products_are_those_of_the_jacobians(likelihood, network, generator):
    x = torch.randn(11, 1, 3, 3, dtype=torch.float64, generator=generator)
    y = torch.zeros(11, dtype=torch.long) if likelihood == "categorical" else torch.zeros(11, 3, dtype=torch.float64)
    loss = {
        "categorical": F.cross_entropy,
        "gaussian": F.mse_loss,
        "bernoulli": F.binary_cross_entropy_with_logits,
    }[likelihood]
    weights = {n: p for n, p in network.named_parameters() if p.dim() > 1}
    v = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in weights.items()}
    products = Products(v)
    chunk = 3 * sum(p.numel() for p in weights.values()) * 8 * 4  # four gradients
    observe(network, batches(x, y, 5), loss, products, weights, num_grads=11, likelihood=likelihood, chunk_bytes=chunk)
    fisher = fisher_by_jacobians(network, weights, x, likelihood)
    flat = torch.cat([part.flatten() for part in v.values()])
    torch.testing.assert_close(products.total / products.count, fisher @ flat)


def test_fisher_products_need_a_named_likelihood(network):
    x, y = torch.zeros(2, 1, 3, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    weights = {n: p for n, p in network.named_parameters() if p.dim() > 1}
    with pytest.raises(ValueError, match="likelihood= for the true Fisher matrix"):
        observe(network, [(x, y)], F.mse_loss, Products({}), weights)
    with pytest.raises(ValueError, match="categorical, gaussian, bernoulli for products with the Fisher matrix"):
        observe(network, [(x, y)], F.mse_loss, Products({}), weights, likelihood=lambda outputs, _: outputs)


# Pruning with it.


@pytest.fixture
def problem(generator):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(512, 10, generator=generator)
    y = (x @ torch.randn(10, 3, generator=generator)).argmax(1)
    return trained(net, x, y), batches(x, y, 64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "log_determinant"},
        {"probes": "gradients", "num_probes": 4},
        {"probes": "gaussian", "products": "gauss_newton"},
    ],
)
def test_pruning_by_it_is_better_than_by_magnitude_and_a_saved_estimate_prunes_alike(options, problem, tmp_path):
    net, data = problem
    curvature = lambda: FishLeg(1e-4, batch_size=32, adam=Adam(steps=8, warm_up=256, **options))
    models = [copy.deepcopy(net) for _ in range(3)]
    pruners = [Pruner(model, curvature=curvature(), num_grads=512, progress=False) for model in models[:2]]
    pruners[0].estimate(data, F.cross_entropy)
    torch.save(pruners[0].state_dict(), tmp_path / "state.pt")
    pruners[1].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for pruner in pruners:
        pruner.prune_to(0.5)
    prune(models[2], None, sparsity=0.5, curvature="identity", progress=False)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    losses = [float(F.cross_entropy(model(x), y).detach()) for model in models]
    assert losses[0] < losses[2]


def test_gauss_newton_steps_lower_the_loss_on_the_networks_own_fisher_matrix(problem):
    """From little warm-up, against the dense generalised Gauss-Newton matrix of each layer."""
    net, data = problem
    net = net.double()
    data = [(x.double(), y) for x, y in data]
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    x = torch.cat([x for x, _ in data])
    fisher = fisher_by_jacobians(net, weights, x, "categorical")
    losses = []
    for steps in (1, 48):
        adam = Adam(0.02, steps, warm_up=32, probes="gaussian", num_probes=4, products="gauss_newton")
        curvature = FishLeg(0.1, batch_size=32, adam=adam)
        curvature = curvature.start({name: p.detach() for name, p in weights.items()})
        for seed in range(6):
            observe(net, data, F.cross_entropy, curvature, weights, num_grads=512, labels="model", seed=seed)
        begin, loss = 0, 0.0
        for name, p in weights.items():
            part = slice(begin, begin := begin + p.numel())
            damped = fisher[part, part] + 0.1 * torch.eye(p.numel(), dtype=p.dtype)
            loss += auxiliary(kronecker_matrix(*curvature.factors(name)), damped)
        losses.append(loss)
        assert not curvature.factors("0.weight").col.requires_grad
    assert losses[1] < losses[0] - 0.01 * abs(losses[0])


def test_learning_goes_on_from_a_saved_state(grads):
    """Moments, steps and the generator of probes are in it."""
    adam = Adam(steps=20, warm_up=64, probes="gaussian")
    make = lambda: FishLeg(1e-2, batch_size=32, adam=adam).start({"w": grads[0]})
    feed = lambda curvature, part: curvature.update(Observation(64, gradients={"w": grads[part : part + 64]}))
    one, other = make(), make()
    feed(one, 0), feed(one, 64)
    other.load_state_dict(one.state_dict())
    for curvature in (one, other):
        feed(curvature, 128)
    for a, b in zip(one.factors("w"), other.factors("w"), strict=True):
        assert torch.equal(a, b)
    plain = FishLeg(1e-2, batch_size=32)
    plain = plain.start({"w": grads[0]})
    with pytest.raises(ValueError, match="FishLeg without adam, got one with it"):
        plain.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "other"}, "expected loss to be one of auxiliary, log_determinant, got 'other'"),
        ({"probes": "other"}, "expected probes to be one of None, gaussian, gradients"),
        ({"products": "other"}, "expected products to be one of"),
        ({"steps": 0}, "expected steps >= 1, got 0"),
        ({"learning_rate": 0.0}, "expected learning_rate > 0, got 0.0"),
        ({"probes": "gaussian", "loss": "log_determinant"}, "expected loss='auxiliary' with probes"),
        ({"products": "gauss_newton"}, "expected probes='gaussian' with Gauss-Newton products, got None"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adam(**options)


def test_it_does_not_go_with_carrying_over():
    with pytest.raises(ValueError, match="carry_over=64 cannot be combined with adam"):
        FishLeg(carry_over=64, adam=Adam())
