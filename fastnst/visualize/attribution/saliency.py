"""Saliency maps: a target's sensitivity to each pixel (Simonyan et al. 2013, arXiv:1312.6034)."""

import math

import torch
from torch import Tensor

from fastnst.errors import UserError
from fastnst.models.vgg19 import LAYERS, VGG19
from fastnst.visualize.attribution.targets import (
    Target,
    as_input,
    check_at_least_one,
    check_choice,
    check_target,
    is_whole,
    total_activation,
)

METHODS = ("plain", "guided", "smoothgrad")


def saliency(
    net: VGG19,
    images: Tensor,
    target: Target,
    *,
    method: str = "plain",
    samples: int = 25,
    noise: float = 0.15,
    seed: int = 0,
    batch_size: int = 16,
) -> Tensor:
    """Compute the largest |∂score/∂pixel| of the colours, pixels in [0, 1] (Simonyan et al. 2013, §3.1).

    - `plain`: the gradient itself.
    - `guided`: guided backpropagation (Springenberg et al. 2014, arXiv:1412.6806, §3.4): each ReLU passes a gradient
      only where both its input and the gradient are positive. Sharper, but less faithful to the target (Adebayo et
      al. 2018, "Sanity checks for saliency maps").
    - `smoothgrad` (Smilkov et al. 2017, arXiv:1706.03825, §2): the signed gradient is averaged over noisy copies of the
      image, then the absolute value is taken. Each image gets the same noise, drawn on the CPU, whatever the other
      images and `batch_size`. Noisy pixels are not clamped to [0, 1].

    Args:
        net: VGG19, loaded at least up to the target's layer.
        images: `[N, 3, H, W]`, RGB in [0, 1].
        target: see `targets.parse_target`.
        method: one of `METHODS`.
        samples: noisy copies of each image; smoothgrad only, as are the next two.
        noise: its standard deviation, in parts of the image's range max − min.
        seed: of the noise.
        batch_size: images in one forward and backward pass.

    Returns:
        `[N, H, W]` ≥ 0, on the net's device and in its type.

    Raises:
        DataError: a class, and the net ends before fc8.
        UserError: unknown method, layer or map, images that do not fit, or a number out of range.
    """
    check_choice("saliency method", method, METHODS)
    check_at_least_one("batch_size", batch_size)
    check_at_least_one("samples", samples)
    if not is_whole(seed):
        raise UserError(f"seed is {seed!r}; give a whole number")
    if not (isinstance(noise, int | float) and math.isfinite(noise) and noise >= 0):
        raise UserError(f"noise is {noise}; give a part of the image's range, 0 or more, for example 0.15")
    check_target(net, target)
    images = as_input(net, images).detach()
    if method == "smoothgrad":
        parts = [_smoothed(net, image, target, samples, noise, seed, batch_size) for image in images.split(1)]
    else:
        parts = [_gradient(net, part, target, guided=method == "guided") for part in images.split(batch_size)]
    return torch.cat(parts).abs().amax(dim=1)


def _smoothed(
    net: VGG19, image: Tensor, target: Target, samples: int, noise: float, seed: int, batch_size: int
) -> Tensor:
    """Average the gradient over noisy copies of one image, `[1, 3, H, W]`."""
    deviation = noise * (image.amax() - image.amin())
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(image)
    for done in range(0, samples, batch_size):
        # One draw per copy: the numbers of a larger draw depend on its size.
        draws = [torch.randn(image.shape[1:], generator=generator) for _ in range(min(batch_size, samples - done))]
        noisy = image + deviation * torch.stack(draws).to(image)
        total += _gradient(net, noisy, target, guided=False).sum(dim=0, keepdim=True)
    return total / samples


def _gradient(net: VGG19, images: Tensor, target: Target, *, guided: bool) -> Tensor:
    """Compute ∂score/∂pixel, `[N, 3, H, W]`, also where the caller has switched gradients off."""
    relus = [name for name in LAYERS[: LAYERS.index(target.layer) + 1] if name.startswith("relu")] if guided else []
    with torch.inference_mode(False), torch.enable_grad():
        # A copy, because an inference tensor cannot take part in a backward pass.
        pixels = images.clone().requires_grad_()
        outputs = net(pixels, [*relus, target.layer])
        # Hooks on the ReLUs' outputs vanish with this graph. A ReLU's own backward passes gradients of positive inputs,
        # the hook before it positive gradients.
        for name in relus:
            outputs[name].register_hook(lambda gradient: gradient.clamp(min=0))
        return torch.autograd.grad(total_activation(outputs[target.layer], target).sum(), pixels)[0]
