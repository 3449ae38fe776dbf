"""`fastnst doctor`: check this machine and installation, and say how to fix what is wrong.

Read `workers` (probes run in child processes), `verdict` and `report`, then the topics: `installation`, `images`,
`device`, `host`, `storage`. In each, `probe_…` functions measure, and `check_…` functions turn results into verdicts.

No probe uses the network. Only Triton's own compile cache is written.
"""

from collections.abc import Sequence

from fastnst.doctor import device, host, images, installation, storage
from fastnst.doctor.report import Report, report
from fastnst.doctor.verdict import DEVICE, INSTALLATION, STORAGE, Check
from fastnst.doctor.workers import Probe, run_probes

# Two processes: one for the probes that import torch, which is slow, one for the rest.
WORKERS = (
    (
        Probe("torch", "fastnst.doctor.installation:probe_torch", 60),
        Probe("triton", "fastnst.doctor.installation:probe_triton", 60),
        Probe("tensorboard", "fastnst.doctor.installation:probe_tensorboard", 60),
        Probe("gpus", "fastnst.doctor.device:probe_gpus", 60),
        Probe("jpeg_engines", "fastnst.doctor.images:probe_jpeg_engines", 60),
        Probe("kernels", "fastnst.doctor.device:probe_kernels", 120),
        Probe("weights", "fastnst.doctor.storage:probe_weights", 120),
    ),
    (
        Probe("packages", "fastnst.doctor.installation:probe_packages", 20),
        Probe("host", "fastnst.doctor.host:probe_host", 20),
        Probe("shared_memory", "fastnst.doctor.host:probe_shared_memory", 20),
        Probe("folders", "fastnst.doctor.storage:probe_folders", 20),
        Probe("pillow", "fastnst.doctor.images:probe_pillow", 20),
        Probe("driver", "fastnst.doctor.device:probe_driver", 20),
        Probe("dali", "fastnst.doctor.images:probe_dali", 60),
    ),
)

_REINSTALL = "reinstall fastnst in a new environment"
_DRIVER = "run nvidia-smi; if it does not answer, restart the machine or reinstall the driver"
_DISK = "see whether the disk answers: ls ~/.cache, df"
_KERNEL = "is this a Linux with /proc and /sys?"

CHECKS = (
    Check("Python", installation.check_python, INSTALLATION, _REINSTALL),
    Check("platform", installation.check_platform, INSTALLATION, _REINSTALL),
    Check("packages", installation.check_packages, INSTALLATION, _REINSTALL),
    Check("torch", installation.check_torch, INSTALLATION, "reinstall torch"),
    Check("Triton", installation.check_triton, INSTALLATION, _REINSTALL),
    Check("TensorBoard", installation.check_tensorboard, INSTALLATION, "reinstall torch and tensorboard"),
    Check("Pillow", images.check_pillow, INSTALLATION, "reinstall pillow"),
    Check("DALI", images.check_dali, INSTALLATION, "train with --loader pillow, or reinstall nvidia-dali-cuda130"),
    Check("NVIDIA driver", device.check_driver, DEVICE, _DRIVER),
    Check("GPU", device.check_gpus, DEVICE, f"if torch passes, {_DRIVER}"),
    Check("kernels", device.check_kernels, DEVICE, "disable them:\n  export FASTNST_KERNELS=reference"),
    Check("JPEG decoder", images.check_jpeg_engines, DEVICE, _DRIVER),
    Check("memory", host.check_memory, DEVICE, _KERNEL),
    Check("CPU", host.check_cpu, DEVICE, _KERNEL),
    Check("/dev/shm", host.check_shared_memory, DEVICE, _KERNEL),
    Check("open files", host.check_files, DEVICE, _KERNEL),
    Check("disk", storage.check_disk, STORAGE, _DISK),
    Check("cache", storage.check_cache, STORAGE, _DISK),
    Check("VGG19 weights", storage.check_weights, STORAGE, f"if torch passes, {_DISK}"),
)


def examine(workers: Sequence[Sequence[Probe]] = WORKERS, checks: Sequence[Check] = CHECKS) -> Report:
    """Examine this machine. Never raises: an error becomes a failed row."""
    return report(run_probes(workers), checks)
