"""fastnst: train feed-forward style-transfer networks, and see what they learn.

The names below are imported when they are first used: `import fastnst` does not import torch.
"""

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastnst.config import load_config
    from fastnst.inference import stylize
    from fastnst.losses.perceptual import PerceptualLoss
    from fastnst.models.style_model import load_style_model
    from fastnst.models.transform_net import TransformNet
    from fastnst.models.vgg19 import VGG19
    from fastnst.training.train import train
    from fastnst.visualize.deconv.vgg import Deconvnet

__version__ = "0.1.0"

# At the end of each parallel region PyTorch's threads spin until the last arrives, by default for milliseconds: long
# enough to take the core from the thread that they wait for, if another process keeps the machine busy. A short spin
# bridges the pauses between a step's regions, then sleeps; no result changes. libgomp reads the variable when torch
# loads it, and processes inherit it; whoever has set either variable has decided. Found by trial on two cores, with
# `GOMP_SPINCOUNT=N` before `python benchmarks/two_trainings.py` and before `python benchmarks/end_to_end.py --busy 1`.
SPIN_COUNT = "6000"
if "torch" not in sys.modules and not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT

# A library prints nothing unless the application configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "VGG19",
    "Deconvnet",
    "PerceptualLoss",
    "TransformNet",
    "__version__",
    "load_config",
    "load_style_model",
    "stylize",
    "train",
]

_HOMES = {
    "Deconvnet": "fastnst.visualize.deconv.vgg",
    "PerceptualLoss": "fastnst.losses.perceptual",
    "TransformNet": "fastnst.models.transform_net",
    "VGG19": "fastnst.models.vgg19",
    "load_config": "fastnst.config",
    "load_style_model": "fastnst.models.style_model",
    "stylize": "fastnst.inference",
    "train": "fastnst.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
