"""The running mean of squared gradients of many tensors in one launch.

fisher_diag_update_: f = beta f + (1 - beta) g^2.

One program updates one tile of one tensor, whose two addresses a table names (`kernels.tables`). Bytes per weight,
float32: f and g are read and f is written, 12 in all.
"""

import triton
import triton.language as tl
from torch import Tensor, float32

from fishleg_ext.kernels import capturing, launch_on, wrong_device
from fishleg_ext.kernels.kron import ELEMENTS
from fishleg_ext.kernels.tables import BLOCK, is_kept, table_of

NUM_WARPS = 8


@triton.jit
def fisher_diag_update_kernel(table_ptr, beta, rest, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Update one tile; rest = 1 - beta. ALIGNED: all addresses are multiples of 16 bytes."""
    row_ptr = table_ptr + 3 * tl.program_id(0).to(tl.int64)
    fisher_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        fisher_ptr, grad_ptr = tl.multiple_of(fisher_ptr, 16), tl.multiple_of(grad_ptr, 16)
    size = tl.load(row_ptr + 2)
    offsets = tl.arange(0, BLOCK)
    if size >= BLOCK:  # no masks, so that each access may be of 16 bytes
        fisher = tl.load(fisher_ptr + offsets)
        grad = tl.load(grad_ptr + offsets).to(tl.float32)
        tl.store(fisher_ptr + offsets, beta * fisher + rest * grad * grad)
    else:
        real = offsets < size
        fisher = tl.load(fisher_ptr + offsets, mask=real, other=0.0)
        grad = tl.load(grad_ptr + offsets, mask=real, other=0.0).to(tl.float32)
        tl.store(fisher_ptr + offsets, beta * fisher + rest * grad * grad, mask=real)


def supports_fisher_diag_update_(fisher: list[Tensor], grads: list[Tensor], beta: float) -> tuple[bool, str]:
    """Contiguous tensors on a GPU, means in float32; during the capture of a CUDA graph those of an earlier call."""
    for index, (average, grad) in enumerate(zip(fisher, grads, strict=True)):
        if (reason := wrong_device(average)) is not None:
            return False, reason
        if average.dtype != float32 or grad.dtype not in ELEMENTS or grad.dtype.itemsize > 4:
            return False, f"its Triton kernel computes in float32, not from {grad.dtype} to {average.dtype}"
        if not (average.is_contiguous() and grad.is_contiguous()):
            return False, f"its Triton kernel takes contiguous tensors, and fisher[{index}] or its gradient is not"
    if capturing() and not all(is_kept(key) for _, key in _groups(fisher, grads)):
        return False, "a CUDA graph is being captured: call it once with these very tensors before"
    return True, ""


def fisher_diag_update_(fisher: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """One launch for each device and dtype of gradients."""
    for dtype, key in _groups(fisher, grads):
        table = table_of(key)
        aligned = all((average | grad) % 16 == 0 for average, grad, _ in key[2])
        with launch_on(key[0]):
            fisher_diag_update_kernel[(len(table),)](
                table, float(beta), 1 - float(beta), ELEMENTS[dtype], aligned, BLOCK, num_warps=NUM_WARPS
            )


def _groups(fisher: list[Tensor], grads: list[Tensor]) -> list[tuple]:
    """Dtype of gradients and table of each launch."""
    groups: dict[tuple, list] = {}
    for average, grad in zip(fisher, grads, strict=True):
        if size := average.numel():
            groups.setdefault((average.device, grad.dtype), []).append((average.data_ptr(), grad.data_ptr(), size))
    key = lambda device, dtype, entries: (device, (4 * BLOCK, dtype.itemsize * BLOCK), tuple(entries))
    return [(dtype, key(device, dtype, entries)) for (device, dtype), entries in groups.items()]
