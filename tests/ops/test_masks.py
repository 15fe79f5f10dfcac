"""pack_mask, unpack_mask, apply_masks_, and the masks of a model."""

import numpy as np
import pytest
import torch
from torch import nn

from fishleg_ext import ops
from fishleg_ext.sparsity.masks import Masks
from fishleg_ext.testing.check import device_of

SHAPES = [(1,), (8,), (9,), (3, 5), (2, 3, 7), (0,), (), (1000,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_numpys_little_endian_order_and_reverses(shape, generator):
    mask = torch.rand(shape, generator=generator) < 0.5
    packed = ops.pack_mask(mask)
    assert packed.tolist() == np.packbits(mask.numpy().reshape(-1), bitorder="little").tolist()
    assert torch.equal(ops.unpack_mask(packed, mask.shape), mask)


def test_packing_reads_views_in_logical_order(generator):
    mask = (torch.rand(6, 10, generator=generator) < 0.5)[::2].mT
    assert torch.equal(ops.pack_mask(mask), ops.pack_mask(mask.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_apply_zeroes_exactly_the_pruned(dtype, generator):
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    masks = [torch.rand(shape, generator=generator) < 0.5 for shape in SHAPES]
    expected = [torch.where(m, t, torch.zeros((), dtype=dtype)) for t, m in zip(tensors, masks, strict=True)]
    ops.apply_masks_(tensors, [ops.pack_mask(m) for m in masks])
    assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))


def test_apply_clears_nan_and_inf():
    tensor = torch.tensor([torch.nan, torch.inf, torch.nan, 1.0])
    ops.apply_masks_([tensor], [ops.pack_mask(torch.tensor([False, False, True, True]))])
    assert tensor[:2].tolist() == [0, 0]
    assert tensor[2].isnan()
    assert tensor[3] == 1


def test_apply_follows_the_logical_order_of_views(generator):
    weight = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 3, 2, 2, generator=generator) < 0.5
    expected = weight * mask
    ops.apply_masks_([weight], [ops.pack_mask(mask)])
    assert torch.equal(weight, expected)


def test_apply_refuses_bad_input():
    with pytest.raises(ValueError, match=r"packed_masks\[0\] of shape \[2\].*got \[1\]"):
        ops.apply_masks_([torch.ones(9)], [torch.zeros(1, dtype=torch.uint8)])
    with pytest.raises(TypeError, match="uint8"):
        ops.apply_masks_([torch.ones(8)], [torch.zeros(1)])
    with pytest.raises(ValueError, match="one memory cell"):
        ops.apply_masks_([torch.ones(1).expand(8)], [torch.zeros(1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="as many packed_masks as tensors, 1, got 0"):
        ops.apply_masks_([torch.ones(8)], [])
    with pytest.raises(TypeError, match="bool"):
        ops.pack_mask(torch.ones(3))
    with pytest.raises(TypeError, match="dense"):
        ops.pack_mask(torch.ones(3, dtype=torch.bool).to_sparse())
    with pytest.raises(ValueError, match=r"packed of shape \[2\]"):
        ops.unpack_mask(torch.zeros(1, dtype=torch.uint8), [9])


@pytest.mark.triton
class TestTritonTables:
    """The kernel reads addresses from tables that are kept."""

    @pytest.fixture
    def tables(self, monkeypatch):
        from fishleg_ext.kernels import tables

        monkeypatch.setattr(tables, "_tables", {})
        monkeypatch.setattr(tables, "MAX_TABLES", 3)
        return tables._tables

    @pytest.fixture
    def device(self):
        return device_of("triton")

    def test_the_same_tensors_take_the_same_table(self, tables, device):
        tensors = [torch.ones(5000, device=device), torch.ones(9, device=device), torch.ones(0, device=device)]
        packed = [ops.pack_mask(torch.zeros_like(t, dtype=torch.bool)) for t in tensors]
        ops.apply_masks_(tensors, packed, impl="triton")
        (table,) = tables.values()
        assert table.shape == (3, 3)  # two tiles and one
        assert table.device == tensors[0].device
        assert not any(t.any() for t in tensors)
        tensors[0].fill_(1)
        packed[0].fill_(1)  # what the table points to may change
        ops.apply_masks_(tensors, packed, impl="triton")
        assert [id(t) for t in tables.values()] == [id(table)]
        assert tensors[0].nonzero()[:, 0].tolist() == list(range(0, 5000, 8))

    def test_one_launch_for_each_width(self, tables, device, monkeypatch):
        from fishleg_ext.kernels import masks

        launches, kernel = [], masks.apply_masks_kernel
        counted = type("Counted", (), {"__getitem__": lambda _, grid: launches.append(grid) or kernel[grid]})
        monkeypatch.setattr(masks, "apply_masks_kernel", counted())
        dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
        tensors = [torch.ones(33, dtype=dtype, device=device) for dtype in dtypes]
        packed = [ops.pack_mask(torch.zeros(33, dtype=torch.bool, device=device))] * 5
        ops.apply_masks_(tensors, packed, impl="triton")
        assert launches == [(2,), (1,), (2,)]
        assert [(key[1][0] // 4096, len(table)) for key, table in tables.items()] == [(4, 2), (8, 1), (2, 2)]
        assert not any(t.any() for t in tensors)

    def test_tables_are_given_away_when_there_are_too_many(self, tables, device):
        packed = [ops.pack_mask(torch.zeros(8, dtype=torch.bool, device=device))]
        kept = []
        for size in range(1, 9):
            kept.append(torch.ones(size, device=device))
            ops.apply_masks_([kept[-1]], packed, impl="triton")
            assert 1 <= len(tables) <= 3
        assert not any(t.any() for t in kept)

    def test_a_tensor_that_is_not_contiguous_is_refused_with_its_name(self, device):
        tensors = [torch.ones(8, device=device), torch.ones(4, 2, device=device).mT]
        packed = [ops.pack_mask(torch.ones(8, dtype=torch.bool, device=device))] * 2
        with pytest.raises(NotImplementedError, match=r"contiguous tensors, and tensors\[1\] or its mask is not"):
            ops.apply_masks_(tensors, packed, impl="triton")


def layers():
    return dict(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).named_parameters())


def test_masks_hold_count_and_apply(generator):
    weights = layers()
    masks = Masks(weights)
    assert masks.sparsity() == 0
    wanted = {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in weights.items()}
    given = {name: mask.clone() for name, mask in wanted.items()}
    masks.set(given)
    given["0.weight"].fill_(True)  # the masks are copies
    masks.apply()
    total = sum(w.numel() for w in weights.values())
    assert masks.sparsity() == sum(int((~m).sum()) for m in wanted.values()) / total
    assert masks.layer_sparsity()["0.weight"] == float((~wanted["0.weight"]).double().mean())
    for name, w in weights.items():
        assert not w[~wanted[name]].any()
        assert w[wanted[name]].all()
        assert w.requires_grad
    masks.set({name: torch.zeros_like(mask) for name, mask in masks.items()})
    masks.apply()  # those of now, not those packed before
    assert not any(w.any() for w in weights.values())


def test_masks_of_channels_last_weights(generator, monkeypatch):
    """They are applied in the order of memory, also after that order has changed."""
    weight = nn.Parameter(torch.randn(4, 3, 2, 2, generator=generator))
    given = []
    apply = ops.apply_masks_
    monkeypatch.setattr(ops, "apply_masks_", lambda tensors, packed: (given.extend(tensors), apply(tensors, packed)))
    masks = Masks({"weight": weight})
    masks.set({"weight": torch.rand(weight.shape, generator=generator) < 0.5})
    for layout in (torch.contiguous_format, torch.channels_last, torch.channels_last, torch.contiguous_format):
        weight.data = torch.randn(weight.shape, generator=generator).to(memory_format=layout)
        expected = weight.detach() * masks["weight"]
        masks.apply()
        assert torch.equal(weight, expected)
    assert all(tensor.is_contiguous() for tensor in given)
    scalar = Masks({"scalar": nn.Parameter(torch.ones(()))})
    scalar.set({"scalar": torch.tensor(False)})
    scalar.apply()
    assert not scalar.weights["scalar"].any()


def test_masks_survive_a_state_dict(tmp_path, generator):
    masks = Masks(layers())
    masks.set({name: torch.rand(m.shape, generator=generator) < 0.5 for name, m in masks.items()})
    torch.save(masks.state_dict(), tmp_path / "masks.pt")
    again = Masks(layers())
    again.load_state_dict(torch.load(tmp_path / "masks.pt", weights_only=True))
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


def test_bad_masks_change_nothing():
    masks = Masks(layers())
    good = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    with pytest.raises(ValueError, match=r"mask of 1.bias of shape of the parameter = \[2\], got \[3\]"):
        masks.set(good | {"1.bias": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(TypeError, match="mask of 0.bias"):
        masks.set(good | {"0.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="missing or unknown: 2.weight"):
        masks.set(good | {"2.weight": torch.zeros(1, dtype=torch.bool)})
    assert all(mask.all() for mask in masks.values())
