"""fishleg-ext check: every implementation that runs here passes, and what is wrong fails."""

import dataclasses
import json
import re

import pytest
import torch

from fishleg_ext.cli import main
from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.testing import cases, check

IMPLEMENTATIONS = [
    pytest.param(name, impl, marks=[getattr(pytest.mark, impl)] if impl in ("triton", "cuda") else [])
    for name in OPS
    for impl in ("reference", *OPS[name].kernels)
    if (name, impl) != ("obs_eliminate", "cpu")
]
# The specification, which each case is compared with, takes its time on large blocks.
IMPLEMENTATIONS.append(pytest.param("obs_eliminate", "cpu", marks=pytest.mark.slow))


IN_FLOAT32 = ("kron_mul", "foreach_kron_mul", "fisher_diag_update_", "dequantize_fixed_point", "assign_codes")


def test_every_op_has_cases():
    assert set(cases.CASES) == set(OPS)
    assert set(check.WITHOUT_DTYPE) <= set(OPS)


@pytest.mark.parametrize("dtype", check.DTYPES, ids=str)
@pytest.mark.parametrize("name, impl", IMPLEMENTATIONS)
def test_implementations_keep_their_budgets(name, impl, dtype):
    row = check.check_dtype(OPS[name], impl, dtype)
    if impl == "triton" and dtype is torch.float64 and row.op in IN_FLOAT32:
        assert row.reason.startswith("its Triton kernel computes in float32")
    else:
        assert row.cases > 3, row.reason
    assert not row.failures


# The checker itself: implementations with one fault each.


def reference(name):
    return OPS[name].reference


def costs_off(weight, inverse, alive, **options):
    rank, cost = reference("obs_eliminate")(weight, inverse, alive, **options)
    return rank, cost * 1.01


def last_of_ties_first(weight, inverse, alive, **options):
    flipped = reference("obs_eliminate")(weight.flip(1), inverse.flip(1, 2), alive.flip(1), **options)
    return flipped[0].flip(1), flipped[1].flip(1)


def two_swapped(weight, inverse, alive, **options):
    rank, cost = reference("obs_eliminate")(weight, inverse, alive, **options)
    first, second = rank == 0, rank == 1
    rank[first], rank[second] = 1, 0
    return rank, cost


def a_rank_twice(weight, inverse, alive, **options):
    rank, cost = reference("obs_eliminate")(weight, inverse, alive, **options)
    return torch.where(rank == 1, 0, rank), cost


def without(option):
    def ignores(weight, inverse, alive, **options):
        options.pop(option, None)
        if option == "n":
            options.pop("m", None)
        return reference("obs_eliminate")(weight, inverse, alive, **options)

    return ignores


def stops_early(weight, inverse, alive, *, stop=None, **options):
    return reference("obs_eliminate")(weight, inverse, alive, stop=None if stop is None else stop / 2, **options)


def the_dead_cost_something(weight, inverse, alive, **options):
    rank, cost = reference("obs_eliminate")(weight, inverse, alive, **options)
    return rank, torch.where(alive, cost, 0)


def any_order_at_no_cost(weight, inverse, alive, **options):
    order = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).argsort(1).int()
    return torch.where(alive, order, -1), torch.where(alive, torch.zeros_like(weight), torch.inf)


def half_as_dear_again(weight, inverse, alive, **options):
    rank, cost = reference("obs_eliminate")(weight, inverse, alive, **options)
    return rank, cost * 1.5


def zeros(gram, damping):
    return torch.zeros_like(gram), reference("block_inverse")(gram, damping)[1]


def leaves_one_unwritten(weight, inverse, alive, **options):
    rank, cost = reference("obs_eliminate")(weight, inverse, alive, **options)
    result = torch.empty(cost.shape, dtype=cost.dtype)
    result[:, 1:] = cost[:, 1:]
    return rank, result


def one_bit_flipped(scores, num_pruned):
    masks = reference("keep_mask")(scores, num_pruned)
    if masks and masks[0].numel() > 3:
        masks[0].view(-1)[3] ^= True
    return masks


def writes_beyond(tensors, packed_masks):
    reference("apply_masks_")(tensors, packed_masks)
    for tensor in tensors:
        if tensor.storage_offset():
            tensor.as_strided((1,), (1,), tensor.storage_offset() + tensor.numel())[0] = 0


def forgets_the_end(tensors, packed_masks):
    """Of each tensor, the weights after the last whole byte of its mask."""
    whole = [(t.view(-1)[: t.numel() // 8 * 8], p[: t.numel() // 8]) for t, p in zip(tensors, packed_masks, strict=True)
             if t.is_contiguous()]  # fmt: skip
    reference("apply_masks_")(*map(list, zip(*whole, strict=True)) if whole else ([], []))


def less_precise(gram, damping):
    inverse, info = reference("block_inverse")(gram, damping)
    return inverse.bfloat16().to(inverse.dtype), info


def wrong_count_of_damping(gram, damping):
    inverse, info = reference("block_inverse")(gram, damping)
    return inverse, info + 1


def other_bits_each_time(weight, inverse, pruned):
    moved = reference("obs_compensate")(weight, inverse, pruned)
    return moved * (1 + torch.finfo(moved.dtype).eps * torch.randint(0, 2, moved.shape))


def forgets_one_of_the_set(weight, inverse, pruned):
    fewer = pruned.clone()
    fewer[:, -1:] = False
    return reference("obs_compensate")(weight, inverse, fewer)


def loses_the_last_gradient(gram, grads, alpha=1.0):
    reference("block_gram_")(gram, grads[:-1], alpha)


def writes_one_half(gram, grads, alpha=1.0):
    before = gram.clone()
    reference("block_gram_")(gram, grads, alpha)
    gram.copy_(gram.tril() + before.triu(1))


def counts_gradients_of_the_chunk(inverse, grads, num_grads):
    reference("woodbury_update_")(inverse, grads, len(grads) + 1)


def first_to_last(*args, **options):
    return reference("obs_quantize")(*args, **options | {"order": "given"})


def to_the_code_above(weight, inverse, alive, codebook, **options):
    """What goes to a code goes half a step too high, so that codes are often not the nearest."""
    shifted = codebook.clone()
    shifted[..., :-1] = (codebook[..., :-1] + codebook[..., 1:]) / 2
    code, cost, moved = reference("obs_quantize")(weight, inverse, alive, shifted, **options)
    values = codebook.expand(len(weight), -1, -1)[:, 0].to(moved.dtype)
    moved = torch.where(alive, values.gather(1, code.long()), moved)
    step = moved - weight
    fisher = torch.linalg.inv(inverse.double())
    total = 0.5 * (step.double()[:, None] @ fisher @ step.double()[..., None])[:, 0]
    return code, (total / weight.shape[1]).expand_as(cost).to(cost.dtype).clone(), moved


def values_beside_their_codes(*args, **options):
    code, cost, moved = reference("obs_quantize")(*args, **options)
    return code, cost, moved * 1.001


def costs_of_codes_off(*args, **options):
    code, cost, moved = reference("obs_quantize")(*args, **options)
    return code, cost * 1.01, moved


def a_bit_too_few(codes, bits, *rest):
    return reference("pack_codes")(codes & 127, bits, *rest)


def as_if_nothing_were_pruned(packed, bits, offsets, numel, group_size, *masks):
    return reference("unpack_codes")(packed, bits, offsets, numel, group_size)


def next_byte_forgotten(packed, bits, offsets, scale, half, shape, group_size, *masks):
    return reference("dequantize_fixed_point")(packed[:-1], bits, offsets, scale, half, shape, group_size, *masks)


def first_codebook_for_all(packed, bits, offsets, codebook, starts, *rest):
    return reference("dequantize_codebook")(packed, bits, offsets, codebook, torch.zeros_like(starts), *rest)


def ties_to_the_code_above(weight, importance, boundaries):
    below = boundaries - boundaries.abs() * torch.finfo(boundaries.dtype).eps - torch.finfo(boundaries.dtype).tiny
    return reference("assign_codes")(weight, importance, below)


def gradients_not_squared(fisher, grads, beta):
    for average, grad in zip(fisher, grads, strict=True):
        average.mul_(beta).add_(grad.to(average.dtype), alpha=1 - beta)


# Of an op, a fault, and the case that shows it.
FAULTS = [
    ("obs_compensate", other_bits_each_time, "K=3 B=7 condition=100000"),
    ("obs_compensate", forgets_one_of_the_set, "K=3 B=1 condition=1000"),
    ("block_gram_", loses_the_last_gradient, "m=1 K=1 B=1 alpha=1"),
    ("block_gram_", writes_one_half, "m=33 K=2 B=50 alpha=1"),
    ("woodbury_update_", counts_gradients_of_the_chunk, "m=1 K=1 B=1 damping=0.1"),
    ("obs_eliminate", costs_off, "K=3 B=1 condition=1000"),
    ("obs_eliminate", last_of_ties_first, "ties, B=6"),
    ("obs_eliminate", two_swapped, "K=3 B=1 condition=1000"),
    ("obs_eliminate", a_rank_twice, "K=3 B=7 condition=100000"),
    ("obs_eliminate", without("stop"), "dead weights stop=0.001"),
    ("obs_eliminate", without("dead_first"), "dead weights dead_first=True"),
    ("obs_eliminate", without("n"), "dead weights n=2 m=4"),
    ("obs_eliminate", without("group"), "group=4 K=3 B=8"),
    ("obs_eliminate", stops_early, "dead weights stop=0.001"),
    ("obs_eliminate", the_dead_cost_something, "group=4 K=3 B=8"),
    ("obs_eliminate", leaves_one_unwritten, "K=3 B=1 condition=1000"),
    ("obs_quantize", first_to_last, "K=2 B=64 condition=100000 cheapest"),
    ("obs_quantize", to_the_code_above, "K=3 B=33 condition=1000 cheapest"),
    ("obs_quantize", values_beside_their_codes, "K=1 B=1 condition=1000 cheapest"),
    ("obs_quantize", costs_of_codes_off, "K=3 B=7 condition=1000 given"),
    ("pack_codes", a_bit_too_few, "8 bits"),
    ("unpack_codes", as_if_nothing_were_pruned, "n=1000 group_size=25 density=0.3"),
    ("dequantize_fixed_point", next_byte_forgotten, "n=1000 group_size=25 half=True"),
    ("dequantize_codebook", first_codebook_for_all, "n=1000 group_size=25"),
    ("assign_codes", ties_to_the_code_above, "ties, inf"),
    ("fisher_diag_update_", gradients_not_squared, "4 tensors, beta=0.9"),
    ("keep_mask", one_bit_flipped, "0 of 4262"),
    ("apply_masks_", writes_beyond, "inside of a larger tensor"),
    ("apply_masks_", forgets_the_end, "10 tensors, density 0.5"),
    ("block_inverse", less_precise, "K=3 B=31 condition=1000"),
    ("block_inverse", wrong_count_of_damping, "K=3 B=1 condition=1000"),
]


@pytest.mark.parametrize("name, faulty, shown_by", FAULTS)
def test_faults_are_found(name, faulty, shown_by):
    row = check.Row(name, "faulty", "")
    for case in cases.CASES[name](cases.Inputs(torch.float32, torch.device("cpu"), 0)):
        if case.name == shown_by:
            row.record(case, *check.compare_to_float64(OPS[name], faulty, case))
            break
    assert row.failures


@pytest.mark.slow
@pytest.mark.parametrize("condition", cases.CONDITIONS)
@pytest.mark.parametrize(
    "name, faulty",
    [("obs_eliminate", any_order_at_no_cost), ("obs_eliminate", half_as_dear_again), ("block_inverse", zeros)],
)
def test_coarse_faults_are_found_at_every_condition(name, faulty, condition):
    """In single precision, too, and by each case of more than one weight."""
    for case in cases.CASES[name](cases.Inputs(torch.float32, torch.device("cpu"), 0)):
        if f"condition={condition:g}" in case.name and case.args[0].shape[-1] > 1:
            error, budget = check.compare_to_float64(OPS[name], faulty, case)
            assert error > budget, case.name


def test_torch_is_as_before_afterwards():
    check.run_case(OPS["obs_score"], lambda *args: args[0], (torch.ones(1), torch.ones(1)), {})
    assert not torch.are_deterministic_algorithms_enabled()


# The command


def test_check_prints_a_table_and_why_a_kernel_did_not_run(capsys):
    assert main(["check", "obs_score", "apply_masks_", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^obs_score +reference +float32 +\d+ +\d\.\de-\d\d +\d\.\de-\d\d +ok$", out, re.M)
    assert re.search(r"^apply_masks_ +triton", out, re.M)
    assert "all that ran is within its budget" in out
    if (reason := OPS["apply_masks_"].unavailable("triton")) is not None:
        assert f"not run: {reason}" in out
        assert out.rstrip().endswith("; not run: triton of apply_masks_")
        assert main(["check", "apply_masks_", "--impl", "triton"]) == 1
        assert "nothing was checked" in capsys.readouterr().out


def test_an_implementation_that_raises_has_failed(capsys, monkeypatch, tmp_path):
    def raises(weight, diagonal):
        if weight.dtype == torch.float16:
            raise RuntimeError("no kernel image is available")
        return real.reference(weight, diagonal)

    real = OPS["obs_score"]
    monkeypatch.setitem(OPS, "obs_score", dataclasses.replace(real, reference=raises))
    assert main(["check", "obs_score", "nm_mask", "--json", str(tmp_path / "rows.json")]) == 1
    out = capsys.readouterr().out
    assert re.search(r"obs_score +reference +float16 .*FAILED\n +shape=\[\]: RuntimeError: no kernel image", out)
    assert re.search(r"nm_mask +reference +float16 .*ok", out)  # it goes on
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["dtype"] for row in rows if row["failures"]] == ["float16"]


def test_check_fails_with_the_case_that_failed(capsys, monkeypatch):
    real = OPS["obs_score"]
    wrong = lambda weight, diagonal: real.reference(weight, diagonal) * (1 + 1e-4 * (weight.dtype != torch.float64))
    monkeypatch.setitem(OPS, "obs_score", dataclasses.replace(real, reference=wrong))
    assert main(["check", "obs_score"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"obs_score +reference +float32 .*FAILED", out)
    assert re.search(r"obs_score +reference +float64 .*ok", out)
    assert "shape=[3, 5]: error 0.0001" in out
    assert re.search(r"\d+ cases failed", out)


def test_check_refuses_an_unknown_op(capsys):
    assert main(["check", "obs_scores"]) == 2
    assert "there is no op 'obs_scores'; there are block_gram_" in capsys.readouterr().err
