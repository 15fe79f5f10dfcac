"""Entropy coding: what is written is read again, and codes keep to their budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg_ext.quantization import entropy as coding


@given(st.lists(st.integers(0, 255)))
def test_huffman_is_read_again(values):
    codes = torch.tensor(values, dtype=torch.uint8)
    content = coding.huffman(codes)
    assert torch.equal(coding.from_huffman(content, len(codes)), codes)
    with pytest.raises(ValueError, match="codes"):
        coding.from_huffman(content, len(codes) + 1)


def test_huffman_comes_near_the_entropy(generator):
    codes = (torch.randn(30000, generator=generator) * 2).round().clamp(-8, 7).add(8).to(torch.uint8)
    ideal = coding.entropy(codes) * len(codes) / 8
    assert ideal < len(coding.huffman(codes)) < 1.06 * ideal


@given(st.lists(st.booleans(), min_size=1), st.integers(1, 255))
def test_gaps_are_read_again(values, escape):
    mask = torch.tensor(values)
    assert torch.equal(coding.from_gaps(coding.gaps_of(mask, escape), len(mask), escape), mask)


def test_gaps_beyond_the_end_are_refused():
    with pytest.raises(ValueError, match="beyond the 3 weights"):
        coding.from_gaps(torch.tensor([2, 0], dtype=torch.uint8), 3)


def test_gaps_have_the_width_at_which_they_are_shortest(generator):
    mask = torch.rand(20000, generator=generator) < 0.03
    width, gaps = coding.best_escape(mask)
    assert all(width * len(gaps) <= w * len(coding.gaps_of(mask, (1 << w) - 1)) for w in range(2, 9))
    packed = coding.pack_uniform(gaps, width)
    assert torch.equal(coding.unpack_uniform(packed, width, len(gaps)), gaps)


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("bits", [0.5, 1.5, 3, 6])
def test_codes_of_a_uniform_grid_keep_to_the_budget(bits, nearest, generator):
    weights = {"a": torch.randn(4000, generator=generator), "b": 0.01 * torch.randn(1000, generator=generator)}
    importances = {"a": torch.rand(4000, generator=generator), "b": 1e4 * torch.rand(1000, generator=generator)}
    books = coding.uniform_codebooks(weights, importances, bits, nearest=nearest)
    spent = 0.0
    for name, (values, boundaries) in books.items():
        codes = torch.bucketize(weights[name], boundaries)
        spent += coding.entropy(codes) * len(codes)
        assert (values.diff() > 0).all()
        assert ((values[:-1] < boundaries) & (boundaries < values[1:])).all()
    assert spent / 5000 <= bits
    assert nearest or spent / 5000 > bits - 0.15


def test_steps_are_finer_where_there_is_more_information(generator):
    weight = torch.randn(5000, generator=generator)
    importances = {"low": torch.ones(5000), "high": torch.full((5000,), 16.0)}
    books = coding.uniform_codebooks({"low": weight, "high": weight}, importances, 4)
    ratio = books["low"].values.diff().median() / books["high"].values.diff().median()
    assert 3.5 < ratio < 4.5


def test_tensors_without_weights_or_importance(generator):
    weights = {"none": torch.empty(0), "flat": torch.zeros(5), "some": torch.randn(50, generator=generator)}
    books = coding.uniform_codebooks(weights, {name: torch.zeros_like(w) for name, w in weights.items()}, 2)
    assert books["none"].values.tolist() == [0.0]
    assert books["flat"].values.tolist() == [0.0]
    assert books["some"].values.isfinite().all()


@settings(deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=9, unique=True),
    st.lists(st.integers(1, 99), min_size=9, max_size=9),
    st.floats(0, 50),
)
def test_each_weight_takes_the_code_of_least_error_and_bits(values, counts, price):
    values = torch.tensor(sorted(values)).double()
    counts = torch.tensor(counts[: len(values)])
    weight = torch.linspace(-60, 60, 241).double() + 1e-3  # not halfway between codes
    codes = torch.bucketize(weight, coding.boundaries_of_least_cost(values, counts, price))
    cost = (weight[:, None] - values).square() - price * (counts / counts.sum()).double().log2()
    torch.testing.assert_close(cost.gather(1, codes[:, None])[:, 0], cost.amin(1), rtol=1e-12, atol=1e-12)


def test_a_bit_that_costs_nothing_leaves_the_nearest_codes(generator):
    values = torch.randn(17, generator=generator).double().sort().values
    found = coding.boundaries_of_least_cost(values, torch.arange(1, 18), 0.0)
    torch.testing.assert_close(found, (values[1:] + values[:-1]) / 2)
