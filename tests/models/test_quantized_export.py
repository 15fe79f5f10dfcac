"""The export in the layout of compressed-tensors, read back by that package."""

import copy
import json

import pytest
import torch
from torch import nn

from fishleg_ext import quantize

compressed_tensors = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def fixed_point(model, **options):
    given = {"method": "fixed_point", "curvature": "identity", "allocate": False, "progress": False} | options
    return quantize(model, None, **given)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("group", ["tensor", "row", 8])
def test_every_layer_is_read_back_to_the_bit(bits, group, tmp_path):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 7), nn.ReLU(), nn.Linear(7, 8), nn.Sequential(nn.Linear(8, 16)))
    model[0].weight.data[2] = 0
    params = ["0.weight", "3.0.weight"]  # whose rows groups of 8 divide
    result = fixed_point(model, bits=bits, group=group, params=params)
    assert result.export_compressed_tensors(tmp_path / "folder") == {}
    state = load_file(tmp_path / "folder" / "model.safetensors")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    compressed_tensors.quantization.QuantizationConfig.model_validate(config)
    assert config["ignore"] == ["2"]
    schemes = {name: scheme for scheme in config["config_groups"].values() for name in scheme["targets"]}
    assert schemes.keys() == {"0", "3.0"}
    for name, scheme in schemes.items():
        prefix = f"{name}.weight_"
        own = {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(prefix)}
        read = PackedQuantizationCompressor.decompress(own, QuantizationScheme(**scheme))
        assert torch.equal(read["weight"], model.get_submodule(name).weight)
    assert torch.equal(state["2.weight"], model[2].weight)


def test_a_language_model_is_loaded_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **size)).eval()
    fixed_point(model, bits=4, group="row", params="re:proj").export_compressed_tensors(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_the_layout_cannot_hold_is_dense_or_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 8))
    dense = fixed_point(copy.deepcopy(model), bits=4, group=8).export_compressed_tensors(tmp_path)
    assert dense == {
        "0.weight": "it is the weight of no linear layer",
        "2.weight": "its groups of 8 do not divide its rows of 12",
    }
    masks = {"3.weight": torch.rand(8, 8) < 0.5}
    for options, reason in (
        ({"masks": masks}, "levels without zero"),
        ({"method": "codebook"}, "it has a codebook"),
        ({"bits": 2.5, "allocate": True, "group": "row"}, "different bits"),
        ({"group": 16}, "longer than its rows of 8"),
    ):
        given = {"bits": 3, "params": "3.weight"} | options
        with pytest.raises(ValueError, match=f"the layout holds none of the parameters: 3.weight: .*{reason}"):
            fixed_point(copy.deepcopy(model), **given).export_compressed_tensors(tmp_path)
