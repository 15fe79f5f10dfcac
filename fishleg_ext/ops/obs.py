"""Optimal Brain Surgeon within blocks of weights: score, eliminate, compensate."""

from typing import Any, Optional

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.ops import checks
from fishleg_ext.ops.dispatch import op
from fishleg_ext.reference import obs as reference


def _fake_obs_score(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=widened(inverse_diagonal.dtype))


@op(reference=reference.obs_score, fake=_fake_obs_score)
def obs_score(weight: Tensor, inverse_diagonal: Tensor, *, impl: str = "auto") -> Tensor:
    """The loss increase of pruning each weight alone: w^2 / (2 d).

    Hassibi and Stork, Optimal Brain Surgeon, NeurIPS 1992, eq. 5.

    Args:
        weight: any shape, floating point.
        inverse_diagonal: the diagonal of the inverse Fisher, same shape, floating point.

    Returns:
        score, same shape, in the dtype of inverse_diagonal (at least float32).

    Raises:
        TypeError: a tensor is not dense and floating point.
        ValueError: shapes or devices differ.

    Examples:
        >>> obs_score(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0]))
        tensor([1.0000, 0.5000])
    """
    checks.dense_floating(weight=weight, inverse_diagonal=inverse_diagonal)
    checks.shape("inverse_diagonal", inverse_diagonal, "of weight", weight.shape)


def _check_blocks(weight: Tensor, inverse: Tensor, mask_name: str, mask: Tensor) -> None:
    checks.dense_floating(weight=weight, inverse=inverse)
    checks.boolean(**{mask_name: mask})
    checks.same_device(weight=weight, **{mask_name: mask})
    checks.dims("weight", weight, "[K, B]")
    checks.shape(mask_name, mask, "[K, B]", weight.shape)
    checks.inverse_blocks(inverse, *weight.shape)


def _fake_obs_eliminate(weight: Tensor, inverse: Tensor, alive: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    rank = weight.new_empty(weight.shape, dtype=torch.int32)
    return rank, weight.new_empty(weight.shape, dtype=widened(inverse.dtype))


@op(reference=reference.obs_eliminate, fake=_fake_obs_eliminate, kernels=("cuda", "cpu"))
def obs_eliminate(
    weight: Tensor,
    inverse: Tensor,
    alive: Tensor,
    *,
    group: int = 1,
    n: int = 0,
    m: int = 0,
    stop: Optional[float] = None,
    dead_first: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Eliminate the weights of each block one by one, the cheapest first, each compensated by those left.

    Until nothing is alive: q = argmin w_q^2 / (2 H_qq), then w -= H[:, q] w_q / H_qq and
    H -= H[:, q] H[q, :] / H_qq. Ties go to the lowest index. The order of exact greedy pruning in
    Kuznedelev et al., CAP, arXiv 2210.09223, and Frantar and Alistarh, OBC, arXiv 2208.11580.

    Args:
        weight: [K, B], floating point; not changed.
        inverse: [K, B, B], or [1, B, B] shared by all blocks; symmetric positive definite, in the units of 1 / Fisher.
        alive: bool [K, B]; only alive rows and columns are read, and the inverse must be that of the alive sub-block.
        group: remove whole groups of this many consecutive weights, the one of least joint cost first; a divisor of B.
        n: of each m consecutive weights keep at least so many: a group that has lost m - n (dead weights count as lost)
            is closed. Not together with group > 1.
        m: of the pattern n:m; divides B; 0 is no such pattern.
        stop: the elimination of a block ends when the cost of its next removal, of a whole group then, exceeds this.
        dead_first: the inverse is that of the whole block: condition it on the dead weights first.

    Returns:
        rank int32 [K, B]: 0 is eliminated first; -1 is not alive; B is alive but not reached. And cost [K, B] in
        inverse's dtype (at least float32): the raw cost of that removal, +inf where not alive or not reached; the sum
        along the order is the exact joint cost. The members of a group have consecutive ranks and equal shares of its
        cost.
        A weight whose cost is not finite, or whose inverse diagonal is not positive, is never reached.

    Raises:
        TypeError: a tensor is not dense and floating point, or alive not bool.
        ValueError: shapes or devices do not fit, or group, n and m do not suit B.
    """
    _check_blocks(weight, inverse, "alive", alive)
    size = weight.shape[1]
    if group < 1 or size % group:
        raise ValueError(f"expected group to divide the block size {size}, got {group}")
    if (n, m) != (0, 0):
        if not 0 <= n <= m or m < 1 or size % m:
            raise ValueError(f"expected 0 <= n <= m with m dividing the block size {size}, got n={n}, m={m}")
        if group > 1:
            raise ValueError(f"expected either group > 1 or n:m, got group={group} and {n}:{m}")
    if stop is not None and stop != stop:
        raise ValueError("expected stop to be a number, got NaN")


def _fake_obs_compensate(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


@op(reference=reference.obs_compensate, fake=_fake_obs_compensate, kernels=("cuda", "cpu"))
def obs_compensate(weight: Tensor, inverse: Tensor, pruned: Tensor, *, impl: str = "auto") -> Tensor:
    """Zero a set P of weights of each block and move the others so that the loss rises least.

    w - H[:, P] (H[P, P])^-1 w_P, with exact zeros at P.

    Args:
        weight: [K, B], floating point; not changed.
        inverse: H, [K, B, B], or [1, B, B] shared by all blocks; symmetric positive definite.
        pruned: bool [K, B], the set P; weights pruned earlier belong to it. Those whose diagonal entry of H is 0 are
            left out of the solve.

    Returns:
        weight [K, B] in weight's dtype; NaN in a block that cannot be solved. H[P, P] is damped where it is not
        positive definite to rounding, from eps * mean(diag) upwards.

    Raises:
        TypeError: a tensor is not dense and floating point, or pruned not bool.
        ValueError: shapes or devices do not fit.
    """
    _check_blocks(weight, inverse, "pruned", pruned)


def _fake_obs_quantize(weight: Tensor, inverse: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    code = weight.new_empty(weight.shape, dtype=torch.uint8)
    cost = weight.new_empty(weight.shape, dtype=widened(inverse.dtype))
    return code, cost, torch.empty_like(cost)


@op(reference=reference.obs_quantize, fake=_fake_obs_quantize, kernels=("cpu",))
def obs_quantize(
    weight: Tensor,
    inverse: Tensor,
    alive: Tensor,
    codebook: Tensor,
    *,
    order: str = "cheapest",
    num_free: int = 0,
    dead_first: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Set the weights of each block to their nearest codes one by one, each time compensated by those left.

    Until nothing is alive: a weight q goes to its code c, at the cost (w_q - c)^2 / (2 H_qq), the others of its block
    compensate, w -= H[:, q] (w_q - c) / H_qq, and H -= H[:, q] H[q, :] / H_qq. Frantar and Alistarh, OBQ,
    arXiv 2208.11580, algorithm 3; in a given order Frantar et al., GPTQ, arXiv 2210.17323.

    Args:
        weight: [K, B], floating point; not changed.
        inverse: [K, B, B], or [1, B, B] shared by all blocks; symmetric positive definite, in the units of 1 / Fisher.
        alive: bool [K, B]; the others are zero in the result.
        codebook: [K or 1, S, C], C <= 256: the values of the codes, ascending; segment s of a block, the s-th part of
            S equal ones of its B - num_free weights, has the codes codebook[:, s]. Codes there are fewer of are filled
            up with +inf.
        order: "cheapest": the weight of least cost is next, but first any that lies beyond the first or last code by
            more than half the step there, before others move it further. Of what is not alive nothing is read, and the
            inverse must be that of the alive sub-block. "given": from the first to the last; a weight that is not alive
            goes to zero when its turn comes, and until then it compensates as any other.
        num_free: so many weights at the end of each block, such as a bias, compensate and have no codes.
        dead_first: with order="cheapest", the inverse is that of the whole block: condition it on the dead first.

    Returns:
        code uint8 [K, B], 0 where not alive or free; cost [K, B] in inverse's dtype (at least float32), of each weight
        in its turn; their sum is the exact cost of the whole move. It is 0 where a weight is free or, with
        order="cheapest", not alive. And weight [K, B] in the dtype of cost: the codes' values, 0 where not alive, and
        the free weights as they compensate. With order="cheapest" a weight whose inverse diagonal is not positive goes
        to its code at the end and moves no other, at cost +inf; with order="given" an inverse that is not positive
        definite to rounding is damped.

    Raises:
        TypeError: a tensor is not dense and floating point, or alive not bool.
        ValueError: shapes or devices do not fit, or the order is neither.
    """
    _check_blocks(weight, inverse, "alive", alive)
    checks.dense_floating(weight=weight, codebook=codebook)
    checks.dims("codebook", codebook, "[K or 1, S, C]")
    blocks, size = weight.shape
    if codebook.shape[0] not in (1, blocks):
        raise ValueError(f"expected codebook of shape [K or 1, S, C] with K = {blocks}, got {list(codebook.shape)}")
    if not 0 <= num_free <= size:
        raise ValueError(f"expected num_free from 0 to the block size {size}, got {num_free}")
    if codebook.shape[1] < 1 or (size - num_free) % codebook.shape[1]:
        raise ValueError(
            f"expected codebook with S segments that divide {size - num_free} weights, got {list(codebook.shape)}"
        )
    if not 1 <= codebook.shape[2] <= 256:
        raise ValueError(f"expected codebook of 1 to 256 codes, got {list(codebook.shape)}")
    if order not in ("cheapest", "given"):
        raise ValueError(f"expected order to be 'cheapest' or 'given', got {order!r}")
