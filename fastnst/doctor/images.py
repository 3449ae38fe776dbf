"""Image decoders: Pillow, DALI, and the JPEG engines of some GPUs."""

import ctypes
import io
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from fastnst.doctor.installation import pip_install, unusable, wanted_version
from fastnst.doctor.verdict import Verdict, failed, passed, warned
from fastnst.doctor.workers import Results, format_error

_DALI = "nvidia-dali-cuda130"
_NEEDED = {"jpg": "JPEG", "zlib": "PNG", "littlecms2": "colour profiles"}
_OPTIONAL = {"webp": "WebP", "avif": "AVIF", "jpg_2000": "JPEG 2000"}
"""Pillow's name of a part that a build may lack → ours."""
_LARGEST_DIFFERENCE = 4.0
"""Mean of |DALI - Pillow|, of 255, on an image without fine detail: two JPEG decoders differ by less than 2."""

# From nvjpeg.h.
_NVJPEG_BACKEND_HARDWARE = 3
_NVJPEG_STATUS_ARCH_MISMATCH = 7


def probe_pillow() -> dict[str, Any]:
    try:
        import PIL
        from PIL import features
    except (ImportError, OSError) as error:
        return {"broken": format_error(error)}
    turbo = features.check_feature("libjpeg_turbo")
    return {
        "version": PIL.__version__,
        "turbo": features.version_feature("libjpeg_turbo") or "of unknown version" if turbo else None,
        # An older Pillow does not know all of them.
        "lacks": [part for part in (*_NEEDED, *_OPTIONAL) if part not in features.get_supported()],
    }


def probe_dali() -> dict[str, Any]:
    """Decode a small JPEG on the CPU and, if there is one, on the first GPU."""
    try:
        import nvidia.dali
    except (ImportError, OSError) as error:
        return {"broken": format_error(error)}
    import numpy as np
    from PIL import Image

    ramp = np.linspace(0, 255, 64)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp, 255 - ramp), axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    expected = np.asarray(Image.open(file), dtype=np.float32)
    encoded = np.frombuffer(file.getvalue(), np.uint8)

    def difference(device: str) -> float:
        return float(np.abs(_decoded(encoded, device).astype(np.float32) - expected).mean())

    found = {"version": nvidia.dali.__version__, "cpu": difference("cpu"), "gpu": None}
    if _cuda_devices():
        try:
            found["gpu"] = difference("mixed")
        except RuntimeError as error:
            found["gpu_broken"] = format_error(error)
    return found


def probe_jpeg_engines() -> list[dict[str, Any]]:
    """Ask nvJPEG for the number of JPEG engines of each GPU."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.version.cuda else 0
    if not count:
        return []
    try:
        nvjpeg = _nvjpeg()
    except OSError:
        return [{"unknown": "nvJPEG is not installed"}] * count
    found = []
    for index in range(count):
        torch.zeros(1, device=f"cuda:{index}")  # makes the CUDA context; nvJPEG uses the current GPU
        with torch.cuda.device(index):
            found.append(_engines(nvjpeg))
    return found


def check_pillow(results: Results) -> Verdict:
    if (verdict := unusable(results, "pillow")) is not None:
        return verdict
    pillow = results["pillow"]
    version = pillow["version"]
    reinstall = f"reinstall pip's build:\n  pip install --force-reinstall 'pillow{wanted_version(results, 'pillow')}'"
    if missing := [name for part, name in _NEEDED.items() if part in pillow["lacks"]]:
        return failed(f"{version} without {' and '.join(missing)}", reinstall)
    lacks = [] if pillow["turbo"] else ["libjpeg-turbo (JPEG is read more slowly)"]
    lacks += [f"{name} (such images are rejected)" for part, name in _OPTIONAL.items() if part in pillow["lacks"]]
    if lacks:
        return warned(f"{version} without {' and '.join(lacks)}", reinstall)
    return passed(f"{version}, libjpeg-turbo {pillow['turbo']}, {', '.join(_OPTIONAL.values())}")


def check_dali(results: Results) -> Verdict:
    dali = results["dali"]
    wanted = wanted_version(results, _DALI)
    other = "train with --loader pillow, or "
    install = f"install it:\n  {pip_install(_DALI + wanted)}"
    if "broken" in dali:
        found = f"cannot be imported: {dali['broken']}; training loads images with it unless told otherwise"
        needed = results.get("packages").get("packages", {}).get(_DALI, {}).get("needed", True)
        return failed(found, other + install) if needed else warned(found, "train with --loader pillow")
    version = dali["version"]
    if "gpu_broken" in dali:
        return failed(
            f"{version} decodes on the CPU, but not on the GPU: {dali['gpu_broken']}",
            f"{other}install the build for the CUDA version of the driver (see NVIDIA driver), for example\n"
            f"  pip uninstall --yes {_DALI} && {pip_install('nvidia-dali-cuda120')}",
        )
    places = [place for place in ("cpu", "gpu") if dali[place] is not None]
    if wrong := [place.upper() for place in places if not dali[place] <= _LARGEST_DIFFERENCE]:
        return failed(f"{version} decodes a JPEG wrongly on the {' and the '.join(wrong)}", other + install)
    return passed(f"{version}, decodes a JPEG on the {' and the '.join(place.upper() for place in places)}")


def check_jpeg_engines(results: Results) -> Verdict | Sequence[Verdict]:
    gpus = results["jpeg_engines"]
    if not gpus:
        return passed("no usable GPU: JPEGs are decoded on the CPU")
    names = [None] if len(gpus) == 1 else [f"JPEG decoder {index}" for index in range(len(gpus))]
    return [_check_engines(gpu, name) for gpu, name in zip(gpus, names, strict=True)]


def _check_engines(gpu: dict[str, Any], name: str | None) -> Verdict:
    if "unknown" in gpu:
        fix = "nothing breaks: DALI detects them itself. To show them here:\n  " + pip_install("nvidia-nvjpeg")
        return Verdict("WARN", f"unknown: {gpu['unknown']}", fix, name)
    if not gpu["engines"]:
        return Verdict("PASS", "none in this GPU: DALI decodes on its CUDA cores", name=name)
    cores = f" of {gpu['cores']} cores" if gpu["cores"] else ""
    return Verdict("PASS", f"{gpu['engines']} engine{'s' if gpu['engines'] > 1 else ''}{cores} in the GPU", name=name)


def _decoded(encoded: Any, device: str) -> Any:
    import numpy as np
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None if device == "cpu" else 0, prefetch_queue_depth=1)
    with pipeline:
        source = fn.external_source(source=lambda: [encoded], batch=True)
        pipeline.set_outputs(fn.decoders.image(source, device=device, output_type=types.RGB))
    pipeline.build()
    (images,) = pipeline.run()
    return np.array((images if device == "cpu" else images.as_cpu()).at(0))


def _cuda_devices() -> int:
    """Count CUDA devices without torch, which this process does not import."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _nvjpeg() -> ctypes.CDLL:
    """Load nvJPEG from DALI's package or the system. Raises OSError if there is none."""
    names = [f"libnvjpeg.so.{major}" for major in (13, 12)]
    for distribution in metadata.distributions():
        if (distribution.name or "").lower().replace("_", "-").startswith("nvidia-nvjpeg"):
            files = [file for file in distribution.files or () if file.name.startswith("libnvjpeg.so")]
            names = [str(distribution.locate_file(file)) for file in files] + names
    errors = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
    raise OSError("; ".join(errors))


def _engines(nvjpeg: ctypes.CDLL) -> dict[str, Any]:
    handle = ctypes.c_void_p()
    status = nvjpeg.nvjpegCreateEx(_NVJPEG_BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle))
    if status == _NVJPEG_STATUS_ARCH_MISMATCH:
        return {"engines": 0, "cores": 0}
    if status != 0:
        return {"unknown": f"nvJPEG answers with status {status}"}
    engines, cores = ctypes.c_uint(0), ctypes.c_uint(0)
    try:
        if not hasattr(nvjpeg, "nvjpegGetHardwareDecoderInfo"):
            return {"unknown": "this nvJPEG is too old to count them"}
        status = nvjpeg.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    finally:
        nvjpeg.nvjpegDestroy(handle)
    return {"engines": engines.value, "cores": cores.value} if status == 0 else {"unknown": f"nvJPEG status {status}"}
