"""The Python side of eliminations too large for registers, over stand-ins of its CUDA kernels in PyTorch."""

from types import SimpleNamespace

import pytest
import torch
from oracles import cholesky_inverse

from fishleg_ext.cuda import obs as launcher
from fishleg_ext.reference import obs as reference

LARGEST = 6


def eliminate(weight, inverse, alive, group, n, m, stop, dead_first, rank, cost):
    """In registers: the specification."""
    assert weight.shape[1] <= LARGEST
    options = {"group": group, "n": n, "m": m, "stop": None if stop == torch.inf else stop, "dead_first": dead_first}
    for target, result in zip((rank, cost), reference.obs_eliminate(weight, inverse, alive, **options), strict=True):
        target.copy_(result)


def eliminate_panel(
    inverse, alive, group, n, m, stop, dead_first, dead, weight, variance, pending, following, columns, rank, cost
):
    """One block after the other, as many steps as there is room for columns."""
    columns.zero_()
    for k, block in enumerate(inverse.expand(len(weight), -1, -1)):
        position = torch.arange(len(block))
        read = (alive[k] | dead_first) & (variance[k, position, position % group] != 0)  # 0 once it is eliminated
        left = torch.where(read[:, None] & read, block, 0)
        tiles = left.unflatten(1, (-1, group)).unflatten(0, (-1, group)).diagonal(dim1=0, dim2=2)
        torch.testing.assert_close(variance[k].view(-1, group, group).tril(), tiles.permute(2, 0, 1).tril())
        step = 0
        while step + (1 if dead else group) <= columns.shape[1]:
            if dead:
                able = (~alive[k] & (left.diagonal() > 0)).nonzero()[:, 0]
                members = able[:1]
            else:
                joint = reference.group_costs(weight[k : k + 1], left[None], pending[k : k + 1], group, n, m)[0]
                best, first = joint.min(0)
                together = torch.arange(first * group, (first + 1) * group)
                members = together[pending[k, together]] if best <= stop and best < torch.inf else together[:0]
            if not len(members):
                break
            for q in members:
                if not dead:
                    rank[k, q], cost[k, q], pending[k, q] = following[k] + step, best / len(members), False
                root = left[q, q].sqrt() if left[q, q] > 0 else torch.inf
                columns[k, step] = left[q] / root
                weight[k] -= columns[k, step] * (weight[k, q] / root)
                left = left - columns[k, step][:, None] * columns[k, step]
                left[q], left[:, q] = 0, 0
                step += 1
        tiles = left.unflatten(1, (-1, group)).unflatten(0, (-1, group)).diagonal(dim1=0, dim2=2)
        variance[k] = tiles.permute(2, 0, 1).reshape(-1, group)
        following[k] += 0 if dead else step


@pytest.fixture
def kernels(monkeypatch):
    """The stand-ins in their places; what sizes each was called with."""
    sizes = {"registers": [], "panels": []}

    def registers(*arguments):
        sizes["registers"].append(arguments[0].shape[1])
        eliminate(*arguments)

    def panels(*arguments):
        sizes["panels"].append(arguments[1].shape[1])
        eliminate_panel(*arguments)

    ops = SimpleNamespace(obs_eliminate_out=registers, obs_eliminate_panel_out=panels)
    monkeypatch.setattr(torch.ops, "fishleg_ext_cuda", ops, raising=False)
    monkeypatch.setattr(launcher, "largest_to_eliminate", lambda dtype, group: LARGEST)
    monkeypatch.setattr(launcher, "PANEL", 4)
    return sizes


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dead_first": True},
        {"stop": 0.3},
        {"n": 2, "m": 4},
        {"n": 1, "m": 8, "dead_first": True},
        {"group": 4},
        {"group": 4, "dead_first": True, "stop": 0.8},
    ],
    ids=str,
)
def test_what_is_left_is_gathered_and_goes_on(options, density, shared, kernels, fisher, generator):
    k, b = 5, 48
    inverse = cholesky_inverse(fisher(k, b))[: 1 if shared else k]
    weight = torch.randn(k, b, dtype=torch.float64, generator=generator)
    alive = torch.rand(k, b, generator=generator) < density
    alive[3, 8:] = False  # a block with fewer than others
    got = launcher.obs_eliminate(weight, inverse, alive, **options)
    expected = reference.obs_eliminate(weight, inverse, alive, **options)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    assert len(set(kernels["panels"])) > 1
    if not ({"stop", "m"} & set(options)):
        assert len(set(kernels["panels"])) >= 4
    if not options:
        assert kernels["registers"]


def test_of_equal_costs_the_first_is_eliminated_first(kernels):
    """Also among weights that were gathered."""
    inverse = torch.eye(40, dtype=torch.float64)[None]
    weight, alive = torch.ones(2, 40, dtype=torch.float64), torch.ones(2, 40, dtype=torch.bool)
    alive[1, ::3] = False
    rank, _ = launcher.obs_eliminate(weight, inverse, alive)
    assert torch.equal(rank[0], torch.arange(40, dtype=torch.int32))
    assert rank[1][alive[1]].tolist() == list(range(int(alive[1].sum())))
    assert len(kernels["panels"]) > 3


def test_weights_that_nothing_compensates_crowd_out_no_others(kernels, fisher, generator):
    inverse = cholesky_inverse(fisher(2, 40))
    inverse[0, :20] = inverse[0, :, :20] = 0  # of no variance: never eliminated
    weight, alive = torch.randn(2, 40, dtype=torch.float64, generator=generator), torch.ones(2, 40, dtype=torch.bool)
    got = launcher.obs_eliminate(weight, inverse, alive)
    expected = reference.obs_eliminate(weight, inverse, alive)
    assert torch.equal(got[0], expected[0])
    assert (got[0][0, 20:] < 40).all()
