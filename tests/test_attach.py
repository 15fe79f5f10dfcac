"""Pruned weights stay zero while the rest is trained."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn import functional as F

import fishleg_ext

STEPS = 200
OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "Adam, a loop over parameters": lambda p: torch.optim.Adam(p, 1e-2, foreach=False),
    "Adam, fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


class Net(nn.Module):
    """A convolution, two layers that share a weight, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch(generator):
    return torch.randn(32, 1, 6, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def pruned(net, sparsity=0.6, **options):
    pruner = fishleg_ext.Pruner(net, curvature="identity", progress=False, **options)
    pruner.estimate(None, F.cross_entropy)
    pruner.prune_to(sparsity)
    return pruner


def train_step(net, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


def assert_zeros_hold(pruner, optimizer):
    for name, mask in pruner.masks.items():
        weight = pruner.weights[name]
        assert not weight[~mask].any(), name
        assert weight[mask].any()
        for entry in optimizer.state[weight].values():
            if isinstance(entry, torch.Tensor) and entry.shape == weight.shape:
                assert not entry[~mask].any(), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step(net, batch, name):
    net.conv = net.conv.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[name](net.parameters())
    for _ in range(10):
        train_step(net, optimizer, batch)  # moments there are before anything is pruned
    pruner = pruned(net)
    assert list(pruner.masks) == ["conv.weight", "first.weight", "head.weight"]
    handle = pruner.attach(optimizer)
    before = F.cross_entropy(net(batch[0]), batch[1])
    for step in range(STEPS):
        train_step(net, optimizer, batch)
        assert_zeros_hold(pruner, optimizer)
        if step == STEPS // 2:
            pruner.estimate(None, F.cross_entropy)
            pruner.prune_to(0.8)  # the hook follows
    assert pruner.finalize().sparsity == pytest.approx(0.8, abs=0.01)
    assert F.cross_entropy(net(batch[0]), batch[1]) < before
    handle.remove()  # once more is no harm


def test_without_it_they_come_back(net, batch):
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    pruner = pruned(net)
    train_step(net, optimizer, batch)
    assert any(pruner.weights[name][~mask].any() for name, mask in pruner.masks.items())
    with pytest.warns(UserWarning, match="pruned weights are not zero: was an optimizer not attached"):
        pruner.estimate()
    pruner.attach(optimizer)
    with pytest.warns(UserWarning, match="pruned weights are not zero"):
        pruner.finalize()
    train_step(net, optimizer, batch)  # the hook is gone
    assert any(pruner.weights[name][~mask].any() for name, mask in pruner.masks.items())


def test_masks_of_an_earlier_pruning_hold(net, batch):
    result = fishleg_ext.prune(net, [batch], sparsity=0.5, num_grads=16, params="re:weight$", progress=False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    pruner = fishleg_ext.Pruner(net, masks=result.masks, num_grads=16, progress=False)
    pruner.attach(optimizer)
    for _ in range(3):
        train_step(net, optimizer, batch)
        assert all(torch.equal(pruner.weights[name] != 0, mask) for name, mask in result.masks.items())
    pruner.estimate([batch])
    assert pruner.prune_to(0.7).sparsity == pytest.approx(0.7, abs=0.01)
    assert not any(mask[~result.masks[name]].any() for name, mask in pruner.masks.items())
    with pytest.raises(ValueError, match="these are missing or unknown"):
        fishleg_ext.Pruner(net, masks=result.masks, params="re:conv")
    with pytest.raises(TypeError, match="masks to be a dict of tensors"):
        fishleg_ext.Pruner(net, masks=result, params="re:conv")
    with pytest.raises(TypeError, match="mask of head.weight to be a tensor, got None"):
        fishleg_ext.Pruner(net, masks={"head.weight": None})


def test_an_optimizer_of_none_of_the_weights_is_refused(net):
    pruner = pruned(net)
    with pytest.raises(TypeError, match=r"optimizer to be a torch.optim.Optimizer, got Net"):
        pruner.attach(net)
    for parameters in (net.conv.bias, nn.Linear(2, 2).weight):
        with pytest.raises(ValueError, match="got one of none of them"):
            pruner.attach(torch.optim.SGD([parameters], 0.1))


def test_optimizers_of_parts_of_the_model(net, batch):
    pruner = pruned(net)
    parts = [torch.optim.SGD(net.conv.parameters(), 0.1), torch.optim.Adam(net.head.parameters(), 0.1)]
    for optimizer in parts:
        pruner.attach(optimizer)
    for _ in range(3):
        for optimizer in parts:
            train_step(net, optimizer, batch)
            assert_zeros_hold(pruner, optimizer)


def test_gradients_that_accumulate_and_clipping(net, batch):
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    pruner = pruned(net)
    pruner.attach(optimizer)
    for _ in range(5):
        for part in zip(batch[0].split(8), batch[1].split(8), strict=True):
            F.cross_entropy(net(part[0]), part[1]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert_zeros_hold(pruner, optimizer)


def test_autocast_and_a_scaler_that_skips_a_step(net, batch):
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    pruner = pruned(net)
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(batch[0]), batch[1])
        scaler.scale(loss * (float("inf") if step == 3 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert_zeros_hold(pruner, optimizer)
    assert scales[2] > scales[3]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_and_compiled_steps(net, batch, whole):
    torch.compiler.reset()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    pruner = pruned(net)
    pruner.attach(optimizer)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    step = torch.compile(optimizer.step, backend="aot_eager") if whole else optimizer.step
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(compiled(batch[0]), batch[1]).backward()
        step()
        assert_zeros_hold(pruner, optimizer)
    pruner.estimate(None, F.cross_entropy)
    pruner.prune_to(0.8)
    torch.testing.assert_close(compiled(batch[0]), net(batch[0]))


def test_a_copied_model_is_a_plain_one(net, batch):
    keys = list(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    pruner = pruned(net)
    pruner.attach(optimizer)
    train_step(net, optimizer, batch)
    copied = copy.deepcopy(net)
    assert list(copied.state_dict()) == list(net.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())
    Net().load_state_dict(net.state_dict())
    # The pruner, its model and the optimizer together: a training run of its own, once attached.
    net_2, optimizer_2, pruner_2 = copy.deepcopy((net, optimizer, pruner))
    pruner_2.attach(optimizer_2)
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):
        train_step(net_2, optimizer_2, batch)
        assert_zeros_hold(pruner_2, optimizer_2)
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in keys)
    assert not torch.equal(net_2.head.bias, before["head.bias"])


def train_in_parallel(rank, folder):
    """One of two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = Net()
    parallel = nn.parallel.DistributedDataParallel(net)
    data = torch.randn(32, 1, 6, 6), torch.randint(0, 3, (32,))
    pruner = fishleg_ext.Pruner(net, num_grads=32, progress=False)
    pruner.estimate([data], F.cross_entropy)  # the same samples in every process: the same masks
    pruner.prune_to(0.6)
    optimizer = torch.optim.AdamW(parallel.parameters(), 1e-2)
    pruner.attach(optimizer)
    for _ in range(5):
        train_step(parallel, optimizer, tuple(part[rank::2] for part in data))
        assert_zeros_hold(pruner, optimizer)
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_data_parallel_processes_stay_alike(tmp_path):
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [subprocess.Popen([*command, str(rank), tmp_path], stderr=subprocess.PIPE) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["conv.weight"] == 0).any()


if __name__ == "__main__":
    train_in_parallel(int(sys.argv[1]), sys.argv[2])
