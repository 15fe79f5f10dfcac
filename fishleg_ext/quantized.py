"""What a quantization returns, and how it is read back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fishleg_ext.common.arguments import checked_flag, checked_type
from fishleg_ext.common.optimizers import after_each_step
from fishleg_ext.ops.quantize import kept_counts
from fishleg_ext.quantization import files
from fishleg_ext.quantization.entropy import entropy, mean_entropy
from fishleg_ext.quantization.export import export_compressed_tensors
from fishleg_ext.quantization.packed import QuantizedTensor
from fishleg_ext.quantization.retraining import Retraining, Trained


class QuantizeResult:
    """The outcome of a quantization: packed tensors, what they cost, and a file of them.

    Attributes:
        model: the model, whose weights are the values of the codes.
        distortion: what the quantization costs by the curvature, before retraining: 1/2 sum h (w - q)^2 over the
            weights that have codes, h being the diagonal of F, or for "obq" 1/2 dw^T F dw of the whole move, that of
            weights which it pruned among it. The two are of one kind under the diagonal Fisher matrix alone.
        coding: of the saved file, "fixed" or "entropy".
        settings: of the quantization, JSON-able.
        dense: name -> why it was not quantized, of the other parameters of two dimensions and more.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        tensors: Mapping[str, QuantizedTensor],
        importances: Mapping[str, Tensor],
        distortion: float,
        coding: str,
        settings: Mapping[str, Any],
        dense: Mapping[str, str],
    ) -> None:
        self.model, self.distortion, self.coding = model, distortion, coding
        self.settings, self.dense = dict(settings), dict(dense)
        self._tensors, self._importances = dict(tensors), dict(importances)
        self._trained: dict[str, Trained] = {}

    def __repr__(self) -> str:
        """Say how many parameters there are and their bits."""
        what = f"{len(self._tensors)} parameters, {self.mean_bits:.2f} bits, distortion={self.distortion:.3g}"
        return f"QuantizeResult({what})"

    @property
    def tensors(self) -> dict[str, QuantizedTensor]:
        """Name -> packed codes, as they are now where weights are retrained."""
        for name, trained in self._trained.items():
            self._tensors[name] = trained.packed()
        return dict(self._tensors)

    @property
    def bits(self) -> dict[str, Tensor]:
        """Name -> bits of the codes of each group, uint8 [G]."""
        return {name: tensor.bits for name, tensor in self.tensors.items()}

    @property
    def mean_bits(self) -> float:
        """Bits of a code, on average over all weights that have one; with coding="entropy" their entropy."""
        tensors = self.tensors.values()
        if self.coding == "entropy":
            return mean_entropy(tensor.counts() for tensor in tensors)
        counts = [kept_counts(t.numel, t.group_size, t.mask(), t.bits.device) for t in tensors]
        spent = sum(int((count * t.bits.long()).sum()) for count, t in zip(counts, tensors, strict=True))
        return spent / max(1, sum(int(count.sum()) for count in counts))

    @property
    def size(self) -> int:
        """Bytes of the file that `save` writes."""
        return files.num_bytes(*self._contents())

    @property
    def dense_size(self) -> int:
        """Bytes of the model's state dict, tied tensors counted once, as its dtypes have them."""
        seen = {tensor.data_ptr(): tensor for tensor in self.model.state_dict().values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())

    def sizes(self) -> dict[str, int]:
        """Bytes of the file by what they are: codes, codebooks, scales, bits, masks, other tensors, header."""
        content, metadata = self._contents()
        kinds = {"codes": 0, "codebook": 0, "scale": 0, "bits": 0, "mask": 0, "other tensors": 0}
        for name, tensor in content.items():
            owner, _, stream = name.rpartition(".")
            kind = stream if owner in self._tensors and stream in kinds else "other tensors"
            kinds[kind] += tensor.numel() * tensor.element_size()
        return kinds | {"header": files.num_bytes(content, metadata) - sum(kinds.values())}

    def table(self) -> str:
        """Return a table of the parameters: shape, codes, bits, entropy, why it is dense."""
        rows = []
        for name, tensor in self.tensors.items():
            codes = tensor.kept_codes()
            bits = tensor.bits.float()
            width = f"{int(bits[0])}" if len(bits) == 1 else f"{int(bits.min())} to {int(bits.max())}"
            rows.append([name, str(list(tensor.shape)), len(codes), width, f"{entropy(codes):.2f}", ""])
        rows += [[name, "", "", "", "", why] for name, why in self.dense.items()]
        headers = ["parameter", "shape", "codes", "bits", "entropy", "why it is not quantized"]
        return tabulate(rows, headers, tablefmt="plain", colalign=("left", "left", "right", "right", "right", "left"))

    def save(self, path: str | Path) -> None:
        """Write the packed model, in place of an older file if there is one: whole, or not at all.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the path has another suffix than .safetensors; weights changed since they were quantized, as by
                training without `attach`.
            OSError: it cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"expected a path that ends in .safetensors, got {path}")
        self._check_weights()
        files.write(*self._contents(), path)

    def attach(self, optimizer: torch.optim.Optimizer, *, refit: bool = True) -> "Attachment":
        """From now on let the optimizer train the weights behind the codes: a straight-through gradient.

        After each of its steps the real-valued weights, which begin as the quantized ones, move by what the optimizer
        did, and the model's are set to the values of their codes. Pruned weights stay zero; without masks, weights that
        were zero may get another code. Codes of uniform grids (coding="entropy") are chosen by their bits, too, so that
        all together they have no more entropy than before; of fixed-point numbers it may grow. Until `remove` two
        copies of the weights are held: the real-valued ones, and what the model's were set to last. A step that the
        dtype of the parameters rounds away is lost.

        Args:
            optimizer: of some of the quantized parameters at least; those that it does not have stay as they are.
            refit: move the codebooks and scales, too, to those that are best for the present codes.

        Returns:
            a handle; its `remove()` ends this.

        Raises:
            ValueError: it is an optimizer of none of the quantized parameters; another one is attached to some of them,
                or weights changed since they were quantized.
            TypeError: it is no optimizer.
        """
        checked_flag("refit", refit)
        parameters = {name: self.model.get_parameter(name) for name in self._tensors}

        retraining = Retraining(refit)
        handle = after_each_step(optimizer, parameters.values(), torch.no_grad()(retraining.step))
        try:
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            names = [name for name, parameter in parameters.items() if id(parameter) in owned]
            if twice := [name for name in names if name in self._trained]:
                raise ValueError(f"expected parameters that no optimizer is attached to, got {', '.join(twice)}")
            self._check_weights()
            with torch.no_grad():
                tensors, h = self._tensors, self._importances
                retraining.trained = {n: Trained.of(parameters[n], tensors[n], h[n]) for n in names}
                if self.settings["grid"] == "uniform":
                    retraining.keep_entropy()
        except BaseException:
            handle.remove()
            raise
        self._trained |= retraining.trained

        def remove() -> None:
            handle.remove()
            for name, trained in retraining.trained.items():
                self._tensors[name] = trained.packed()
                self._trained.pop(name, None)
            retraining.trained = {}

        return Attachment(remove)

    def _check_weights(self) -> None:
        """Raise ValueError unless the weights of the model are the values of their codes."""
        for name, tensor in self.tensors.items():
            parameter = self.model.get_parameter(name).detach()
            if not torch.equal(tensor.to(parameter.device).unpack(), parameter):
                raise ValueError(
                    f"{name} changed since it was quantized; attach the optimizer that trains it, or quantize again"
                )

    def export_compressed_tensors(self, folder: str | Path) -> dict[str, str]:
        """Write the model as compressed-tensors lays it out ("pack-quantized"), which transformers and vLLM load.

        For linear layers of method="fixed_point" (or "obq" with grid="fixed_point"), allocate=False and no masks; what
        was quantized otherwise is written dense. Scales are in the dtype of the weights: those of narrower ones than
        float32 are rounded to it.

        Args:
            folder: model.safetensors and config.json are written there, with the model's own config, if it has one.

        Returns:
            name -> why it was written dense.

        Raises:
            ValueError: the layout can hold none of the parameters.
            ImportError: safetensors is not installed.
        """
        self._check_weights()
        return export_compressed_tensors(self.model, self.tensors, self._others(), Path(folder))

    def _others(self) -> dict[str, Tensor]:
        """Tensors of the state dict that are not quantized, tied ones once."""
        own = {id(self.model.get_parameter(name)) for name in self._tensors}
        first = dict(self.model.named_parameters())
        aliases = {n for n, p in self.model.named_parameters(remove_duplicate=False) if n not in first or id(p) in own}
        return {name: x for name, x in self.model.state_dict().items() if name not in aliases}

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return files.contents_of(self.tensors, self._others(), self.coding)


class Attachment:
    """Holds what an optimizer trains of a quantized model, until `remove`."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove = remove

    def remove(self) -> None:
        """End the training of quantized weights; the model is left as it is."""
        self._remove()


def load_quantized(path: str | Path, model: nn.Module | None = None) -> Any:
    """Read what `QuantizeResult.save` wrote. Runs no code that the file may hold.

    Args:
        path: of the file. Without a model it may ask for as much memory as the shapes that it names.
        model: of the same architecture, whose parameters and buffers are set to those of the file: its weights are
            those of the quantized model to the bit. If anything is raised it is as before. None reads the packed
            tensors alone.

    Returns:
        the model, or without one name -> `QuantizedTensor`, whose `unpack` gives weights, or the tensor itself of what
        was not quantized.

    Raises:
        ValueError: the file is truncated, altered or of another kind, or of another model, or one of another dtype.
        ImportError: safetensors is not installed.
        OSError: it cannot be opened.
    """
    if model is None:
        tensors, others = files.read(Path(path))
        return {**tensors, **others}
    checked_type("model", model, nn.Module, "an nn.Module")
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors, others = files.read(Path(path), own)
    state = {**others, **{name: tensor.unpack() for name, tensor in tensors.items()}}
    known = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in known.items():  # tied parameters are in the file once
        if name not in state and names[id(parameter)] in state:
            state[name] = state[names[id(parameter)]]
    given = {name: list(tensor.shape) for name, tensor in state.items()}
    other = [n for n, t in tensors.items() if n in own and model.state_dict()[n].dtype != t.dtype]
    if other:
        kinds = f"{tensors[other[0]].dtype}, got {model.state_dict()[other[0]].dtype}"
        raise ValueError(f"expected a model with {other[0]} in {kinds}: its weights would be other ones")
    if unlike := [n for n in {**own, **given} if own.get(n) != given.get(n)]:
        listed = ", ".join(f"{n} is {own.get(n, 'missing')}, not {given.get(n, 'there')}" for n in unlike[:5])
        raise ValueError(f"expected a model with the tensors of {path}: {listed}")
    model.load_state_dict(state)
    return model


__all__ = ["QuantizeResult", "QuantizedTensor", "load_quantized"]
