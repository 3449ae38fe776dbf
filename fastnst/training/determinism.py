"""`train.deterministic`: the same bits from each run of a configuration, and what that costs."""

import contextlib
import copy
import os
import time
from collections.abc import Iterator

import torch

from fastnst.config import Config, TrainConfig
from fastnst.losses.perceptual import PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.training.step.train_step import TrainingStep

LONG_STEP_S = 1.0


@contextlib.contextmanager
def algorithms(config: TrainConfig) -> Iterator[None]:
    """Within this block PyTorch takes deterministic algorithms only; unless asked to, the fastest that it finds."""
    if config.deterministic:
        # cuBLAS sums in one order only if its workspace has a fixed size, which it reads when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with _mode(config.deterministic):
        yield


def cost(net: TransformNet, loss: PerceptualLoss, config: Config, device: torch.device) -> str:
    """How long a training step takes with deterministic algorithms and without, measured on this machine.

    A copy of the network makes a few steps on noise in either mode; the network, its optimiser and the global random
    generators are left as they are. On a CPU, where steps are long, they are made with one image.

    Args:
        net: the transform net, in training mode, on the device.
        loss: its style is set.
        config: the resolved configuration.
        device: where both are.

    Returns:
        One line for the user.
    """
    # A compiled step is another one, and would take minutes to compile twice.
    train = config.train.model_copy(update={"compile": False})
    step = TrainingStep(copy.deepcopy(net), loss, train, device)
    images = 1 if device.type == "cpu" else train.batch_size
    noise = torch.Generator().manual_seed(0)
    shape = (images, config.data.image_size, config.data.image_size, 3)
    batch = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise).to(device)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    # The first step of a mode also chooses algorithms.
    for is_first in (True, False, False):
        for deterministic, taken in seconds.items():
            with _mode(deterministic):
                begin = _now(device)
                step(1, batch)
                took = _now(device) - begin
            if not is_first or took > LONG_STEP_S:
                taken.append(took)
        if min(map(len, seconds.values())) and min(map(min, seconds.values())) > LONG_STEP_S:
            break
    plain, slow = min(seconds[False]), min(seconds[True])
    return (
        f"train.deterministic: a step of {images} image{'s'[: images > 1]} takes {1000 * slow:.4g} ms here, and "
        f"{1000 * plain:.4g} ms without ({100 * (slow / plain - 1):+.0f}%)"
    )


@contextlib.contextmanager
def _mode(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
