"""What pruning block by block is predicted to take, and that predicting leaves all as it was."""

import copy
import subprocess
import sys

import pytest
import torch
from oracles import with_estimate
from small import assert_same, snapshot
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.curvature import CurvatureError, Kronecker, Layerwise
from fishleg_ext.curvature.layerwise import LayerwiseEstimate

WIDTH = 12


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def network(inner=(16, 16, 8)):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), nn.Sequential(*map(Residual, inner)), nn.Linear(WIDTH, 3))


def batches(count=96):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return list(zip(x.split(16), torch.randint(3, (count,), generator=generator).split(16), strict=True))


SETTINGS = {"block_by_block": True, "sparsity": 0.5, "num_grads": 96, "progress": False}


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "layerwise"},
        {"curvature": "layerwise", "saliency": "fixed_order", "recomputations": 3},
        {"curvature": Layerwise(inputs="dense"), "offload": True},
        {"curvature": "kronecker", "max_memory": 40_000},
        {"curvature": "fishleg", "block_gradients": "loss", "damping": 1e-3},
        {"curvature": Kronecker(labels="data"), "block_gradients": "loss", "scope": "layer"},
        {"curvature": "layerwise", "sparsity": None, "pattern": "2:4"},
        {"curvature": "layerwise", "sparsity": None, "scope": {"1.0.up.weight": 0.5, "1.2.up.weight": 0.75}},
        {"curvature": "layerwise", "allocation": "kronecker"},
        {"curvature": "kronecker", "saliency": "fixed_order", "allocation": "diagonal", "block_gradients": "loss"},
    ],
    ids=str,
)
def test_a_plan_names_every_block_and_changes_nothing(options):
    model, data = network(), batches()
    before = snapshot(model)
    plan = fishleg_ext.plan(model, iter(data), **SETTINGS | options)
    assert_same(before, snapshot(model))
    assert [block.name for block in plan.blocks] == ["1.0", "1.1", "1.2"]
    assert [block.weights for block in plan.blocks] == [2 * WIDTH * inner for inner in (16, 16, 8)]
    assert all(block.observation > 0 and block.curvature > 0 and block.pruning >= 0 for block in plan.blocks)
    alike = plan.blocks[0].observation == plan.blocks[1].observation  # one trial for both
    assert alike == ("scope" not in options or options["scope"] == "layer")
    rounds = options.get("recomputations", 1)
    once = plan.start + sum(block.observation + block.pruning + block.running for block in plan.blocks)
    assert plan.seconds == pytest.approx(rounds * once)
    table = plan.table()
    assert all(word in table for word in ("1.0", "384", "observe, s", "at the highest"))
    fishleg_ext.prune(model, data, **SETTINGS | options)  # what was planned goes through


def test_hidden_states_are_counted_for_all_samples():
    model, data = network(), batches()
    bytes_of_one = 4 * WIDTH
    forward = fishleg_ext.plan(model, data, curvature="layerwise", **SETTINGS).hidden
    of_loss = fishleg_ext.plan(model, data, curvature="kronecker", block_gradients="loss", **SETTINGS).hidden
    assert forward >= 96 * bytes_of_one
    # The inputs of three blocks and the gradients by their outputs, in the place of the one.
    assert of_loss - forward == pytest.approx(96 * bytes_of_one * 5, rel=0.01)
    half = fishleg_ext.plan(model, data, curvature="layerwise", **SETTINGS | {"num_grads": 48}).hidden
    assert half == pytest.approx(forward / 2, rel=0.01)


class Failing(LayerwiseEstimate):
    def blocks(self, name):
        raise CurvatureError("no blocks")


def test_a_trial_that_fails_leaves_all_as_it_was():
    model, data = network(), batches()
    before = snapshot(model)
    with pytest.raises(CurvatureError, match="no blocks"):
        fishleg_ext.plan(model, data, curvature=with_estimate(Layerwise, Failing)(), **SETTINGS)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_by_block": False}, "a plan is of pruning block by block"),
        ({"num_grads": 0}, "num_grads"),
        ({"block_by_block": "0"}, "expected the name of an nn.ModuleList"),
    ],
)
def test_what_cannot_be_planned_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        fishleg_ext.plan(network(), batches(), **SETTINGS | {"curvature": "layerwise"} | options)


def test_the_command_line_prints_the_plan_and_prunes_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model(): return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))\n"
        "def data(): return [(torch.randn(20, 6), torch.randint(6, (20,)))]\n"
    )
    command = [sys.executable, "-m", "fishleg_ext.cli", "prune", "mine:model", "mine:data"]
    command += ["--sparsity", "0.5", "--curvature", "layerwise", "--num-grads", "20", "--dry-run", "--block-by-block"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "curvature, MiB" in done.stdout
    assert "MiB at the highest" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mine.py"]
    without = subprocess.run(command[:-2], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert without.returncode == 2
    assert "--out is required, the file that the pruned model is written to" in without.stderr
    of = subprocess.run(
        [*command, "--block-by-block-of", "none"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert of.returncode == 2
    assert "expected the name of an nn.ModuleList" in of.stderr


def test_a_model_is_pruned_as_if_it_had_not_been_planned():
    data = batches()
    planned, other = network(), network()
    fishleg_ext.plan(planned, data, curvature="kronecker", **SETTINGS)
    for model in (planned, other):
        fishleg_ext.prune(model, copy.deepcopy(data), F.cross_entropy, curvature="kronecker", **SETTINGS)
    assert all(torch.equal(x, y) for x, y in zip(planned.parameters(), other.parameters(), strict=True))
