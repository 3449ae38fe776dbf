"""Find, download, generate or read the weights of VGG19, and check them."""

import functools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastnst.errors import DataError, UserError
from fastnst.file_kind import SAFETENSORS, TORCH_ZIP
from fastnst.models.files.download import DownloadError, RemoteFile, download_file
from fastnst.models.files.early_checks import VGG19_ADVICE, check_vgg19_file, listed, without_wrappers
from fastnst.models.files.file_checks import UnsafeFileError, check_safetensors_file, check_torch_file, excerpt
from fastnst.models.files.safetensors_file import open_safetensors
from fastnst.models.vgg19 import FLAVOURS, LAYERS, VGG19, WEIGHT_SHAPES, check_layer
from fastnst.progress import counted, phase
from fastnst.storage import NOWHERE, cache_folder, sha256_of

log = logging.getLogger(__name__)

TORCHVISION = RemoteFile(
    url="https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
    sha256="dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",
    size=574_673_361,
    file_name="vgg19-dcbb9e9d.pth",
)
URL_VARIABLE = "FASTNST_VGG19_URL"

# Names of released files carry the first digits of their SHA-256.
_KNOWN_DIGESTS = {TORCHVISION.sha256: "torchvision", "d01eb7cb": "caffe"}

# The two published trainings of VGG19, told apart by the first kernel of conv1_1 on its first input channel. Statistics
# of the weights would not do: both grow alike from layer to layer, only their input differs.
_FIRST_KERNELS = {
    "torchvision": (-0.053474, -0.049257, -0.067942, 0.015314, 0.045068, 0.0021444, 0.036226, 0.019999, 0.019864),
    "caffe": (0.341195, 0.339992, -0.044844, 0.232221, 0.089821, -0.303323, -0.072638, -0.246743, -0.336831),
}
# fp16 rounds a weight by 0.0005 of its size, bf16 by 0.004; another training differs by far more.
_KERNEL_TOLERANCE = 0.002

# torchvision numbers the layers before the classifier in order of execution.
_KEYS = {layer: f"features.{LAYERS.index(layer)}" for layer in WEIGHT_SHAPES}
_KEYS |= {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}
# The names that are read: torchvision's, those of its `features` alone, and Caffe's. Their numbers give the order of
# the layers; shapes could not, since neighbours have the same.
_NAME = re.compile(
    r"(?P<prefix>(?:.*\.)??)(?:(?P<torchvision>(?:features|classifier)\.\d+)|(?P<features>\d+)"
    r"|(?P<caffe>conv\d_\d|fc\d))\.(?P<kind>weight|bias)"
)
_INSIDE = ("state_dict", "model_state_dict", "model", "net")
"""Keys below which training checkpoints keep the weights."""
_OTHER_VGGS = {"VGG11": (1, 1, 2, 2, 2), "VGG13": (2, 2, 2, 2, 2), "VGG16": (2, 2, 3, 3, 3)}
"""Convolutions of each block."""


class WeightsUnavailable(DataError):
    """`auto` found no VGG19 weights on this machine and could not download them."""


def torchvision_key(layer: str) -> str:
    """Prefix of a layer's keys in torchvision's files: `conv1_1` → `features.0`; KeyError without weights."""
    return _KEYS[layer]


def load_vgg19(
    spec: str,
    *,
    last_layer: str,
    flavour: str = "auto",
    seed: int = 0,
    source: RemoteFile = TORCHVISION,
    pause: float = 1.0,
) -> VGG19:
    """Load VGG19 up to `last_layer`, frozen, on the CPU; log its source.

    Args:
        spec: `auto`: the cached file, that of torch.hub, or a download; its full SHA-256 is checked at every load.
            `random`: He initialisation; style transfer works with it (He, Wang, Hopcroft 2016), but less well.
            Otherwise the path of a `.pth` or `.safetensors` file with torchvision's key names (`features.0.weight`),
            those of its features alone (`0.weight`) or Caffe's (`conv1_1.weight`), possibly below a prefix and of the
            first layers only.
        last_layer: the deepest layer needed.
        flavour: `torchvision` or `caffe`; `auto` detects it: by the metadata `flavour` of a safetensors file, by the
            first kernel of conv1_1, or by the file's SHA-256.
        seed: of the random weights; PyTorch's global generator is not used.
        source: the download of `auto`; the environment variable FASTNST_VGG19_URL overrides its address, not its hash.
        pause: seconds between tries of a download, growing.

    Raises:
        UserError: unknown layer or flavour.
        WeightsUnavailable: `auto` failed.
        DataError: the file is missing, unreadable, of another network, or ends before `last_layer`; or its flavour
            is unknown.
    """
    check_layer(last_layer)
    if flavour not in ("auto", *FLAVOURS):
        raise UserError(f"unknown loss.vgg_flavour {flavour!r}; choose one of auto, {', '.join(FLAVOURS)}")
    if spec == "random":
        log.warning(
            "VGG19: RANDOM weights (He initialisation, seed %d), not trained: they carry texture and palette, but "
            "trained weights (--vgg auto or --vgg FILE) give far better images",
            seed,
        )
        generator = torch.Generator().manual_seed(seed)
        return VGG19(last_layer, "torchvision" if flavour == "auto" else flavour, generator=generator)
    path = _find_or_download(source, pause) if spec == "auto" else Path(spec).expanduser()
    with phase(f"read VGG19 from {path}"):
        tensors, metadata = _read(path, trusted=spec == "auto")  # by its checksum
        _check(path, tensors, last_layer)
    if flavour != "auto":
        reason = "as loss.vgg_flavour says"
    elif spec == "auto":
        flavour, reason = "torchvision", "its SHA-256 is right"
    else:
        flavour, reason = _find_flavour(path, tensors, metadata)
    with phase(f"read VGG19 from {path}"):
        net = _build(path, tensors, last_layer, flavour)
    log.info("VGG19: %s up to %s, %s flavour (%s)", path, last_layer, flavour, reason)
    return net


def describe_source(spec: str) -> str:
    """Describe the weights that `load_vgg19(spec)` would load, without reading them; DataError for no such file."""
    if spec == "random":
        return "random weights (He initialisation)"
    if spec != "auto":
        path = Path(spec).expanduser()
        check_vgg19_file(path)
        return f"{path}, {path.stat().st_size / 1e6:,.1f} MB"
    for path in cached_files(TORCHVISION):
        if path.is_file() and path.stat().st_size == TORCHVISION.size:
            return str(path)
    return f"to be downloaded from {os.environ.get(URL_VARIABLE) or TORCHVISION.url}, {TORCHVISION.size / 1e6:,.1f} MB"


def cached_files(source: RemoteFile) -> tuple[Path, Path]:
    """Paths of our own copy and of torch.hub's."""
    own = cache_folder() / "weights" / source.file_name
    return own, Path(torch.hub.get_dir()) / "checkpoints" / source.file_name


def _find_or_download(source: RemoteFile, pause: float) -> Path:
    if url := os.environ.get(URL_VARIABLE):
        source = replace(source, url=url)
    own, hub = cached_files(source)
    for path in (own, hub):
        if not path.is_file():
            continue
        try:
            with phase(f"check the SHA-256 of {path}"):
                digest = sha256_of(path)
        except OSError as error:
            log.warning("VGG19: %s cannot be read (%s) and is not used", path, error.strerror)
            continue
        if digest == source.sha256:
            return path
        reason = f"SHA-256 {digest[:8]}…, must be {source.sha256[:8]}…"
        log.warning("VGG19: %s is damaged (%s) and is not used", path, reason)
    if NOWHERE in own.parents:
        raise WeightsUnavailable(
            f"there is no folder to keep VGG19 in ({source.size / 1e6:,.1f} MB): set FASTNST_CACHE=FOLDER, give a file "
            "with --vgg FILE, or use untrained weights with --vgg random"
        )
    log.info("VGG19: downloading %s (%s MB) to %s", source.url, f"{source.size / 1e6:,.1f}", own)
    try:
        with counted("download VGG19", "MB", scale=1e6) as progress:
            download_file(source, own, progress=progress, pause=pause)
    except DownloadError as error:
        raise WeightsUnavailable(
            f"cannot download VGG19 from {source.url}: {error}.\n"
            f"Give a file with --vgg FILE, use untrained weights with --vgg random, or put {source.file_name} at {own}"
        ) from error
    return own


def _read(path: Path, *, trusted: bool = False) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """All tensors of a file by torchvision's names, and its metadata; a file of torch is checked unless `trusted`."""
    kind = check_vgg19_file(path)
    metadata: Mapping[str, str] = {}
    try:
        # By its first bytes, whatever its name says; damaged ones leave only the name.
        if kind == SAFETENSORS or (kind is None and path.suffix == ".safetensors"):
            check_safetensors_file(path)
            with open_safetensors(path) as archive:
                metadata = archive.metadata() or {}
                loaded: Any = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        else:
            if not trusted:
                check_torch_file(path)
            # Memory mapping reads only the layers in use, but works with the newer, zipped format only. From an open
            # file, `torch.load` does not go by the suffix.
            mapped = kind == TORCH_ZIP and path.suffix != ".safetensors"
            with path.open("rb") as file:
                loaded = _load(path if mapped else file, mapped=mapped)
    except UnsafeFileError as error:
        raise DataError(f"{path} is damaged or no weights file: {error}; {VGG19_ADVICE}") from error
    except Exception as error:
        # Readers raise nearly anything on a damaged file.
        reason = re.split(r"[\n.]", str(error).strip(), maxsplit=1)[0][:160] or type(error).__name__
        raise DataError(f"{path} is damaged or no weights file: {reason}; {VGG19_ADVICE}") from error
    if isinstance(loaded, dict):
        # By the type's own methods: a file may give an OrderedDict attributes that shadow its methods.
        inner = next((found for key in _INSIDE if isinstance(found := dict.get(loaded, key), dict)), loaded)
        items = list(dict.items(inner))
        if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items):
            names = _torchvision_names([name for name, _ in items])
            return dict(zip(names, (tensor for _, tensor in items), strict=True)), metadata
    raise DataError(f"{path} holds no dictionary of tensors; {VGG19_ADVICE}")


def _load(source: Path | BinaryIO, *, mapped: bool) -> Any:
    load = functools.partial(torch.load, source, map_location="cpu", weights_only=True)
    try:
        return load(mmap=mapped)
    except RuntimeError as error:
        # Some file systems map no files.
        if not mapped or not str(error).startswith("unable to mmap"):
            raise
        return load(mmap=False)


def _torchvision_names(given: list[str]) -> list[str]:
    """Translate the names of a file's tensors to torchvision's; without wrappers only if they are not all of a kind."""
    names = without_wrappers(given)
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    if len(found) < len(names) or len({(match["prefix"], _form(match)) for match in found}) != 1:
        return names
    return [f"{_torchvision_layer(match)}.{match['kind']}" for match in found]


def _form(match: re.Match[str]) -> str:
    return next(form for form in ("torchvision", "features", "caffe") if match[form])


def _torchvision_layer(match: re.Match[str]) -> str:
    if match["features"]:
        return f"features.{match['features']}"
    return match["torchvision"] or _KEYS.get(match["caffe"], match["caffe"])


def _check(path: Path, tensors: Mapping[str, Tensor], last_layer: str) -> None:
    """Raise DataError unless all `tensors` are VGG19's and reach `last_layer`."""
    expected = {f"{_KEYS[layer]}.weight": shape for layer, shape in WEIGHT_SHAPES.items()}
    expected |= {f"{_KEYS[layer]}.bias": shape[:1] for layer, shape in WEIGHT_SHAPES.items()}
    if not any(name in expected for name in tensors):
        raise DataError(
            f"{path} holds no VGG19 with torchvision's key names (features.0.weight, …), those of its features alone "
            f"(0.weight, …) or Caffe's (conv1_1.weight, …) but {listed(tensors)}; give another file"
        )
    for name, tensor in tensors.items():
        if name not in expected or not _fits(tensor, expected[name]):
            wanted = f"VGG19 has {list(expected[name])} there" if name in expected else "VGG19 has no such tensor"
            raise DataError(
                f"{path} holds another network than VGG19: {excerpt(name)} is {list(tensor.shape)}, "
                f"and {wanted}{_other_network(tensors)}; give VGG19's weights"
            )
    layers = list(WEIGHT_SHAPES)
    absent = [layer for layer in layers if not {f"{_KEYS[layer]}.weight", f"{_KEYS[layer]}.bias"} <= tensors.keys()]
    last = max((layers.index(layer) for layer in layers if layer not in absent), default=0)
    gap = [layer for layer in absent if layers.index(layer) < last]
    missing = [layer for layer in absent if LAYERS.index(layer) <= LAYERS.index(last_layer)]
    is_vgg16 = {*gap} >= {"conv3_4", "conv4_4"} and "conv3_3" not in gap
    if missing and not is_vgg16:
        first = LAYERS.index(absent[0])
        reach = f"choose loss layers up to {LAYERS[first - 1]}" if first else "nothing can be done with it"
        raise DataError(
            f"{path} lacks {', '.join(missing)}, which {last_layer} needs; {reach}, or give a file with more layers"
        )
    if gap:
        other = ", as VGG16 does" if is_vgg16 else ""
        raise DataError(
            f"{path} lacks {', '.join(gap)} and goes on to {layers[last]}{other}; give all of VGG19's weights"
        )


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has this shape; a linear layer may be stored as a convolution, and a bias with sides of 1."""
    return tuple(tensor.shape if len(shape) == 4 else tensor.flatten(len(shape) - 1).shape) == shape


def _other_network(tensors: Mapping[str, Tensor]) -> str:
    """Name the network that is not VGG19, if it is a well-known one."""
    if any(name.endswith("running_mean") for name in tensors):
        return ", this is one with batch normalization, such as vgg19_bn"
    numbers = {name.split(".")[1] for name in tensors if name.startswith("features.")}
    own = {key.split(".")[1] for key in _KEYS.values() if key.startswith("features.")}
    for other, counts in _OTHER_VGGS.items():
        # As torchvision counts: a convolution and its ReLU, and a pool at the end of each block.
        starts = [2 * sum(counts[:block]) + block for block in range(5)]
        theirs = {str(start + 2 * index) for start, count in zip(starts, counts, strict=True) for index in range(count)}
        if numbers - own and numbers <= theirs:
            return f", {other} has"
    return ""


def _find_flavour(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """The flavour of the weights, and the reason."""
    if (stated := metadata.get("flavour")) is not None:
        if stated not in FLAVOURS:
            raise DataError(f"{path}: its metadata names the flavour {stated[:80]!r}; known are {', '.join(FLAVOURS)}")
        return stated, "its metadata says so"
    kernel = tensors["features.0.weight"][0, 0].flatten().double()
    for flavour, known in _FIRST_KERNELS.items():
        if torch.allclose(kernel, torch.tensor(known, dtype=torch.float64), rtol=0.0, atol=_KERNEL_TOLERANCE):
            owner = {"torchvision": "torchvision's", "caffe": "the original of Oxford, for Caffe"}[flavour]
            return flavour, f"conv1_1 is {owner}"
    digest = sha256_of(path)
    for known_digest, flavour in _KNOWN_DIGESTS.items():
        if digest.startswith(known_digest):
            return flavour, f"its SHA-256 begins with {known_digest[:8]}"
    raise DataError(
        f"{path}: cannot tell whether these weights expect torchvision's or Caffe's input (conv1_1 is of neither known "
        "training); say it with --set loss.vgg_flavour=torchvision or --set loss.vgg_flavour=caffe"
    )


def _build(path: Path, tensors: Mapping[str, Tensor], last_layer: str, flavour: str) -> VGG19:
    # With its own generator, to leave PyTorch's global one unchanged.
    net = VGG19(last_layer, flavour, generator=torch.Generator())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            layer, _, kind = name.partition(".")
            tensor = tensors[f"{_KEYS[layer]}.{kind}"]
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise DataError(
                    f"{path} is damaged: {_KEYS[layer]}.{kind} ({layer}) holds values that are not finite numbers; "
                    "give another copy"
                )
            parameter.copy_(tensor.reshape(parameter.shape))
    return net
