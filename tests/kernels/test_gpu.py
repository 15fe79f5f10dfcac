"""What only a GPU can show: CUDA graphs, streams, limits of the device. The values are tested by test_check.py."""

import pytest
import torch
from oracles import cholesky_inverse

import fishleg_ext
from fishleg_ext import ops
from fishleg_ext.bench.harness import captured
from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.testing import cases

pytestmark = pytest.mark.gpu


@pytest.fixture
def masked(generator):
    """Tensors on the GPU, their masks and the packed masks."""
    tensors = [torch.randn(shape, generator=generator).cuda() for shape in [(5000,), (33, 7), (1,)]]
    masks = [torch.rand(t.shape, generator=generator).cuda() < 0.5 for t in tensors]
    return tensors, masks, [ops.pack_mask(mask) for mask in masks]


@pytest.fixture
def blocks(generator, fisher):
    """Weight, inverse and alive of an elimination, on the GPU."""

    def make(k, b, dtype=torch.float32):
        inverse = cholesky_inverse(fisher(k, b)).to("cuda", dtype)
        weight = torch.randn(k, b, dtype=torch.float64, generator=generator).to("cuda", dtype)
        return weight, inverse, torch.ones(k, b, dtype=torch.bool, device="cuda")

    return make


def is_an_order(rank):
    """Every weight of every block has a rank of its own."""
    return bool((rank.sort(1).values == torch.arange(rank.shape[1], device=rank.device)).all())


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_graph_of_apply_masks_replays(impl, masked):
    tensors, masks, packed = masked
    graph, _ = captured(lambda: ops.apply_masks_(tensors, packed, impl=impl))
    for value in (1.0, 2.0):
        for tensor in tensors:
            tensor.fill_(value)
        graph.replay()
        assert all(torch.equal(t, value * m) for t, m in zip(tensors, masks, strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_graph_of_fisher_diag_update_replays(impl, generator):
    grads = [torch.randn(shape, generator=generator).cuda() for shape in [(5000,), (33, 7), (1,)]]
    fisher = [torch.zeros_like(grad) for grad in grads]
    graph, _ = captured(lambda: ops.fisher_diag_update_(fisher, grads, 0.5, impl=impl))
    for average in fisher:
        average.zero_()
    for _ in range(3):
        graph.replay()
    for average, grad in zip(fisher, grads, strict=True):
        torch.testing.assert_close(average, (1 - 0.5**3) * grad**2)


def test_a_network_on_the_gpu_is_quantized_saved_and_retrained(generator, tmp_path):
    make = lambda: torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5)).cuda()
    x, y = torch.randn(64, 40, generator=generator).cuda(), torch.randint(5, (64,), generator=generator).cuda()
    for options in ({}, {"method": "fixed_point", "group": 16}, {"method": "obq", "curvature": "block"}):
        for coding in ("fixed", "entropy"):
            if coding == "entropy" and "group" in options:
                continue
            model = make()
            masks = fishleg_ext.prune(model, [(x, y)], sparsity=0.5, num_grads=64, progress=False).masks
            given = {"bits": 3, "masks": masks, "num_grads": 64, "progress": False, "coding": coding} | options
            result = fishleg_ext.quantize(model, [(x, y)], **given)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            handle = result.attach(optimizer)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            handle.remove()
            result.save(tmp_path / "model.safetensors")
            loaded = fishleg_ext.load_quantized(tmp_path / "model.safetensors", make())
            assert torch.equal(loaded(x), model(x))


def test_a_graph_of_tensors_never_seen_is_refused_or_falls_back(masked, monkeypatch):
    from fishleg_ext.kernels import tables

    monkeypatch.setattr(tables, "_tables", {})  # others may have lain at the same addresses
    tensors, masks, packed = masked
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(NotImplementedError, match="call it once with these very tensors before"):
            ops.apply_masks_(tensors, packed, impl="triton")
        ops.apply_masks_(tensors, packed)
    for tensor in tensors:
        tensor.fill_(1)
    graph.replay()
    assert all(torch.equal(t, m.float()) for t, m in zip(tensors, masks, strict=True))


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_the_next_call_with_the_same_tensors_never_waits_for_the_gpu(impl, masked):
    tensors, masks, packed = masked
    ops.apply_masks_(tensors, packed, impl=impl)
    for tensor in tensors:
        tensor.fill_(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.apply_masks_(tensors, packed, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(t, m.float()) for t, m in zip(tensors, masks, strict=True))


@pytest.mark.cuda
def test_a_graph_of_obs_eliminate_replays(blocks):
    weight, inverse, alive = blocks(7, 33)
    graph, (rank, cost) = captured(lambda: ops.obs_eliminate(weight, inverse, alive, impl="cuda"))
    weight.mul_(torch.linspace(0.5, 2, 33, device="cuda"))
    graph.replay()
    expected = ops.obs_eliminate(weight, inverse, alive, impl="cuda")
    assert is_an_order(rank)
    assert torch.equal(rank, expected[0])
    assert torch.equal(cost, expected[1])


@pytest.mark.parametrize("name, impl", [("apply_masks_", "triton"), ("obs_eliminate", "cuda")])
def test_kernels_run_on_the_current_stream(name, impl, masked, blocks):
    """After what the stream has been given before, which takes a while, and not before it."""
    if (reason := OPS[name].unavailable(impl)) is not None:
        pytest.skip(reason)
    stream = torch.cuda.Stream()
    tensors, masks, packed = masked
    weight, inverse, alive = blocks(40, 64)
    expected = ops.obs_eliminate(2 * weight, inverse, alive, impl=impl if name == "obs_eliminate" else "reference")
    if name == "apply_masks_":
        ops.apply_masks_(tensors, packed, impl=impl)  # compiling, and making the table, wait for the stream
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        if name == "apply_masks_":
            for tensor in tensors:
                tensor.fill_(3)
            ops.apply_masks_(tensors, packed, impl=impl)
        else:
            weight.mul_(2)
            got = ops.obs_eliminate(weight, inverse, alive, impl=impl)
    stream.synchronize()
    if name == "apply_masks_":
        assert all(torch.equal(t, 3.0 * m) for t, m in zip(tensors, masks, strict=True))
    else:
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.cuda
@pytest.mark.parametrize("k", [1, 3, 20_000])
def test_two_eliminations_are_bitwise_equal(k, blocks):
    weight, inverse, alive = blocks(min(k, 50), 50)
    weight = weight.repeat(-(-k // 50), 1)[:k].contiguous()
    alive = torch.ones_like(weight, dtype=torch.bool)
    inverse = inverse.repeat(-(-k // 50), 1, 1)[:k].contiguous()
    first = ops.obs_eliminate(weight, inverse, alive, impl="cuda")
    assert is_an_order(first[0])
    for again, once in zip(ops.obs_eliminate(weight, inverse, alive, impl="cuda"), first, strict=True):
        assert torch.equal(again, once)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_block_that_fits_runs_and_the_next_falls_back(dtype, blocks):
    supports = lambda b: OPS["block_inverse"].supports("cuda", torch.ones(1, b, b, dtype=dtype, device="cuda"), 0.1)
    largest = max(b for b in range(1, 400) if supports(b)[0])
    gram = blocks(2, largest, dtype)[1]
    got, info = ops.block_inverse(gram, 0.1, impl="cuda")
    assert not info.any()
    identity = torch.eye(largest, dtype=torch.float64, device="cuda")
    assert (got.double() @ (gram.double() + 0.1 * identity) - identity).abs().max() < 1e-3
    gram = blocks(2, largest + 1, dtype)[1]
    with pytest.raises(NotImplementedError, match=f"holds a block in registers: up to {largest} weights"):
        ops.block_inverse(gram, 0.1, impl="cuda")
    automatic, reference = ops.block_inverse(gram, 0.1), ops.block_inverse(gram, 0.1, impl="reference")
    assert torch.equal(automatic[0], reference[0])


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"dead_first": True}, {"n": 2, "m": 4}, {"group": 4, "dead_first": True}])
def test_large_blocks_are_eliminated_in_panels(options, blocks):
    """Of 576 weights with one inverse, as a row of a layer has; well conditioned, so that orders agree."""
    weight, inverse, alive = blocks(64, 576, torch.float64)
    got = ops.obs_eliminate(weight, inverse[:1], alive, **options, impl="cuda")
    expected = ops.obs_eliminate(weight, inverse[:1], alive, **options, impl="reference")
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    assert (got[0] >= 288).any()


@pytest.mark.cuda
def test_an_inverse_that_blocks_share_is_not_copied(blocks):
    weight, inverse, _ = blocks(1, 190)
    weight = weight.expand(50_000, 190)
    alive = torch.ones(weight.shape, dtype=torch.bool, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rank, _ = ops.obs_eliminate(weight, inverse.expand(50_000, 190, 190), alive, impl="cuda")
    assert is_an_order(rank[:1])
    assert (rank == rank[:1]).all()
    # 8 GB of copies; three arrays of 40 MB are needed.
    assert torch.cuda.max_memory_allocated() - before < 200e6


@pytest.mark.cuda
def test_other_groups_fall_back(blocks):
    arguments = blocks(3, 12)
    with pytest.raises(NotImplementedError, match="not groups of 3"):
        ops.obs_eliminate(*arguments, group=3, impl="cuda")
    assert is_an_order(ops.obs_eliminate(*arguments, group=3)[0])


@pytest.mark.parametrize("name", [name for name in OPS if set(OPS[name].kernels) - {"cpu"}])
def test_auto_takes_the_kernels(name, monkeypatch):
    """Where one is available and takes the arguments, nothing else runs."""
    op = OPS[name]
    kernels = [impl for impl in op.kernels if impl != "cpu"]
    for impl in kernels:
        if (reason := op.unavailable(impl)) is not None:
            pytest.skip(reason)
    problems = cases.CASES[name](cases.Inputs(torch.float32, torch.device("cuda"), 0))
    arguments = next(c for c in problems if any(op.supports(impl, *c.args, **c.kwargs)[0] for impl in kernels))
    ran = []
    for impl in kernels:
        monkeypatch.setattr(op.module(impl), name, lambda *a, **k: ran.append(1))
    op.resolve("auto", *arguments.args, **arguments.kwargs)(*arguments.args, **arguments.kwargs)
    assert ran


def test_pruning_on_the_gpu(generator):
    """The whole path, with whatever kernels there are: an exact count, exact zeros, nearly the CPU's masks."""
    data = [(torch.randn(64, 20, generator=generator), torch.randint(0, 3, (64,), generator=generator))]
    results = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 3)).to(device)
        moved = [(inputs.to(device), targets.to(device)) for inputs, targets in data]
        results[device] = fishleg_ext.prune(model, moved, sparsity=0.7, num_grads=64, block_size=32, progress=False)
        weights = dict(model.named_parameters())
        pruned = sum(int((~mask).sum()) for mask in results[device].masks.values())
        assert pruned == round(0.7 * 690)
        assert all(not weights[name][~mask].any() for name, mask in results[device].masks.items())
    agree = sum(int((results["cpu"].masks[n] == results["cuda"].masks[n].cpu()).sum()) for n in results["cpu"].masks)
    assert agree > 0.98 * 690


def test_products_of_many_layers_while_a_graph_is_captured(generator):
    """The reference, which a graph can replay, in place of a table that holds the addresses of one call."""
    x = [torch.randn(shape, generator=generator).cuda() for shape in [(8, 12), (3, 5)]]
    rows = [torch.rand(len(one), generator=generator).cuda() for one in x]
    cols = [torch.eye(one.shape[1]).cuda() * 2 for one in x]
    graph, results = captured(lambda: ops.foreach_kron_mul(x, rows, cols, [None, None]))
    for one in x:
        one.fill_(3)
    graph.replay()
    for result, row in zip(results, rows, strict=True):
        torch.testing.assert_close(result, 6 * row[:, None].expand_as(result))


def test_products_of_many_layers_never_wait_for_the_gpu(generator):
    x = [torch.randn(shape, generator=generator).cuda() for shape in [(8, 12), (3, 5)]]
    arguments = x, [torch.ones(len(one)).cuda() for one in x], [torch.eye(one.shape[1]).cuda() for one in x], [None] * 2
    ops.foreach_kron_mul(*arguments, impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = ops.foreach_kron_mul(*arguments, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, one in zip(results, x, strict=True):
        torch.testing.assert_close(result, one)


@pytest.fixture
def scores(generator):
    """Tensors of scores on the GPU, ties among them: more of them than one launch takes, and large ones."""
    shapes = [(100_003,), (64, 65), *[(9,)] * 130]
    return [torch.randint(0, 50, shape, generator=generator).float().cuda() for shape in shapes]


@pytest.mark.cuda
def test_selection_never_waits_for_the_gpu(scores):
    expected = ops.keep_mask(scores, 50_000, impl="reference")
    ops.keep_mask(scores, 50_000, impl="cuda")  # the library loads what it needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = ops.keep_mask(scores, 50_000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(mask, want) for mask, want in zip(masks, expected, strict=True))


@pytest.mark.cuda
def test_a_graph_of_keep_mask_replays(scores):
    graph, masks = captured(lambda: ops.keep_mask(scores, 70_000, impl="cuda"))
    for score in scores:
        score.copy_(-score)
    graph.replay()
    expected = ops.keep_mask(scores, 70_000, impl="reference")
    assert all(torch.equal(mask, want) for mask, want in zip(masks, expected, strict=True))


@pytest.mark.cuda
def test_selection_among_more_scores_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB")
    many, few = torch.zeros(2**31 + 5, dtype=torch.float16, device="cuda"), torch.ones(3, device="cuda").half()
    first, second = ops.keep_mask([many, few], 2**31 + 6, impl="cuda")
    assert not first.any()
    assert second.tolist() == [False, True, True]
