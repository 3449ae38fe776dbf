"""Check the files of networks as far as that needs no torch, whose import takes seconds.

Whatever a file is, its first bytes say it, and the message names what to do with it.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from fastnst import __version__
from fastnst.errors import DataError
from fastnst.file_kind import (
    EMPTY,
    LFS_POINTER,
    SAFETENSORS,
    TORCH_PICKLE,
    TORCH_ZIP,
    WEB_PAGE,
    file_group,
    file_kind,
    read_ends,
)
from fastnst.models.files.file_checks import UnsafeFileError, check_regular_file, check_safetensors_file, excerpt
from fastnst.models.files.safetensors_file import open_safetensors

MODEL_NAME = "model.safetensors"
KIND = "fastnst style model"
FORMAT_VERSION = 1

VGG19_ADVICE = "give a .pth or .safetensors file of VGG19, or --vgg auto or random"
_MODEL_ADVICE = f"give a {MODEL_NAME} or run directory that fastnst train has written"


def check_vgg19(spec: str) -> None:
    """Raise DataError unless `spec` is `auto`, `random`, or a file that may hold VGG19's weights."""
    if spec not in ("auto", "random"):
        check_vgg19_file(Path(spec).expanduser())


def check_vgg19_file(path: Path) -> str | None:
    """Return the kind of a file that may hold VGG19's weights; see `file_kind`.

    Raises:
        DataError: it is missing, unreadable, or of a kind that is not read.
    """
    if path.is_dir():
        raise DataError(f"the VGG19 weights {path} are a folder; {VGG19_ADVICE}")
    try:
        check_regular_file(path)
        ends = read_ends(path)
    except UnsafeFileError as error:
        raise DataError(f"cannot use the VGG19 weights {path}: {error}; {VGG19_ADVICE}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"cannot read the VGG19 weights {path}: {reason}; {VGG19_ADVICE}") from error
    kind = file_kind(*ends)
    if kind not in (None, SAFETENSORS, TORCH_ZIP, TORCH_PICKLE):
        raise DataError(f"{path} is {kind}, and {_vgg19_fix(*ends)}")
    return kind


def find_style_model(path: Path) -> Path:
    """Return the file of a style model: `path`, or `model.safetensors` in the folder `path`.

    Raises:
        DataError: a folder without it; the message names the run or the models that were probably meant.
    """
    if not path.is_dir():
        return path
    file = path / MODEL_NAME
    if file.exists():
        return file
    if inside := sorted(found.parent for found in path.glob(f"*/{MODEL_NAME}")):
        raise DataError(f"{path} holds {len(inside)} style models, each in a folder; give one, such as {inside[0]}")
    if above := next((folder for folder in path.absolute().parents[:2] if (folder / MODEL_NAME).is_file()), None):
        raise DataError(f"{path} holds no {MODEL_NAME}: it belongs to the run {above}; give that")
    raise DataError(f"{path} holds no {MODEL_NAME}: no style model was saved there yet; give a finished run")


def check_style_model(path: Path) -> dict[str, str]:
    """Return the metadata of a style model, a file or a run directory.

    Raises:
        DataError: no such file, not a style model, or one of a newer version.
    """
    file = find_style_model(path)
    if not file.exists():
        raise DataError(f"there is no style model {file}; {_MODEL_ADVICE}")
    try:
        check_regular_file(file)
        ends = read_ends(file)
        if file_kind(*ends) not in (None, SAFETENSORS):
            raise DataError(f"{file} is {file_kind(*ends)}, not a style model; {_model_fix(file, *ends)}")
        check_safetensors_file(file)
        with open_safetensors(file, "np") as content:
            metadata: dict[str, str] = content.metadata() or {}
            _check_kind(file, metadata, content.keys())
    except OSError as error:
        raise DataError(f"cannot read the style model {file}: {error.strerror or error}; {_MODEL_ADVICE}") from error
    except (UnsafeFileError, SafetensorError) as error:
        raise DataError(f"{file} is not a safetensors file, or it is cut short ({error}); {_MODEL_ADVICE}") from error
    return metadata


def without_wrappers(names: Iterable[str]) -> list[str]:
    """Remove what DataParallel (`module.`) and torch.compile (`_orig_mod.`) add to names, unless two become one."""
    given = list(names)
    bare = [".".join(part for part in name.split(".") if part not in ("module", "_orig_mod")) for name in given]
    return bare if len(set(bare)) == len(bare) else given


def listed(names: Iterable[str]) -> str:
    """List the first three names of tensors, and count the others."""
    found = list(names)
    if not found:
        return "nothing"
    return ", ".join(map(excerpt, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _vgg19_fix(beginning: bytes, end: bytes) -> str:
    kind, group = file_kind(beginning, end), file_group(beginning, end)
    if group == "image":
        return f"--vgg takes the weights of VGG19, not an image; {VGG19_ADVICE}"
    if group == "network":
        return (
            "VGG19 is read from files of PyTorch (.pth) and safetensors only; use --vgg auto, which downloads "
            "torchvision's weights, or convert it to a .pth with the names features.0.weight, features.0.bias, …"
        )
    return f"not VGG19's weights; {_way_out(kind, group) or VGG19_ADVICE}"


def _model_fix(file: Path, beginning: bytes, end: bytes) -> str:
    kind, group = file_kind(beginning, end), file_group(beginning, end)
    if group == "image":
        return "the model comes first: fastnst stylize MODEL IMAGE --out IMAGE"
    if file.name != MODEL_NAME and (file.parent / MODEL_NAME).is_file():
        return f"give the run directory {file.parent}"
    if kind == "a NumPy archive (.npz)":
        return (
            "one of lengstrom/fast-style-transfer becomes one by fastnst.models.pretrained.load_lengstrom_npz and "
            "fastnst.models.style_model.save_style_model"
        )
    if group == "network":
        return f"networks of other projects are not read; {_MODEL_ADVICE}"
    return _way_out(kind, group) or _MODEL_ADVICE


def _way_out(kind: str | None, group: str | None) -> str | None:
    """Say how to get at the file that was meant, where the kind tells."""
    known = {
        EMPTY: "fetch it again",
        WEB_PAGE: "it was saved in place of the file; download the file itself",
        LFS_POINTER: "fetch the file that it stands for with: git lfs pull",
    }
    return known.get(kind or "", "unpack it, and give the file inside" if group == "archive" else None)


def _check_kind(file: Path, metadata: Mapping[str, str], names: Iterable[str]) -> None:
    if metadata.get("kind") != KIND:
        raise DataError(f"{file} is another kind of model: it holds {listed(names)}; {_MODEL_ADVICE}")
    version = metadata.get("format_version", "")
    if not re.fullmatch(r"[0-9]{1,18}", version):
        raise DataError(f"{file} is damaged: its format version is {version[:80]!r}; {_MODEL_ADVICE}")
    if int(version) > FORMAT_VERSION:
        writer = excerpt(metadata.get("fastnst_version", "of a later version"))
        raise DataError(
            f"{file} was written by fastnst {writer} in format {version}, and fastnst {__version__} reads up to "
            f"format {FORMAT_VERSION}; install a newer fastnst"
        )
