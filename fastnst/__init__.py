"""fastnst: train feed-forward style-transfer networks, and see what they learn.

The names below are imported when they are first used: `import fastnst` does not import torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastnst.inference import stylize
    from fastnst.losses.perceptual import PerceptualLoss
    from fastnst.models.style_model import load_style_model
    from fastnst.models.transform_net import TransformNet
    from fastnst.models.vgg19 import VGG19
    from fastnst.visualize.deconv.vgg import Deconvnet

__version__ = "0.1.0"

__all__ = ["VGG19", "Deconvnet", "PerceptualLoss", "TransformNet", "__version__", "load_style_model", "stylize"]

_HOMES = {
    "Deconvnet": "fastnst.visualize.deconv.vgg",
    "PerceptualLoss": "fastnst.losses.perceptual",
    "TransformNet": "fastnst.models.transform_net",
    "VGG19": "fastnst.models.vgg19",
    "load_style_model": "fastnst.models.style_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`stylize` names a function of this package and the module it lives in; as an attribute it is the function.

    Without this it would depend on which was imported first: importing a module makes it an attribute of its package.
    """

    @property
    def stylize(self) -> Any:
        return import_module("fastnst.inference").stylize

    @stylize.setter
    def stylize(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
