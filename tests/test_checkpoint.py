"""Files: whole or not there, given back to the bit, read by others, and a training run that is killed."""

import collections
import copy
import json
import subprocess
import sys

import pytest
import torch
from host import ROOT
from oracles import batches
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext import checkpoint
from fishleg_ext.common import files
from fishleg_ext.curvature import FishLeg, Kronecker
from fishleg_ext.schedule import Linear


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.fixture
def data(generator):
    x = torch.randn(64, 8, generator=generator)
    return batches(x, x[:, :3].argmax(1))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a)


def test_what_is_saved_is_loaded(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    content = {
        "tensors": [shared, shared.mT, torch.zeros(0, 3), torch.tensor(1.5, dtype=torch.bfloat16), shared],
        "numbers": (1, 2.5, float("inf"), float("nan"), True, None),
        "state": {0: {"step": torch.tensor(3, dtype=torch.int64)}, 7: {}, "a.b": {"c": "text"}},
        "a": {"b.c": torch.ones(1), "b": {"c": torch.zeros(1)}},
        "mask": torch.tensor([True, False]),
    }
    path = tmp_path / "file.pt"
    for _ in range(2):  # over the older one
        checkpoint.save(content, path)
    assert equal(content, checkpoint.load(path))
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved_leaves_the_older_file(tmp_path):
    path = tmp_path / "file.pt"
    checkpoint.save({"a": 1}, path)
    with pytest.raises(TypeError, match=r"got function in a\.1\.f"):
        checkpoint.save({"a": [1, {"f": checkpoint.save}]}, path)
    with pytest.raises(FileNotFoundError):
        checkpoint.save({"a": 1}, tmp_path / "nowhere" / "file.pt")
    assert checkpoint.load(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    checkpoint.save({"a": torch.ones(3)}, path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"a": torch.zeros(3)}, path)
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "file.pt"
    checkpoint.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-1], whole[:10], b"", b"text\n" * 100):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"file.pt is truncated, or no"):
            checkpoint.load(path)
    with pytest.raises(OSError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere.pt")


def test_a_file_that_would_run_code_does_not(tmp_path):
    torch.save({"a": nn.Linear(2, 2)}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file.pt is truncated, or no file of torch.save that holds tensors alone"):
        checkpoint.load(tmp_path / "file.pt")


def test_a_state_in_safetensors_as_version_0_1_wrote_it_loads(tmp_path):
    import safetensors.torch

    tensors = {"pruner.masks.w": torch.arange(6).reshape(2, 3), "scale": torch.tensor(2.0)}
    structure = {
        "dict": [
            ["pruner", {"dict": [["masks", {"dict": [["w", {"tensor": "pruner.masks.w"}]]}], ["step", 3]]}],
            ["again", [{"tensor": "scale"}, {"tuple": [1, None, "x"]}]],
            [7, {"tensor": "scale"}],
        ]
    }
    metadata = {"fishleg_ext.structure": json.dumps(structure)}
    safetensors.torch.save_file(tensors, tmp_path / "run.safetensors", metadata)
    loaded = checkpoint.load(tmp_path / "run.safetensors")
    assert torch.equal(loaded["pruner"]["masks"]["w"], tensors["pruner.masks.w"])
    assert loaded["pruner"]["step"] == 3
    assert loaded["again"] == [torch.tensor(2.0), (1, None, "x")]
    assert loaded[7] is loaded["again"][0]


def test_a_state_is_not_written_as_safetensors(tmp_path):
    with pytest.raises(ValueError, match="expected another suffix than that of .*safetensors hold tensors by name"):
        checkpoint.save({"a": torch.ones(2)}, tmp_path / "run.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_safetensors_files_are_their_tensors(tmp_path, net):
    import safetensors.torch

    safetensors.torch.save_file(net.state_dict(), tmp_path / "model.safetensors")
    assert equal(dict(net.state_dict()), checkpoint.load(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"curvature": "block"},
        lambda: {"curvature": "identity"},
        lambda: {"curvature": "diagonal"},
        lambda: {"curvature": "low_rank"},
        lambda: {"curvature": "layerwise"},
        lambda: {"curvature": Kronecker(factors="gradients")},
        lambda: {"curvature": "fishleg", "refine_grads": 16},
        lambda: {"curvature": FishLeg(carry_over=64, structure={"0.weight": "block"})},
        lambda: {"curvature": "layerwise", "allocation": "fishleg", "scope": None},
        lambda: {"curvature": "block", "first_order": True},
        lambda: {"curvature": "block", "max_memory": 300_000},
    ],
)
def test_a_pruner_goes_on_from_a_file_as_if_nothing_had_been(net, data, tmp_path, make):
    """After every step, in a new pruner of a new model, to the bit; also between estimate and prune_to."""
    options = {"num_grads": 32, "progress": False, "data": data, "loss_fn": F.cross_entropy}
    options["schedule"] = Linear(final_sparsity=0.8, end=3)
    start = net.state_dict()
    fresh = lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    path = tmp_path / "file.pt"

    def run(interrupted):
        model = fresh()
        model.load_state_dict(start)
        pruner = fishleg_ext.Pruner(model, **options, **make())
        for _ in range(4):
            pruner.step()
            if interrupted:
                checkpoint.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, path)
                state = checkpoint.load(path)
                model = fresh()
                model.load_state_dict(state["model"])
                pruner = fishleg_ext.Pruner(model, **options, **make())
                pruner.load_state_dict(state["pruner"])
        if "max_memory" not in make():
            pruner.estimate()
            if interrupted:
                checkpoint.save(pruner.state_dict(), path)
                pruner = fishleg_ext.Pruner(model, **options, **make())
                pruner.load_state_dict(checkpoint.load(path))
            pruner.prune_to(0.9)
        return model.state_dict(), pruner.masks, [entry["predicted_loss_increase"] for entry in pruner.history]

    assert equal(run(False), run(True))


def test_going_back_forgets_what_was_learned_since(net, data):
    """Also where estimates are carried over."""
    options = {"num_grads": 32, "progress": False, "data": data, "loss_fn": F.cross_entropy, "curvature": "fishleg"}
    pruner = fishleg_ext.Pruner(net, schedule=lambda step: 0.2 * (step + 1), **options)
    start, state = {name: tensor.clone() for name, tensor in net.state_dict().items()}, pruner.state_dict()
    pruner.step()
    first = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruner.step()
    net.load_state_dict(start)
    pruner.load_state_dict(state)
    pruner.step()
    assert equal(first, dict(net.state_dict()))


def test_parts_of_a_split_estimate_are_all_made_anew(net, data):
    options = {"num_grads": 64, "progress": False, "max_memory": 150_000}
    made = []
    for carry_over in (0, 64):
        model = copy.deepcopy(net)
        pruner = fishleg_ext.Pruner(model, curvature=FishLeg(carry_over=carry_over), **options)
        assert len(pruner.estimator.groups) == 2
        for sparsity in (0.3, 0.6):
            pruner.estimate(data, F.cross_entropy)
            pruner.prune_to(sparsity)
        made.append(dict(model.state_dict()))
    assert equal(*made)


def test_numpys_numbers_and_named_tuples_are_pythons(tmp_path):
    import numpy as np

    path = tmp_path / "file.pt"
    checkpoint.save({"a": np.float64(0.5), "b": torch.Size([2, 3]), "c": collections.OrderedDict(d=1)}, path)
    assert checkpoint.load(path) == {"a": 0.5, "b": (2, 3), "c": {"d": 1}}


# Pruned models for others


@pytest.fixture
def pruned(net, data):
    return fishleg_ext.prune(net, data, sparsity=0.7, num_grads=64, progress=False)


def test_an_exported_model_is_imported(net, pruned, tmp_path):
    import safetensors.torch

    with pytest.raises(TypeError, match="result to be a PruneResult, got {"):
        checkpoint.export_pruned(net, pruned.masks, tmp_path / "out")
    checkpoint.export_pruned(net, pruned, tmp_path / "out", {"curvature": "block"})
    assert equal(dict(net.state_dict()), safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    assert equal(pruned.masks, safetensors.torch.load_file(tmp_path / "out" / "masks.safetensors"))
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["notes"] == {"curvature": "block"}
    other = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    result = checkpoint.import_pruned(other, tmp_path / "out")
    assert equal(dict(net.state_dict()), dict(other.state_dict()))
    assert equal(vars(pruned), vars(result))


def test_tied_weights_are_exported(tmp_path, data):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    result = fishleg_ext.prune(net, data, sparsity=0.5, num_grads=64, progress=False)
    checkpoint.export_pruned(net, result, tmp_path)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        net[0].weight.fill_(1)
    checkpoint.import_pruned(net, tmp_path)
    assert equal(state, dict(net.state_dict()))
    assert net[2].weight is net[0].weight


def test_what_does_not_belong_together_is_refused(net, pruned, tmp_path):
    checkpoint.export_pruned(net, pruned, tmp_path)
    other = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"2.weight is \[4, 12\], not \[3, 12\]"):
        checkpoint.import_pruned(other, tmp_path)
    assert equal(before, dict(other.state_dict()))
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(ValueError, match="expected zeros where 0.weight of the model is pruned"):
        checkpoint.export_pruned(net, pruned, tmp_path)
    older = (tmp_path / "masks.safetensors").read_bytes()
    checkpoint.export_pruned(net, fishleg_ext.prune(net, None, sparsity=0.9, curvature="identity"), tmp_path)
    (tmp_path / "masks.safetensors").write_bytes(older)
    with pytest.raises(ValueError, match="expected files that were written together"):
        checkpoint.import_pruned(net, tmp_path)
    (tmp_path / "pruning.json").write_text('{"sparsity": 0.7, ')
    with pytest.raises(ValueError, match="pruning.json is truncated, or not of a pruned model"):
        checkpoint.import_pruned(net, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        checkpoint.import_pruned(net, tmp_path)


# Kills


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path):
    """The same weights and masks, to the bit, killed by SIGKILL at random times."""
    options = "--kills 4 --steps 40 --every 3 --curvature fishleg --num-grads 64 --checkpoint"
    command = [
        sys.executable,
        ROOT / "bench" / "studies" / "gradual_digits.py",
        *options.split(),
        tmp_path / "run.pt",
    ]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["kills"] == 4
    assert report["sparsity"] == pytest.approx(0.95, abs=1e-4)
    assert {path.name for path in tmp_path.glob("*") if "partial" not in path.name} == {
        "run.pt",
        "run_whole.pt",
    }


# what earlier versions wrote


def as_before_0_2(state):
    """A pruner's state as version 0.1 wrote it: the estimate's entries beside the others."""
    flat = {key: value for key, value in state.items() if key not in ("estimate", "flops_per_weight")}
    return {**flat, **state["estimate"], "uses": state["flops_per_weight"]}


@pytest.mark.parametrize("options", [{}, {"curvature": "fishleg"}, {"curvature": "layerwise", "allocation": "block"}])
def test_a_state_of_version_0_1_is_gone_on_from(net, data, options):
    options |= {"num_grads": 32, "progress": False}
    pruner = fishleg_ext.Pruner(net, **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.3)
    state, model = as_before_0_2(copy.deepcopy(pruner.state_dict())), copy.deepcopy(net)
    assert {"held", "used_grads", "masks_at_estimate", "model", "curvature", "uses", "masks"} <= state.keys()
    expected = pruner.prune_to(0.6)
    again = fishleg_ext.Pruner(model, **options)
    again.load_state_dict(state)
    got = again.prune_to(0.6)
    assert all(torch.equal(mask, got.masks[name]) for name, mask in expected.masks.items())
    assert equal(dict(net.state_dict()), dict(model.state_dict()))


def test_what_is_missing_in_a_state_is_named(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=32, progress=False)
    pruner.estimate(data, F.cross_entropy)
    for path in (("masks",), ("estimate", "used_grads"), ("estimate", "curvature", "gram"), ("first_order", "gain")):
        state = copy.deepcopy(pruner.state_dict())
        part = state
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]
        with pytest.raises(ValueError, match=f"expected the state of .* with '{path[-1]}'"):
            pruner.load_state_dict(state)


@pytest.mark.parametrize("broken", [{"step": None}, {"history": 3}, {"flops_per_weight": 3}])
def test_a_state_that_is_broken_changes_nothing(net, data, broken):
    pruner = fishleg_ext.Pruner(net, num_grads=32, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    again = fishleg_ext.Pruner(copy.deepcopy(net), num_grads=32, progress=False)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        again.load_state_dict(pruner.state_dict() | broken)
    assert all(mask.all() for mask in again.masks.values())
    assert not again.history
    with pytest.raises(RuntimeError, match="call estimate"):
        again.prune_to(0.6)
