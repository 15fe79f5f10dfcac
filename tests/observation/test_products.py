"""Products in which a weight enters: their rows make up the gradient, whatever function computes them."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.recorder import ProductRecorder

TRANSPOSED = Orientation.of((6, 4), (1, 0))
EXPERTS = Orientation.of((3, 4, 6), num_out=2)
TRANSPOSED_EXPERTS = Orientation.of((3, 6, 4), (0, 2, 1), num_out=2)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def recorded(weight, forward, orientation=None):
    """The recorder of a forward pass, its output, and the weight that entered it."""
    weight = weight.detach().requires_grad_()
    recorder = ProductRecorder({"w": weight}, {"w": orientation} if orientation else None)
    with recorder:
        output = forward(weight)
    return recorder, output, weight


def check(weight, forward, orientation=None):
    """That the rows of all products make up the gradient by autograd; returns the products."""
    recorder, output, weight = recorded(weight, forward, orientation)
    uses = [*recorder.products, *recorder.lookups]
    expected, *gradients = torch.autograd.grad(
        (normal(*output.shape) * output).sum(), [weight, *(u.edge for u in uses)]
    )
    orientation = orientation or Orientation.of(weight.shape)
    total = torch.zeros(weight.numel() // orientation.fan_in, orientation.fan_in, dtype=torch.float64)
    for product, gradient in zip(recorder.products, gradients, strict=False):
        x, d = product.input_rows(), product.output_rows(gradient)
        assert x.shape[:2] == d.shape[:2] == (product.groups, x.shape[1])
        total[slice(*product.outputs)] += torch.einsum("gno,gni->goi", d, x).flatten(0, 1)
        if product.divisible:  # in parts as a whole
            parts = [product.input_rows(part) for part in product.inputs.split(2)]
            torch.testing.assert_close(torch.cat(parts, 1), x, rtol=0, atol=0)
            parts = [product.output_rows(part) for part in gradient.split(2)]
            torch.testing.assert_close(torch.cat(parts, 1), d, rtol=0, atol=0)
    made = orientation.to_parameter(total.reshape(orientation.matrix_shape))
    for lookup, gradient in zip(recorder.lookups, gradients[len(recorder.products) :], strict=True):
        lookup.add_gradient_(made, gradient)
    torch.testing.assert_close(made, expected, rtol=1e-11, atol=1e-11)
    assert recorder.products
    return recorder.products


X = normal(5, 7, 6)
CONTRACTIONS = {
    "linear": ((4, 6), None, lambda w: F.linear(X, w), 35),
    "linear of a vector": ((4, 6), None, lambda w: F.linear(X[0, 0], w), 1),
    "linear by keywords": ((4, 6), None, lambda w: F.linear(input=X, weight=w, bias=normal(4)), 35),
    "matmul": ((4, 6), None, lambda w: X @ w.t(), 35),
    "matmul from the left": ((4, 6), None, lambda w: w @ X.mT, 35),
    "reflected matmul": ((4, 6), None, lambda w: X[0].T.__rmatmul__(w), 7),
    "mv": ((4, 6), None, lambda w: torch.mv(w, X[0, 0]), 1),
    "matmul [in, out]": ((6, 4), TRANSPOSED, lambda w: X @ w, 35),
    "addmm": ((6, 4), TRANSPOSED, lambda w: torch.addmm(normal(4), X.flatten(0, 1), w, alpha=3, beta=2), 35),
    "a reshape": ((2, 2, 6), Orientation.of((2, 2, 6), num_out=2), lambda w: F.linear(X, w.view(4, 6)), 35),
    "einsum": ((4, 6), None, lambda w: torch.einsum("...i,oi->...o", X, w), 35),
    "einsum without an arrow": ((4, 6), None, lambda w: torch.einsum("bti,oi", X, w), 35),
    "einsum that sums positions": ((4, 6), None, lambda w: torch.einsum("bti,oi->bo", X, w), 5),
    "einsum of heads": (
        (2, 3, 6),
        Orientation.of((2, 3, 6), num_out=2),
        lambda w: torch.einsum("bti,hdi->bhtd", X, w),
        35,
    ),
    "bmm of experts": ((3, 4, 6), EXPERTS, lambda w: torch.bmm(normal(3, 5, 6), w.mT), 5),
    "baddbmm": ((3, 6, 4), TRANSPOSED_EXPERTS, lambda w: torch.baddbmm(normal(3, 1, 4), normal(3, 5, 6), w), 5),
    "experts with the same inputs": ((3, 6, 4), TRANSPOSED_EXPERTS, lambda w: normal(5, 1, 7, 6) @ w, 35),
    "expanded": ((4, 6), None, lambda w: torch.bmm(w.expand(5, 4, 6), X.mT), 35),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contractions(name):
    shape, orientation, forward, uses = CONTRACTIONS[name]
    products = check(normal(*shape), forward, orientation)
    assert [product.uses for product in products] == [uses]


def test_parts_of_a_weight_have_inputs_of_their_own():
    products = check(normal(12, 6), lambda w: sum((X @ chunk.t()).square() for chunk in w.chunk(3)))
    assert [product.outputs for product in products] == [(0, 4), (4, 8), (8, 12)]
    each = lambda w: torch.cat([X[: e + 1].flatten(0, 1) @ w[e].t() for e in range(3)])
    assert [product.uses for product in check(normal(3, 4, 6), each, EXPERTS)] == [7, 14, 21]


def test_grouped_matmul():
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)  # the second group is empty
    weight, x = normal(3, 8, 16).float(), normal(7, 16).float()
    orientation = Orientation.of((3, 8, 16), num_out=2)
    recorder, output, weight = recorded(weight, lambda w: torch._grouped_mm(x, w.mT, offs=ends), orientation)
    first, second = recorder.products
    expected, gradient = torch.autograd.grad(output.square().sum(), [weight, first.edge])
    assert (first.outputs, second.outputs) == ((0, 8), (16, 24))
    for product, expert in ((first, 0), (second, 2)):
        made = product.output_rows(gradient)[0].mT @ product.input_rows()[0]
        torch.testing.assert_close(made, expected[expert], rtol=1e-4, atol=1e-4)
    assert len(recorder.signature) == 1  # whichever groups are empty


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims):
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    size, kernel = [7, 6, 5][:dims], [3, 2, 2][:dims]
    channels_last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims, torch.contiguous_format)
    for groups, stride, padding, dilation in itertools.product((1, 2), (1, 2), (0, 1, "same", "valid"), (1, 2)):
        if padding == "same" and (stride != 1 or dims > 1):  # of even kernels PyTorch warns
            continue
        x, weight = normal(3, 4, *size), normal(6, 4 // groups, *kernel).contiguous(memory_format=channels_last)
        order = (0, *range(2, 2 + dims), 1)
        for orientation in (None, Orientation.of(weight.shape, order)):
            (product,) = check(
                weight, lambda w, x=x, o=(stride, padding, dilation, groups): conv(x, w, normal(6), *o), orientation
            )
            assert product.groups == groups
    check(normal(6, 4, *kernel), lambda w: conv(normal(4, *size), w))  # of a single sample


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims):
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    size, kernel = [4, 3, 3][:dims], [3, 2, 2][:dims]
    for groups, stride, padding, dilation, extra in itertools.product((1, 2), (1, 2), (0, 1), (1, 2), (0, 1)):
        if extra >= max(stride, dilation):
            continue
        x, weight = normal(3, 4, *size), normal(4, 3, *kernel)
        split = (groups, 4 // groups, 3, *kernel)
        orientation = Orientation.of(weight.shape, (0, 2, 1, *range(3, 3 + dims)), split=split, num_out=2)
        options = (normal(3 * groups), stride, padding, extra, groups, dilation)
        (product,) = check(weight, lambda w, x=x, o=options: conv(x, w, *o), orientation)
        assert product.uses == 3 * x[0, 0].numel()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_attention(training, cross, name):
    attention = nn.MultiheadAttention(6, 2, batch_first=True).double().train(training)
    queries, keys = normal(3, 5, 6), normal(3, 4, 6) if cross else normal(3, 5, 6)
    keys = keys if cross else queries
    forward = lambda w: torch.func.functional_call(attention, {name: w}, (queries, keys, keys))[0]
    products = check(attention.get_parameter(name).detach(), forward)
    assert len(products) == 1 + (cross and name == "in_proj_weight")


def test_the_fast_path_of_the_encoder_is_seen():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()
    weights = {name: p.detach() for name, p in encoder.named_parameters() if p.dim() > 1}
    with torch.no_grad(), ProductRecorder(weights) as recorder:
        torch.func.functional_call(encoder, weights, (torch.randn(3, 5, 8),))
    assert sorted(product.name for product in recorder.products) == sorted(weights)


def test_embeddings_are_looked_up():
    ids = torch.tensor([[1, 2], [3, 1]])
    check(normal(4, 6), lambda w: F.linear(F.embedding(ids, w, padding_idx=2), w))


@pytest.mark.parametrize(
    "forward, reason",
    [
        (lambda w: F.linear(X, w * 0.1), "mul"),
        (lambda w: F.linear(X, F.normalize(w)), "div"),
        (lambda w: F.linear(X, w.float().double()), "float"),
        (lambda w: X @ w[torch.tensor([1, 0])].t(), "__getitem__"),
        (lambda w: X[..., :3] @ w[:, :3].t(), "matmul, a part of its fan-in"),
        (lambda w: X @ w[::2].t(), "matmul, some of its outputs"),
        (lambda w: X[..., :4] @ w, "matmul, transposed"),
        (lambda w: w @ w.t(), "matmul, more than once"),
        (lambda w: torch.einsum("bti,oi,o->bto", X, w, normal(4)), "more than one other tensor"),
        (lambda w: F.bilinear(X[..., :4], X, w[None]), "bilinear"),
        (lambda w: X[..., :4] @ w.t().contiguous().t()[:, :6], "contiguous"),
        (lambda w: F.embedding_bag(torch.tensor([[0, 1]]), w), "embedding_bag"),
    ],
)
def test_what_is_no_product_is_noted_by_its_call(forward, reason):
    recorder, _, _ = recorded(normal(4, 6), forward)
    assert not recorder.products
    assert any(reason in call for call in recorder.others["w"]), recorder.others


def test_what_only_looks_at_a_weight_is_no_use():
    def forward(weight):
        assert weight.shape[0] == len(weight) == weight.size(0)
        torch.zeros_like(weight)
        weight.new_zeros(3)
        return F.linear(X, weight.data.view(4, 6)) if weight.is_floating_point() else None

    recorder, _, _ = recorded(normal(4, 6), forward)
    assert not recorder.others
    assert len(recorder.products) == 1


def test_fused_recurrent_layers_are_seen_to_be_used():
    lstm = nn.LSTM(6, 4).double()
    forward = lambda w: torch.func.functional_call(lstm, {"weight_ih_l0": w}, X)[0]
    recorder, _, _ = recorded(lstm.weight_ih_l0, forward)
    assert list(recorder.others["w"]) == ["lstm"]
