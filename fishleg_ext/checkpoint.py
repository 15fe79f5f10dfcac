"""Files that survive a kill: a training run's state, and pruned models for others to read.

`save` writes a file whole or not at all. `export_pruned` writes a folder that needs no fishleg_ext to be read:
model.safetensors, dense, zeros and all; masks.safetensors, bool, True = kept; and pruning.json, what was done.
Of models of transformers it holds the configuration, too.
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.arguments import checked_type
from fishleg_ext.common.files import read_safetensors, replace_file, require_safetensors
from fishleg_ext.config import PruneConfig
from fishleg_ext.result import PruneResult

STRUCTURE = "fishleg_ext.structure"  # where version 0.1 wrote how a state is nested, in a file's metadata
EXPORT = "fishleg_ext.export"  # says which files were written together


def save(content: Any, path: str | Path) -> None:
    """Write tensors, numbers and strings in nested dicts, lists and tuples; in place of an older file, if there is one.

    Killed at any moment, there is the older file or the new one, never a part of it.

    Args:
        content: what `load` is to give back, tensors on the CPU: state dicts of modules, optimizers, a `Pruner`.
        path: a file of torch.save.

    Raises:
        TypeError: anything else in the content; its place is named.
        ValueError: the file is named as safetensors, which hold tensors by name alone.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise ValueError(
            f"expected another suffix than that of {path}: safetensors hold tensors by name alone, and the state of a "
            "run is nested; it is a file of torch.save, such as run.pt"
        )
    plain = _plain(content, "")
    replace_file(path, lambda partial: torch.save(plain, partial))


def load(path: str | Path) -> Any:
    """Read what `save` wrote; of a safetensors file its tensors by name, or the state that version 0.1 wrote there.

    Runs no code that the file may hold.

    Raises:
        ValueError: the file is truncated, or of another kind.
        OSError: it cannot be opened.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return _decoded(json.loads(metadata[STRUCTURE]), tensors) if STRUCTURE in metadata else tensors
    with path.open("rb") as file:
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever the unpickler trips over
            raise ValueError(f"{path} is truncated, or no file of torch.save that holds tensors alone") from error


def export_pruned(
    model: nn.Module, result: PruneResult, folder: str | Path, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a pruned model for others to read.

    Args:
        model: its state dict becomes model.safetensors; tensors that share memory are written once for each name. Of a
            model of transformers the configuration is written as well, so that `from_pretrained` loads the folder.
        result: its masks become masks.safetensors, the rest of it pruning.json.
        folder: made if it is not there.
        notes: more for pruning.json.

    Raises:
        ValueError: weights that a mask of the result prunes are not zero.
        TypeError: the result is no PruneResult.
        ImportError: safetensors is not installed.
    """
    checked_type("result", result, PruneResult, "a PruneResult")
    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    _check_zeros(state, result.masks, "the model")
    folder.mkdir(parents=True, exist_ok=True)
    masks = {name: mask.cpu().contiguous() for name, mask in result.masks.items()}
    export = uuid.uuid4().hex
    _write_safetensors(masks, folder / "masks.safetensors", {EXPORT: export})
    _write_safetensors(state, folder / "model.safetensors", {"format": "pt", EXPORT: export})
    for name in ("config", "generation_config"):
        write = getattr(getattr(model, name, None), "save_pretrained", None)
        if write is not None:  # of transformers, whose from_pretrained then reads the folder
            write(folder)
    report = {
        "export": export,
        "sparsity": result.sparsity,
        "layer_sparsity": result.layer_sparsity,
        "predicted_loss_increase": result.predicted_loss_increase,
        "history": result.history,
        "config": None if result.config is None else result.config.to_dict(),
        "notes": dict(notes or {}),
    }
    text = json.dumps(report, indent=1) + "\n"
    replace_file(folder / "pruning.json", lambda partial: partial.write_text(text))


def import_pruned(model: nn.Module, folder: str | Path) -> PruneResult:
    """Load what `export_pruned` wrote into a model of the same architecture; if anything is raised it is as before.

    Returns:
        the result of the pruning, as of then. Its config is None where the file has none, or one with a function.

    Raises:
        ValueError: a file is truncated or foreign, or they do not belong together or to the model.
        OSError: a file is missing.
    """
    folder = Path(folder)
    state, of_model = read_safetensors(folder / "model.safetensors")
    masks, of_masks = read_safetensors(folder / "masks.safetensors")
    try:
        report = json.loads((folder / "pruning.json").read_text())
        export = report["export"]
        fields = {n: report[n] for n in ("sparsity", "layer_sparsity", "predicted_loss_increase", "history")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'pruning.json'} is truncated, or not of a pruned model: {error!r}") from error
    if not export == of_model.get(EXPORT) == of_masks.get(EXPORT):
        raise ValueError(
            f"expected files that were written together in {folder}; was an export over an older one killed?"
        )
    _check_zeros(state, masks, str(folder / "model.safetensors"))
    own = model.state_dict()
    shapes, given = ({n: list(t.shape) for n, t in tensors.items()} for tensors in (own, state))
    if unlike := [n for n in {**shapes, **given} if shapes.get(n) != given.get(n)]:
        listed = ", ".join(f"{n} is {shapes.get(n, 'missing')}, not {given.get(n, 'there')}" for n in unlike)
        raise ValueError(f"expected a model with the tensors of {folder}: {listed}")
    model.load_state_dict(state)
    try:
        config = PruneConfig.from_dict(report["config"])
    except (ValueError, TypeError, KeyError, AttributeError):  # none, as of older versions, or one that held a function
        config = None
    return PruneResult(masks=masks, config=config, **fields)


def _check_zeros(state: Mapping[str, Tensor], masks: Mapping[str, Tensor], of: str) -> None:
    for name, mask in masks.items():
        if name not in state or state[name].shape != mask.shape:
            raise ValueError(f"expected {of} to have {name} of shape {list(mask.shape)}, as its mask has")
        if state[name][~mask.cpu()].any():
            raise ValueError(f"expected zeros where {name} of {of} is pruned; call finalize() or apply_masks() first")


def _write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    package = require_safetensors()
    replace_file(path, lambda partial: package.torch.save_file(dict(tensors), partial, dict(metadata) or None))


def _decoded(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Nest tensors as version 0.1 wrote them."""
    if isinstance(structure, list):
        return [_decoded(value, tensors) for value in structure]
    if not isinstance(structure, dict):
        return structure
    ((kind, value),) = structure.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(_decoded(item, tensors) for item in value)
    return {key: _decoded(item, tensors) for key, item in value}


def _plain(content: Any, place: str) -> Any:
    """The same of dicts, lists, tuples and Python's own scalars; TypeError if it is made of anything else."""
    inner = f"{place}." if place else ""
    if isinstance(content, Mapping):
        if unfit := [key for key in content if type(key) not in (str, int)]:
            raise TypeError(f"expected keys that are strings or integers in {place or 'content'}, got {unfit[0]!r}")
        return {key: _plain(value, f"{inner}{key}") for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        items = (_plain(value, f"{inner}{index}") for index, value in enumerate(content))
        return tuple(items) if isinstance(content, tuple) else list(items)
    if isinstance(content, Tensor) or content is None or isinstance(content, bool):
        return content.detach() if isinstance(content, Tensor) else content
    for kind in (str, int, float):  # and what is derived from them, such as NumPy's float64
        if isinstance(content, kind):
            return kind(content)
    raise TypeError(
        f"expected tensors, numbers, strings, dicts, lists and tuples, got {type(content).__name__} in {place}"
    )
