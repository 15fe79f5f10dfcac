"""What holds for every op: schema, fake, compile, autograd, choice of implementation, import without CUDA."""

import dataclasses
import inspect
import re
import subprocess
import sys
import threading
import types

import pytest
import torch

import fishleg_ext
from fishleg_ext import ops
from fishleg_ext.ops import dispatch
from fishleg_ext.ops.dispatch import OPS

GRAM = torch.eye(4).repeat(3, 1, 1) + 0.1
MASK = torch.arange(12).reshape(3, 4) % 3 != 0
WEIGHT = torch.linspace(-1, 1, 12).reshape(3, 4)
CODES = torch.tensor([[[-0.5, 0.5], [-1.0, 1.0]]])  # of two segments
BYTES = torch.arange(8, dtype=torch.uint8) * 37
BITS, OFFSETS = torch.tensor([3, 6], dtype=torch.uint8), torch.tensor([0, 2])  # of two groups of four
PACKED_MASK, RANKS = torch.tensor([0b10110111], dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int32)

# For every op, calls that cover its arguments.
CALLS = {
    "block_gram_": [
        ((GRAM, torch.ones(5, 3, 4)), {}),
        ((GRAM, torch.ones(1, 3, 4).expand(5, 3, 4), 0.5), {"precision": "tf32"}),
    ],
    "block_inverse": [((GRAM, 0.1), {}), ((torch.ones(3, 4, 4), 0.0), {})],
    "woodbury_update_": [((GRAM, torch.ones(5, 3, 4), 5), {})],
    "fisher_diag_update_": [
        (([WEIGHT, torch.ones(2)], [WEIGHT, torch.ones(2)], 0.9), {}),
        (([], [], 0.9), {}),
    ],
    "obs_score": [((WEIGHT, WEIGHT.abs()), {}), ((WEIGHT.mT, WEIGHT.abs().mT), {})],
    "obs_eliminate": [
        ((WEIGHT, GRAM, MASK), {}),
        ((WEIGHT, GRAM[:1], MASK), {"n": 2, "m": 4, "stop": 0.3, "dead_first": True}),
        ((WEIGHT, GRAM, MASK), {"group": 2}),
        ((WEIGHT[:, :3].mT, GRAM[:, :3, :3].mT, MASK[:, :3].mT), {}),
    ],
    "obs_compensate": [
        ((WEIGHT, GRAM, MASK), {}),
        ((WEIGHT, GRAM[:1].expand(3, 4, 4), MASK), {}),
        ((WEIGHT[:, :3].mT, GRAM[:, :3, :3].mT, MASK[:, :3].mT), {}),
    ],
    "kron_mul": [
        ((WEIGHT.expand(2, 3, 4), torch.eye(3), torch.eye(4), WEIGHT), {}),
        ((WEIGHT.mT, torch.eye(4), torch.eye(3), WEIGHT.mT), {}),
        ((WEIGHT, torch.ones(3), torch.eye(4)), {}),
    ],
    "foreach_kron_mul": [
        (([WEIGHT, WEIGHT.mT], [torch.ones(3), torch.eye(4)], [torch.eye(4), torch.eye(3)], [None, None]), {}),
        (([WEIGHT], [torch.eye(3)], [torch.eye(4)], [WEIGHT]), {}),
        (([], [], [], []), {}),
    ],
    "kron_diag": [
        ((torch.eye(3), torch.eye(4), WEIGHT), {}),
        ((torch.eye(4), torch.eye(3), WEIGHT.mT), {}),
        ((torch.ones(3), torch.eye(4)), {}),
    ],
    "obs_quantize": [
        ((WEIGHT, GRAM, MASK, CODES), {}),
        ((WEIGHT, GRAM[:1], MASK, CODES.expand(3, 2, 2)), {"dead_first": True}),
        ((WEIGHT, GRAM, MASK, CODES[:, :1]), {"order": "given", "num_free": 1}),
    ],
    "pack_codes": [
        ((BYTES, BITS, OFFSETS, 5, 4), {}),
        ((BYTES, BITS, OFFSETS, 5, 4, PACKED_MASK, RANKS), {}),
    ],
    "unpack_codes": [((BYTES, BITS, OFFSETS, 8, 4), {}), ((BYTES, BITS, OFFSETS, 8, 4, PACKED_MASK, RANKS), {})],
    "dequantize_fixed_point": [
        ((BYTES, BITS, OFFSETS, torch.ones(2), True, [2, 4], 4), {}),
        ((BYTES, BITS, OFFSETS, torch.ones(2), False, [2, 4], 4, PACKED_MASK, RANKS), {}),
    ],
    "dequantize_codebook": [
        ((BYTES, BITS, OFFSETS, torch.arange(72.0), torch.tensor([0, 8]), [2, 4], 4), {}),
        ((BYTES, BITS, OFFSETS, torch.arange(72.0), torch.tensor([0, 8]), [2, 4], 4, PACKED_MASK, RANKS), {}),
    ],
    "assign_codes": [((WEIGHT, WEIGHT.abs(), torch.tensor([[-0.5, 0.5]]).expand(3, 2)), {})],
    "keep_mask": [(([WEIGHT, torch.ones(5)], 7), {}), (([], 0), {})],
    "nm_mask": [((WEIGHT, 2, 4), {}), ((WEIGHT, 1, 3, 0), {}), ((WEIGHT.mT, 2, 4, 0), {})],
    "pack_mask": [((MASK,), {}), ((MASK.mT,), {})],
    "unpack_mask": [((torch.tensor([5, 1], dtype=torch.uint8), [3, 4]), {})],
    "apply_masks_": [
        (
            (
                [WEIGHT, torch.ones(8)],
                [torch.tensor([5, 1], dtype=torch.uint8), torch.tensor([7], dtype=torch.uint8)],
            ),
            {},
        )
    ],
}
EVERY_CALL = [
    pytest.param(name, *call, id=f"{name}-{i}") for name, calls in CALLS.items() for i, call in enumerate(calls)
]


def fresh(args):
    """Copies that an op may write to; expanded tensors stay expanded."""
    copy = lambda t: t if t.stride(0) == 0 else t.clone()
    return tuple(
        copy(a)
        if isinstance(a, torch.Tensor)
        else [t.clone() for t in a]
        if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)
        else a
        for a in args
    )


def test_every_op_of_the_contract_is_here():
    assert set(OPS) == set(CALLS) == set(ops.__all__) - {"use_impl"}
    for name in OPS:
        assert "impl" in inspect.signature(getattr(ops, name)).parameters
        assert getattr(ops, name).__doc__


@pytest.mark.parametrize("name, args, kwargs", EVERY_CALL)
def test_opcheck(name, args, kwargs):
    torch.library.opcheck(getattr(torch.ops.fishleg_ext, name).default, fresh(args), kwargs)


@pytest.mark.parametrize("name, args, kwargs", EVERY_CALL)
def test_compiles_in_one_graph_to_the_same_result(name, args, kwargs):
    function = getattr(ops, name)
    eager_args, compiled_args = fresh(args), fresh(args)
    expected = function(*eager_args, **kwargs)
    torch.compiler.reset()
    got = torch.compile(lambda *a: function(*a, **kwargs), fullgraph=True, backend="aot_eager")(*compiled_args)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(compiled_args, eager_args, rtol=0, atol=0)


@pytest.mark.parametrize("name, args, kwargs", EVERY_CALL)
def test_results_never_require_grad(name, args, kwargs):
    """Parameters may be read and, without no_grad, written."""
    as_parameter = lambda t: torch.nn.Parameter(t) if t.is_floating_point() and t.stride(0) else t
    args = fresh(args)
    args = tuple(
        as_parameter(a)
        if isinstance(a, torch.Tensor)
        else [as_parameter(t) for t in a]
        if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)
        else a
        for a in args
    )
    result = getattr(ops, name)(*args, **kwargs)
    results = result if isinstance(result, (tuple, list)) else [result]
    assert not any(r.requires_grad for r in results if r is not None)


@pytest.mark.parametrize("impl, language", [("triton", "Triton"), ("cuda", "CUDA C++")])
@pytest.mark.parametrize("name", OPS)
def test_kernels_that_cannot_run_raise_with_the_reason(name, impl, language):
    args, kwargs = CALLS[name][0]
    supported, reason = OPS[name].supports(impl, *args, **kwargs)
    if supported:
        pytest.skip(f"{impl} runs this here")
    assert (f"there is no {language} kernel for it yet" in reason) == (impl not in OPS[name].kernels)
    message = re.escape(f"{name}: impl={impl!r} was requested, but {reason}")
    with pytest.raises(NotImplementedError, match=message):
        getattr(ops, name)(*fresh(args), impl=impl, **kwargs)
    with fishleg_ext.use_impl(impl), pytest.raises(NotImplementedError, match=message):
        getattr(ops, name)(*fresh(args), **kwargs)


@pytest.mark.parametrize("name", OPS)
def test_an_unknown_impl_is_refused(name):
    args, kwargs = CALLS[name][0]
    with pytest.raises(ValueError, match="impl to be one of auto, reference, triton, cuda, cpu, got 'gpu'"):
        getattr(ops, name)(*fresh(args), impl="gpu", **kwargs)


def kernel_of(monkeypatch, *, supported, kernels=("triton", "cuda"), on_gpu=True):
    """obs_score with kernels that return their own name; supported are those named."""
    for impl in kernels:
        module = types.ModuleType(impl)
        module.unavailable = lambda: None
        module.obs_score = lambda *args, impl=impl: impl
        module.supports_obs_score = lambda *args, impl=impl: (impl in supported, f"{impl} does not")
        monkeypatch.setitem(sys.modules, f"backend_{impl}", module)
        monkeypatch.setitem(sys.modules, f"backend_{impl}.obs", module)
    monkeypatch.setattr(dispatch, "_BACKENDS", {impl: f"backend_{impl}" for impl in kernels})
    monkeypatch.setattr(dispatch, "_on_gpu", lambda args: on_gpu)
    return dataclasses.replace(OPS["obs_score"], kernels=kernels, reference=lambda *args: "reference")


@pytest.mark.parametrize(
    "supported, on_gpu, expected",
    [
        (("triton", "cuda"), True, "triton"),
        (("cuda",), True, "cuda"),
        ((), True, "reference"),
        (("triton", "cuda"), False, "reference"),
    ],
)
def test_auto_takes_the_first_kernel_that_supports_the_call(monkeypatch, supported, on_gpu, expected):
    entry = kernel_of(monkeypatch, supported=supported, on_gpu=on_gpu)
    assert entry.resolve("auto", 1, 2)(1, 2) == expected
    with fishleg_ext.use_impl("reference"):
        assert entry.resolve("auto", 1, 2)(1, 2) == "reference"


def test_an_explicit_kernel_runs_or_says_why_not(monkeypatch):
    entry = kernel_of(monkeypatch, supported=("cuda",), on_gpu=False)
    assert entry.resolve("cuda", 1, 2)(1, 2) == "cuda"
    with pytest.raises(NotImplementedError, match="obs_score: impl='triton' was requested, but triton does not"):
        entry.resolve("triton", 1, 2)


def test_an_op_that_returns_something_needs_a_fake():
    def unfinished(x: torch.Tensor, *, impl: str = "auto") -> torch.Tensor: ...

    with pytest.raises(TypeError, match="unfinished: expected a fake exactly where something is returned"):
        dispatch.op(reference=lambda x: x)(unfinished)
    assert "unfinished" not in OPS


def test_a_backend_that_does_not_import_is_a_reason():
    entry = dataclasses.replace(OPS["obs_score"], kernels=("triton",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_BACKENDS", {"triton": "no_such_package"})
        assert entry.unavailable("triton") == "Triton is not installed (No module named 'no_such_package')"


def test_a_refused_call_changes_nothing():
    gram = GRAM.clone()
    with pytest.raises(NotImplementedError):
        ops.block_gram_(gram, torch.ones(5, 3, 4), impl="cuda")
    assert torch.equal(gram, GRAM)


def test_use_impl_nests_and_an_explicit_impl_wins():
    call = lambda **kw: ops.obs_score(torch.ones(1), torch.ones(1), **kw)
    with fishleg_ext.use_impl("cuda"):
        call(impl="reference")
        with fishleg_ext.use_impl("reference"):
            call()
        with pytest.raises(NotImplementedError):
            call()
    call()
    with pytest.raises(ValueError, match="got 'fast'"):
        fishleg_ext.use_impl("fast")


def test_use_impl_governs_a_compiled_function():
    torch.compiler.reset()
    compiled = torch.compile(lambda w: ops.obs_score(w, w), fullgraph=True, backend="aot_eager")
    compiled(torch.ones(3))
    with fishleg_ext.use_impl("triton"), pytest.raises(NotImplementedError, match="impl='triton'"):
        compiled(torch.ones(3))


def test_use_impl_is_of_its_own_thread():
    seen = []

    def other():
        seen.append(ops.obs_score(torch.ones(1), torch.ones(1)))

    with fishleg_ext.use_impl("cuda"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_the_fake_checks_its_arguments_too():
    with pytest.raises(ValueError, match="expected grads of shape"):
        ops.block_gram_(torch.empty(2, 3, 3, device="meta"), torch.empty(4, 2, 5, device="meta"))
    inverse, info = ops.block_inverse(torch.empty(2**20, 64, 64, device="meta"), 0.1)  # more than 2^31 entries
    assert inverse.shape == (2**20, 64, 64)
    assert info.shape == (2**20,)


def test_devices_must_agree():
    with pytest.raises(ValueError, match="expected grads on the device of gram, cpu, got meta"):
        ops.block_gram_(GRAM.clone(), torch.empty(5, 3, 4, device="meta"))


def test_import_initialises_no_cuda_and_reads_no_kernel():
    code = (
        "import sys, torch, fishleg_ext; assert not torch.cuda.is_initialized(); "
        "assert 'triton' not in sys.modules; assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("allowed, within", [("highest", "none"), ("high", "ieee")])
def test_products_are_not_rounded_to_tf32_unless_an_op_says_so(allowed, within, monkeypatch):
    seen = []
    setting = torch.backends.cuda.matmul
    spy = lambda *args: seen.append(setting.fp32_precision) or torch.ones(())
    monkeypatch.setattr(type(OPS["kron_diag"]), "resolve", lambda *args, **kwargs: spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        ops.kron_diag(torch.eye(2), torch.eye(2), torch.ones(2, 2))
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen[0] in (within, "ieee")
