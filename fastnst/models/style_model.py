"""Style models: a trained transform net in one self-describing safetensors file.

Metadata, all strings: `kind` and `format_version`; `architecture` and `norm`, to build the network; and, where known,
`preset`, `style`, `style_sha256`, `steps`, `image_size` and `fastnst_version` for people and logs.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastnst import __version__
from fastnst.device import resolve_device
from fastnst.errors import DataError
from fastnst.models.file_checks import UnsafeFileError, check_safetensors_file, excerpt
from fastnst.models.safetensors_file import open_safetensors
from fastnst.models.transform_net import TransformNet
from fastnst.storage import write_atomic

MODEL_NAME = "model.safetensors"
KIND = "fastnst style model"
FORMAT_VERSION = 1


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
    file = _file_of(Path(path))
    metadata, tensors = _read(file)
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
    return _read(_file_of(Path(path)), weights=False)[0]


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    file = path / MODEL_NAME
    if not file.exists():
        if inside := sorted(found.parent for found in path.glob(f"*/{MODEL_NAME}")):
            raise DataError(f"{path} holds {len(inside)} style models, each in a folder; give one, such as {inside[0]}")
        raise DataError(f"{path} holds no {MODEL_NAME}: no style model was saved there yet; give a finished run")
    return file


def _read(file: Path, *, weights: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    advice = f"give a {MODEL_NAME} or run directory that fastnst train has written"
    if not file.exists():
        raise DataError(f"there is no style model {file}; {advice}")
    try:
        check_safetensors_file(file)
        with open_safetensors(file) as content:
            metadata = content.metadata() or {}
            names = list(content.keys())
            _check_kind(file, metadata, names, advice)
            return metadata, {name: content.get_tensor(name) for name in names} if weights else {}
    except OSError as error:
        raise DataError(f"cannot read the style model {file}: {error.strerror or error}; {advice}") from error
    except (UnsafeFileError, SafetensorError) as error:
        raise DataError(f"{file} is not a safetensors file, or it is cut short ({error}); {advice}") from error


def _check_kind(file: Path, metadata: Mapping[str, str], names: Iterable[str], advice: str) -> None:
    if metadata.get("kind") != KIND:
        raise DataError(f"{file} is another kind of model: it holds {_some(names)}; {advice}")
    version = metadata.get("format_version", "")
    if not re.fullmatch(r"[0-9]{1,18}", version):
        raise DataError(f"{file} is damaged: its format version is {version[:80]!r}; {advice}")
    if int(version) > FORMAT_VERSION:
        writer = excerpt(metadata.get("fastnst_version", "of a later version"))
        raise DataError(
            f"{file} was written by fastnst {writer} in format {version}, and fastnst {__version__} reads up to "
            f"format {FORMAT_VERSION}; install a newer fastnst"
        )


def _check(file: Path, net: TransformNet, tensors: Mapping[str, Tensor]) -> None:
    kind = f"a {net.architecture} net with {net.norm} norm"
    wanted = net.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise DataError(f"{file} is damaged: {kind} lacks {_some(missing)}; train it again or fetch the file again")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise DataError(f"{file} is damaged: {kind} has no {_some(unknown)}; train it again or fetch the file again")
    for name, tensor in tensors.items():
        got, needed = (list(tensor.shape), tensor.dtype), (list(wanted[name].shape), wanted[name].dtype)
        if got != needed:
            raise DataError(f"{file} is damaged: {name} is {got[0]} {got[1]}, {kind} needs {needed[0]} {needed[1]}")
    if bad := _not_finite(tensors):
        raise DataError(f"{file} is damaged: {bad} holds values that are not finite; train it again")


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The first tensor with a NaN or infinity; empty if there is none."""
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), "")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    if not listed:
        return "nothing"
    return ", ".join(map(excerpt, listed[:3])) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
