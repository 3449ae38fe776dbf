"""`fastnst doctor`: what this machine has for training, what is wrong with it, and how to mend that.

Read `children` (facts are gathered in processes of their own), `verdict` (what a check is), `report` (how it reads),
then the topics, each with its probes, which look, and its judges, which decide from what the probes found:
`installation`, `images`, `device`, `host`, `storage`.

Nothing here goes to the network. Nothing stays behind but what Triton puts into its own cache when it compiles.
"""

from collections.abc import Sequence

from fastnst.doctor import device, host, images, installation, storage
from fastnst.doctor.children import Probe, collect
from fastnst.doctor.report import Report, report
from fastnst.doctor.verdict import DEVICE, INSTALLATION, STORAGE, Check

# Two processes: one for all that needs torch, which is slow to import, one for the rest.
LANES = (
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

_REINSTALL = "install fastnst anew, in an environment of its own"
_DRIVER = "see whether nvidia-smi answers; if not, restart the machine or install the driver anew"
_DISK = "see whether the disk answers: ls ~/.cache, df"
_KERNEL = "is this a Linux with /proc and /sys?"

CHECKS = (
    Check("Python", installation.judge_python, INSTALLATION, _REINSTALL),
    Check("platform", installation.judge_platform, INSTALLATION, _REINSTALL),
    Check("packages", installation.judge_packages, INSTALLATION, _REINSTALL),
    Check("torch", installation.judge_torch, INSTALLATION, "install torch anew"),
    Check("Triton", installation.judge_triton, INSTALLATION, _REINSTALL),
    Check("TensorBoard", installation.judge_tensorboard, INSTALLATION, "install torch and tensorboard anew"),
    Check("Pillow", images.judge_pillow, INSTALLATION, "install pillow anew"),
    Check("DALI", images.judge_dali, INSTALLATION, "train with --loader pillow, or install nvidia-dali-cuda130 anew"),
    Check("NVIDIA driver", device.judge_driver, DEVICE, _DRIVER),
    Check("GPU", device.judge_gpus, DEVICE, f"if torch is as it should be, {_DRIVER}"),
    Check("kernels", device.judge_kernels, DEVICE, "go on without them:\n  export FASTNST_KERNELS=reference"),
    Check("JPEG decoder", images.judge_jpeg_engines, DEVICE, _DRIVER),
    Check("memory", host.judge_memory, DEVICE, _KERNEL),
    Check("CPU", host.judge_cpu, DEVICE, _KERNEL),
    Check("/dev/shm", host.judge_shared_memory, DEVICE, _KERNEL),
    Check("open files", host.judge_files, DEVICE, _KERNEL),
    Check("disk", storage.judge_disk, STORAGE, _DISK),
    Check("cache", storage.judge_cache, STORAGE, _DISK),
    Check("VGG19 weights", storage.judge_weights, STORAGE, f"if torch is as it should be, {_DISK}"),
)


def examine(lanes: Sequence[Sequence[Probe]] = LANES, checks: Sequence[Check] = CHECKS) -> Report:
    """Look at this machine. Raises nothing: what goes wrong is a row that failed."""
    return report(collect(lanes), checks)
