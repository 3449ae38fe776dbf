"""`fastnst visualize saliency` and `occlusion`: where in an image a target is seen, as heat maps and numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastnst.images import printable, to_array
from fastnst.models.vgg19 import VGG19
from fastnst.progress import ProgressReport, counted
from fastnst.visualize.attribution.occlusion import occlusion as measure_occlusion
from fastnst.visualize.attribution.saliency import saliency as measure_saliency
from fastnst.visualize.attribution.targets import Target, check_choice, score
from fastnst.visualize.sheets.render import Row, colour_scale, contact_sheet, heat_map, number, overlay
from fastnst.visualize.sheets.report import Report, Sheet, image_names

_LEGEND_WIDTH = 20  # pixels

_METHODS = {
    "plain": "How much the score changes with a pixel: the largest of |d score/d red|, green and blue, pixels being in "
    "[0, 1] (Simonyan et al. 2013).",
    "guided": "How much the score changes with a pixel, counting only what raises it on the whole way through the "
    "network (guided backpropagation, Springenberg et al. 2014).",
    "smoothgrad": "How much the score changes with a pixel, on average over noisy copies of the image (SmoothGrad, "
    "Smilkov et al. 2017).",
}
_OCCLUSION = (
    "How far the score falls, on average, when a square that holds the pixel is covered (Zeiler & Fergus 2014, §4.2)."
)


def saliency(
    net: VGG19,
    images: Sequence[Path],
    squares: Sequence[Tensor],
    target: Target,
    *,
    method: str = "plain",
    samples: int = 25,
    noise: float = 0.15,
) -> Report:
    """Saliency maps: a sheet per image with heat map and overlay, and the raw array.

    Args:
        net: as deep as the target's layer, on the device where it is to work.
        images: the files, for names.
        squares: their `[1, 3, H, W]`, RGB in [0, 1].
        target: what is explained.
        method, samples, noise: see `saliency.saliency`.

    Raises:
        UserError: an unknown method, or another argument out of range.
        DataError: a class, and the net ends before the classifier.
    """
    check_choice("saliency method", method, tuple(_METHODS))
    sheets = []
    with ProgressReport("saliency", len(images), "images") as progress:
        for path, name, square in zip(images, image_names(images), squares, strict=True):
            values = measure_saliency(net, square.to(net.mean), target, method=method, samples=samples, noise=noise)
            base = float(score(net, target, square.to(net.mean)))
            scale = colour_scale(values)
            sheets.append(
                _sheet(
                    f"visualize/saliency/{printable(name)}/{target.name}",
                    path,
                    f"{name}-saliency",
                    square,
                    values.float().cpu(),
                    title=f"{method} saliency of {target.name}, score {number(base)}",
                    note=f"black = 0; palest = {number(scale)} and more, per unit of a pixel",
                )
            )
            progress.advance()
    settings = _settings(target, squares[0]) | {"method": method}
    if method == "smoothgrad":
        settings["noisy copies"] = f"{samples}, standard deviation {noise:g} of the image's range"
    return Report(f"Saliency of {target.name}", _METHODS[method], settings, sheets)


def occlusion(
    net: VGG19,
    images: Sequence[Path],
    squares: Sequence[Tensor],
    target: Target,
    *,
    patch: int = 32,
    stride: int = 8,
    fill: str = "grey",
) -> Report:
    """Occlusion maps: a sheet per image with heat map and overlay, and the raw heat and scores.

    Args:
        net: as deep as the target's layer, on the device where it is to work.
        images: the files, for names.
        squares: their `[1, 3, H, W]`, RGB in [0, 1].
        target: what is explained.
        patch: side of the occluder in pixels.
        stride, fill: see `occlusion.occlusion`.

    Raises:
        UserError: an unknown fill, or another argument out of range.
        DataError: a class, and the net ends before the classifier.
    """
    sheets = []
    for path, name, square in zip(images, image_names(images), squares, strict=True):
        with counted(f"occlusion of {printable(path.name)}", "occluders") as count:
            measured = measure_occlusion(
                net, square.to(net.mean), target, size=patch, stride=stride, fill=fill, progress=count
            )
        scale = colour_scale(measured.heat)
        sheets.append(
            _sheet(
                f"visualize/occlusion/{printable(name)}/{target.name}",
                path,
                f"{name}-occlusion",
                square,
                measured.heat.float().cpu(),
                signed=True,
                title=f"{patch} × {patch} px {fill} occluder, {target.name}, score {number(float(measured.base))}",
                note=f"white = 0; dark red = the score falls by {number(scale)} and more; dark blue = it rises by that",
                arrays={"-scores.npy": measured.scores[0].float().cpu().numpy()},
            )
        )
    settings = _settings(target, squares[0]) | {
        "occluder": f"{patch} × {patch} px, {fill}",
        "stride": f"{stride} px",
    }
    return Report(f"Occlusion map of {target.name}", _OCCLUSION, settings, sheets)


def _sheet(
    tag: str,
    path: Path,
    name: str,
    square: Tensor,
    values: Tensor,
    *,
    signed: bool = False,
    title: str,
    note: str,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Sheet:
    """Image, overlay, heat map and its colours beside one another; `values` are `[1, H, W]` on the CPU."""
    scale, square = colour_scale(values), square.cpu().float()
    heat = heat_map(values, signed=signed, scale=scale)
    laid_over = overlay(square, heat)
    height = square.shape[2]
    steps = torch.linspace(1, -1 if signed else 0, height).reshape(1, height, 1).expand(-1, -1, _LEGEND_WIDTH)
    legend = heat_map(steps, signed=signed, scale=1.0)
    ends = f"{number(-scale if signed else 0)} to {number(scale)}"
    file_name = printable(path.name)
    image = contact_sheet(
        [Row([square, laid_over, heat, legend], [file_name, "over the image", "heat map", ends])],
        title=title,
        note=f"{note}.",
    )
    extras = {"-heat.png": to_array(heat), "-overlay.png": to_array(laid_over), "-heat.npy": values[0].numpy()}
    caption = f"{file_name}, {title}: {note}."
    alt = f"{file_name}; beside it a heat map of the same view, and the heat map laid over it in grey."
    return Sheet(name, tag, image, caption, alt, {**extras, **(arrays or {})})


def _settings(target: Target, square: Tensor) -> dict[str, str]:
    return {"target": target.name, "layer": target.layer, "size": f"{square.shape[3]} × {square.shape[2]} px"}
