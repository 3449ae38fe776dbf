"""Resolve the names of device and precision."""

import torch

from fastnst.errors import DeviceError, UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cuda` (or `gpu`) or `cpu`.

    Raises:
        UserError: unknown name.
        DeviceError: `cuda` without a usable GPU.
    """
    if name not in ("auto", "cuda", "gpu", "cpu"):
        raise UserError(f"unknown device {name!r}; choose auto, cuda or cpu")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = "this PyTorch is a CPU build" if torch.version.cuda is None else "no NVIDIA GPU or driver answers"
        raise DeviceError(f"--device {name}: {build}; use --device cpu, or install a CUDA build and the driver")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_precision(name: str, device: torch.device) -> str:
    """Return `name`, with `auto` resolved: `bf16` (before Ampere: `fp16`) on a GPU, `fp32` on a CPU.

    Raises:
        UserError: unknown name.
        DeviceError: `bf16` on a GPU older than Ampere.
    """
    if name != "auto" and name not in DTYPES:
        raise UserError(f"unknown precision {name!r}; choose auto, {', '.join(DTYPES)}")
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if has_bf16 else "fp16"
    if name == "bf16" and not has_bf16:
        raise DeviceError(f"{torch.cuda.get_device_name(device)} has no bf16; use --precision fp16 or fp32")
    return name


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means out of memory; PyTorch's CPU allocator raises a plain RuntimeError."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("not enough memory" in message or "can't allocate memory" in message)
    )
