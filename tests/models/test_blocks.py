"""Other people's models block by block: as the network as a whole, or refused."""

import contextlib
import copy

import pytest
import torch

import fishleg_ext
from fishleg_ext.curvature import Kronecker, Layerwise
from models.zoo import SAMPLES, ZOO

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WALKED = {"llama", "gpt2", "gpt_neox", "bert", "vit", "gemma2", "mixtral"}


@pytest.fixture(params=ZOO)
def case(request):
    return request.param, ZOO[request.param]()


def pruned(case, **options):
    model, data = copy.deepcopy(case.model), [(case.inputs, case.targets)]
    settings = {"sparsity": 0.5, "num_grads": SAMPLES, "progress": False}
    result = fishleg_ext.prune(model, data, case.loss_fn, **(settings | options))
    return model, result


def test_block_by_block_is_as_the_whole_network_or_is_refused(case):
    name, case = case
    before, walked = copy.deepcopy(case.model.state_dict()), None
    dense = Layerwise(1e-2, inputs="dense")
    with contextlib.suppress(ValueError, NotImplementedError):
        walked, result = pruned(case, block_by_block=True, curvature=dense)
    if walked is None:
        assert name not in WALKED
        assert all(torch.equal(x, case.model.state_dict()[key]) for key, x in before.items())
        return
    whole, _ = pruned(case, params=[*result.masks], curvature=dense)
    assert all(torch.equal(x, y) for x, y in zip(walked.parameters(), whole.parameters(), strict=True))
    options = {"params": [*result.masks], "curvature": Kronecker(1e-2, labels="data")}
    walked, _ = pruned(case, block_by_block=True, block_gradients="loss", **options)
    whole, _ = pruned(case, **options)
    for x, y in zip(walked.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
