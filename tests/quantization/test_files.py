"""Files of quantized models: what is broken, altered or foreign is refused."""

import json
import struct

import pytest
import torch
from small import assert_same, make_net, snapshot
from torch import nn

from fishleg_ext import load_quantized, prune, quantize
from fishleg_ext.common.files import read_safetensors
from fishleg_ext.quantization import files


class TestFiles:
    """Files that are broken or foreign are refused, and the model is as before."""

    @pytest.fixture
    def path(self, net, data, tmp_path):
        masks = prune(net, data, sparsity=0.6, num_grads=48, progress=False).masks
        quantize(net, data, bits=3, masks=masks, coding="entropy", num_grads=48, progress=False).save(
            tmp_path / "net.safetensors"
        )
        return tmp_path / "net.safetensors"

    def refused(self, path, match):
        model = make_net()
        before = snapshot(model)
        with pytest.raises(ValueError, match=match):
            load_quantized(path, model)
        assert_same(before, snapshot(model))

    def test_truncated(self, path):
        content = path.read_bytes()
        for length in (0, 7, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            self.refused(path, "truncated, or no safetensors file")

    def test_altered(self, path):
        content = bytearray(path.read_bytes())
        header = struct.unpack("<Q", content[:8])[0]
        for place in range(8 + header, len(content), 97):
            changed = content.copy()
            changed[place] ^= 1
            path.write_bytes(changed)
            self.refused(path, "was altered since it was written")
        text = content[8 : 8 + header]
        path.write_bytes(content[:8] + text.replace(b"float32", b"float64") + content[8 + header :])
        self.refused(path, "altered|truncated")

    def test_streams_that_do_not_fit(self, path, generator):
        """As of one who computes the checksum, too."""
        name, layer = "weight", nn.Linear(200, 50)
        layer.weight.data.normal_(generator=generator)
        masks = {name: torch.rand(50, 200, generator=generator) < 0.3}
        options = {"curvature": "identity", "coding": "entropy", "masks": masks, "progress": False}
        quantize(layer, None, bits=2, **options).save(path)
        assert_same(snapshot(load_quantized(path, nn.Linear(200, 50))), snapshot(layer))
        content, metadata = read_safetensors(path)
        entries = json.loads(metadata[files.KEY])
        assert entries[name].keys() >= {"num_codes", "num_gaps"}
        for change in (
            {"bits": 9},
            {"num_codes": 3},
            {"num_codes": 10**12},
            {"shape": [7]},
            {"dtype": "load"},
            {"group_size": 2},
            {"mask": 9},
            {"num_gaps": 5},
            {"shape": [-50, -200]},
            {"group_size": 10**9},
            {"orientation": {"split": [1], "order": [3], "num_out": 1}},
        ):
            text = json.dumps({**entries, name: entries[name] | change})
            altered = {files.KEY: text, files.CHECKSUM: files._checksum(content, text)}
            files.write(content, altered, path)
            with pytest.raises(ValueError, match="weight cannot be unpacked"):
                load_quantized(path)

    def test_shapes_are_compared_before_memory_is_taken(self, path):
        content, metadata = read_safetensors(path)
        entries = json.loads(metadata[files.KEY])
        for changed in (entries | {"4.weight": entries["4.weight"] | {"shape": [10**12]}}, [1, 2], 3):
            text = json.dumps(changed)
            files.write(content, {files.KEY: text, files.CHECKSUM: files._checksum(content, text)}, path)
            self.refused(path, "expected a model with the tensors|says in no way")

    def test_foreign_and_of_another_model(self, path, net, tmp_path):
        with pytest.raises(ValueError, match=r"expected a path that ends in .safetensors"):
            quantize(net, None, bits=3, curvature="identity", progress=False).save(tmp_path / "net.pt")
        with pytest.raises(ValueError, match="expected a model with the tensors of"):
            load_quantized(path, nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"expected a model with .* in torch.float32, got torch.float64"):
            load_quantized(path, make_net().double())
        with pytest.raises(OSError, match="No such file"):
            load_quantized(tmp_path / "none.safetensors")
        import safetensors.torch

        safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="no file of a quantized model"):
            load_quantized(tmp_path / "x.safetensors")
