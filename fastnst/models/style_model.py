"""Style models: a trained transform net in one self-describing safetensors file.

Metadata, all strings: `kind` and `format_version`; `architecture` and `norm`, to build the network; and, where known,
`preset`, `style`, `style_sha256`, `steps`, `image_size` and `fastnst_version` for people and logs.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastnst import __version__
from fastnst.device import resolve_device
from fastnst.errors import DataError
from fastnst.models.files.early_checks import (
    FORMAT_VERSION,
    KIND,
    MODEL_NAME,
    check_style_model,
    find_style_model,
    listed,
    without_wrappers,
)
from fastnst.models.files.file_checks import excerpt
from fastnst.models.files.safetensors_file import open_safetensors
from fastnst.models.transform_net import TransformNet
from fastnst.storage import write_atomic

__all__ = ["FORMAT_VERSION", "KIND", "MODEL_NAME", "load_style_model", "read_style_metadata", "save_style_model"]


def save_style_model(path: Path, net: TransformNet, *, metadata: Mapping[str, str]) -> None:
    """Write a style model atomically, with its origin as `metadata`.

    Raises:
        DataError: a weight is not finite, or the storage fails; an older file stays as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    if bad := _not_finite(tensors):
        raise DataError(f"cannot save {path}: {bad} holds values that are not finite; the training has diverged")
    own = {"kind": KIND, "format_version": str(FORMAT_VERSION), **net.metadata}
    header = {"fastnst_version": __version__, **metadata, **own}
    write_atomic(path, safetensors.torch.save(tensors, metadata=header))


def load_style_model(path: Path | str, *, device: str | torch.device = "cpu") -> TransformNet:
    """Load a style model, in evaluation mode and without gradients.

    Args:
        path: a `model.safetensors`, or the run directory that holds one.
        device: `auto`, `cuda`, `cpu` or a PyTorch device.

    Raises:
        DataError: no such file, not a style model, one of a newer version, or damaged weights.
        DeviceError: no such device.
    """
    where = resolve_device(device) if isinstance(device, str) else device
    metadata = read_style_metadata(path)
    file = find_style_model(Path(path))
    tensors = _read_tensors(file)
    try:
        # Drawing the initial weights must not change the global random state.
        with torch.random.fork_rng(devices=[]):
            net = TransformNet.from_metadata(metadata)
    except DataError as error:
        raise DataError(f"{file}: {excerpt(str(error), 400)}") from error
    _check(file, net, tensors)
    net.load_state_dict(tensors)
    return net.to(where).eval().requires_grad_(False)


def read_style_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a style model; arguments and errors as in `load_style_model`."""
    return check_style_model(Path(path))


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a checked file by name, those of a wrapped net by their own."""
    try:
        with open_safetensors(file) as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the style model {file}: {error}; fetch it again") from error
    return dict(zip(without_wrappers(tensors), tensors.values(), strict=True))


def _check(file: Path, net: TransformNet, tensors: Mapping[str, Tensor]) -> None:
    kind = f"a {net.architecture} net with {net.norm} norm"
    wanted = net.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise DataError(f"{file} is damaged: {kind} lacks {listed(missing)}; train it again or fetch the file again")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise DataError(f"{file} is damaged: {kind} has no {listed(unknown)}; train it again or fetch the file again")
    for name, tensor in tensors.items():
        got, needed = (list(tensor.shape), tensor.dtype), (list(wanted[name].shape), wanted[name].dtype)
        if got != needed:
            raise DataError(f"{file} is damaged: {name} is {got[0]} {got[1]}, {kind} needs {needed[0]} {needed[1]}")
    if bad := _not_finite(tensors):
        raise DataError(f"{file} is damaged: {bad} holds values that are not finite; train it again")


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The first tensor with a NaN or infinity; empty if there is none."""
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), "")
