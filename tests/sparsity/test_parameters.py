"""Which parameters are pruned."""

import pytest
import torch
from torch import nn

from fishleg_ext.sparsity.parameters import choose_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6, 4)
        self.head = nn.Linear(4, 5)


def test_default_is_every_linear_and_conv_weight():
    assert list(choose_parameters(Net())) == ["conv.weight", "hidden.weight", "head.weight"]


def test_tied_weights_come_once_under_their_first_name():
    net = Net()
    net.head.weight = net.embed.weight
    assert list(choose_parameters(net)) == ["embed.weight", "conv.weight", "hidden.weight"]
    assert list(choose_parameters(net, "head.weight")) == ["embed.weight"]


@pytest.mark.parametrize(
    "params, expected",
    [
        ("hidden.weight", ["hidden.weight"]),
        (["head.bias", "conv.weight"], ["conv.weight", "head.bias"]),
        ("re:^h.*weight$", ["hidden.weight", "head.weight"]),
        (lambda name, p: p.dim() == 3, ["conv.weight"]),
    ],
)
def test_names_expressions_and_predicates(params, expected):
    assert list(choose_parameters(Net(), params)) == expected


def test_what_matches_nothing_is_named_with_a_suggestion():
    with pytest.raises(ValueError, match=r"no parameter matches 'hiden.weight'; did you mean hidden.weight"):
        choose_parameters(Net(), "hiden.weight")
    with pytest.raises(ValueError, match=r"'conv'; did you mean conv.weight or conv.bias\?"):
        choose_parameters(Net(), "conv")
    with pytest.raises(ValueError, match=r"'re:\(' is not a regular expression"):
        choose_parameters(Net(), "re:(")
    with pytest.raises(ValueError, match="'re:zzz'; there are embed.weight, conv.weight"):
        choose_parameters(Net(), ["conv.weight", "re:zzz"])
    with pytest.raises(ValueError, match="none of the 9 parameters"):
        choose_parameters(Net(), lambda name, p: False)
    with pytest.raises(ValueError, match="empty list"):
        choose_parameters(Net(), [])
    with pytest.raises(ValueError, match="Linear or Conv"):
        choose_parameters(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="hold names, got int"):
        choose_parameters(Net(), [3])


def test_bad_weights_are_named():
    net = Net()
    with torch.no_grad():
        net.conv.weight[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"conv.weight contains NaN or inf"):
        choose_parameters(net)
    net = Net()
    net.hidden.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"hidden.weight of a floating-point dtype, got torch.int8"):
        choose_parameters(net)
    net = Net()
    net.head.weight = nn.Parameter(torch.ones(5, 4).to_sparse())
    with pytest.raises(TypeError, match=r"head.weight to be a dense"):
        choose_parameters(net)
    with pytest.raises(TypeError, match="meta device"):
        choose_parameters(nn.Linear(2, 2, device="meta"))
