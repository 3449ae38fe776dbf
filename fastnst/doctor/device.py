"""The NVIDIA driver, the GPUs, and the kernels (their PyTorch paths without a GPU)."""

import ctypes
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastnst.doctor.verdict import Verdict, failed, gib, passed, warned
from fastnst.doctor.workers import Results

_SETTINGS = ("FASTNST_KERNELS", "FASTNST_COOPERATIVE", "TRITON_INTERPRET")
_TENSOR_CORES_WITH_BF16 = (8, 0)
_LITTLE_MEMORY = 4 * 2**30
"""Bytes: both networks and a batch of four at 256² need less."""
_LARGEST_ERROR = 0.01
"""Relative error of a kernel against its reference; TF32 rounds to 0.0005."""

_DRIVER_ADVICE = "install NVIDIA's driver; in a container, hand the GPU in (docker run --gpus all …)"
_NVIDIA_PCI_VENDOR = "0x10de"
_CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH = 95


def probe_driver() -> dict[str, Any]:
    """Ask the driver for its version through NVML, without CUDA or torch."""
    found: dict[str, Any] = {"pci": _nvidia_displays(), "library": False}
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return found
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    found["library"] = True
    if status := nvml.nvmlInit_v2():
        return found | {"broken": nvml.nvmlErrorString(status).decode(errors="replace")}
    version, cuda, count = ctypes.create_string_buffer(80), ctypes.c_int(0), ctypes.c_uint(0)
    nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return found | {
        "version": version.value.decode(errors="replace"),
        "cuda": [cuda.value // 1000, cuda.value % 1000 // 10],
        "gpus": count.value,
    }


def probe_gpus() -> dict[str, Any]:
    """Ask torch for its GPUs, or for the reason why there are none."""
    import torch

    found: dict[str, Any] = {"visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "reason": None, "gpus": []}
    if torch.version.cuda is None:
        return found
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        return found | {"reason": str(caught[-1].message).splitlines()[0][:200] if caught else None}
    cuda = ctypes.CDLL("libcuda.so.1")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        device, cooperative = ctypes.c_int(0), ctypes.c_int(0)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetAttribute(ctypes.byref(cooperative), _CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, device)
        found["gpus"].append(
            {
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "free": free,
                "total": total,
                "cooperative": bool(cooperative.value),
            }
        )
    return found


def probe_kernels() -> dict[str, Any]:
    """Compare instance norm and Gram matrix with their references, on each GPU or on the CPU."""
    import torch

    from fastnst_kernels import gram_matrix, gram_matrix_reference, instance_norm, instance_norm_reference, runtime

    found: dict[str, Any] = {"settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    x = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.linspace(0.5, 1.5, 16), torch.linspace(-1.0, 1.0, 16)
    errors = []
    for device in [f"cuda:{index}" for index in range(gpus)] or ["cpu"]:
        images = x.to(device).contiguous(memory_format=torch.channels_last)
        affine = scale.to(device), shift.to(device)
        found["implementation"] = runtime.implementation(images)
        for one, reference in (
            (instance_norm(images, *affine), instance_norm_reference(images, *affine)),
            (gram_matrix(images), gram_matrix_reference(images)),
        ):
            errors.append(((one - reference).abs().max() / reference.abs().max()).item())
    # torch's max keeps NaN, Python's may not.
    return found | {"gpus": gpus, "error": torch.tensor(errors).max().item(), "interpreted": runtime.INTERPRETING}


def check_driver(results: Results) -> Verdict:
    driver = results["driver"]
    torch_cuda, usable = results.get("torch").get("cuda"), results.get("gpus").get("gpus")
    if "version" not in driver:
        if driver["pci"]:
            found = f"{driver['pci']} NVIDIA GPU{'s' if driver['pci'] > 1 else ''} on the bus, and no driver"
            return warned(found + (f" answers ({driver['broken']})" if driver["library"] else ""), _DRIVER_ADVICE)
        if "mismatch" in driver.get("broken", ""):
            return failed(f"does not answer: {driver['broken']}", "restart the machine: the driver was updated")
        return passed("none, and no NVIDIA GPU")
    found = f"{driver['version']}, for CUDA up to {_dotted(driver['cuda'])}"
    if torch_cuda is None:
        return passed(found)
    # CUDA's minor versions are compatible; an older driver works with NVIDIA's compatibility package.
    if driver["cuda"][0] < int(torch_cuda.split(".")[0]) and not usable:
        return failed(
            f"{found}; this torch needs {torch_cuda}",
            f"install a driver for CUDA {torch_cuda}, or torch's build for CUDA {driver['cuda'][0]}",
        )
    return passed(f"{found}; torch uses {torch_cuda}")


def check_gpus(results: Results) -> Verdict | Sequence[Verdict]:
    found, driver, torch = results["gpus"], results.get("driver"), results.get("torch")
    if found["gpus"]:
        several = len(found["gpus"]) > 1
        return [_check_gpu(gpu, f"GPU {index}" if several else None) for index, gpu in enumerate(found["gpus"])]
    slow = "training runs on the CPU, hundreds of times slower"
    if not driver.get("gpus"):
        return warned(
            f"none: {slow}",
            "for speed, use a machine with an NVIDIA GPU of compute capability 8.0 or newer (A100, RTX 30, …)",
        )
    if torch.get("cuda") is None:
        return warned(f"not usable by torch's CPU build: {slow}", "see torch")
    if found["visible"] is not None:
        return warned(
            f"hidden by CUDA_VISIBLE_DEVICES={found['visible']}: {slow}",
            "unset it, or name a GPU that is there:\n  unset CUDA_VISIBLE_DEVICES",
        )
    reason = f" ({found['reason']})" if found["reason"] else ""
    return failed(f"the driver has one, torch cannot use it{reason}: {slow}", "see NVIDIA driver and torch")


def _check_gpu(gpu: dict[str, Any], name: str | None) -> Verdict:
    capability = _dotted(gpu["capability"])
    found = f"{gpu['name']}, compute capability {capability}, {gib(gpu['free'])} of {gib(gpu['total'])} free"
    if tuple(gpu["capability"]) < _TENSOR_CORES_WITH_BF16:
        fix = "it works with --precision fp16 and PyTorch's own operations; the kernels and bf16 need 8.0 or newer"
        return Verdict("WARN", f"{found}: no bf16, and the Triton kernels do not run", fix, name)
    if gpu["free"] < _LITTLE_MEMORY:
        fix = "end other processes on it (nvidia-smi lists them), or choose a small train.batch_size; see --dry-run"
        return Verdict("WARN", found, fix, name)
    if not gpu["cooperative"]:
        fix = "make the norms use two launches instead:\n  export FASTNST_COOPERATIVE=0"
        return Verdict("WARN", f"{found}: no cooperative launch", fix, name)
    return Verdict("PASS", f"{found}, cooperative launch", name=name)


def check_kernels(results: Results) -> Verdict:
    try:
        kernels = results["kernels"]
    except Exception as error:
        if "C compiler" in str(error):
            return failed(str(error), "Triton needs a C compiler, for example:\n  apt install gcc")
        if "FASTNST_KERNELS" in str(error):
            return failed(str(error).partition(": ")[2], "unset it:\n  unset FASTNST_KERNELS")
        raise
    settings = "".join(f", {name}={value}" for name, value in kernels["settings"].items())
    triton = kernels["implementation"] == "triton"
    place = ("each GPU" if kernels["gpus"] > 1 else "the GPU") if kernels["gpus"] else "the CPU"
    found = f"{'Triton' if triton else 'PyTorch'} paths run on {place}{settings}"
    if not kernels["error"] <= _LARGEST_ERROR:
        return failed(
            f"{found}, with wrong results: {kernels['error']:.1e} off the reference",
            "disable them, and report this:\n  export FASTNST_KERNELS=reference",
        )
    found += f", {kernels['error']:.0e} off the reference"
    capable = all(tuple(gpu["capability"]) >= _TENSOR_CORES_WITH_BF16 for gpu in results.get("gpus").get("gpus", []))
    if kernels["interpreted"]:
        return warned(f"{found}: interpreted, thousands of times slower", "unset it:\n  unset TRITON_INTERPRET")
    if kernels["gpus"] and not triton and capable:
        fix = "unset FASTNST_KERNELS" if "FASTNST_KERNELS" in kernels["settings"] else "see Triton"
        return warned(f"{found}: slower than the kernels", fix)
    return passed(found)


def _nvidia_displays(root: Path = Path("/")) -> int:
    """Count NVIDIA's display controllers on the PCI bus, with or without a driver."""
    count = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == _NVIDIA_PCI_VENDOR and re.match("0x03", kind) is not None
    return count


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
