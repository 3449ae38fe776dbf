"""`fastnst visualize saliency`: heat maps of a target's sensitivity to the pixels."""

from collections.abc import Sequence
from pathlib import Path

from fastnst.device import resolve_device
from fastnst.errors import UserError
from fastnst.images import printable
from fastnst.progress import ProgressReport
from fastnst.visualize.attribution.saliency import METHODS, saliency
from fastnst.visualize.attribution.targets import check_choice, parse_target, score
from fastnst.visualize.commands import options
from fastnst.visualize.sheets.heat_figure import heat_figure
from fastnst.visualize.sheets.render import colour_scale, number
from fastnst.visualize.sheets.report import Report, image_names

_HOW_TO_READ = {
    "plain": "How much the score changes with a pixel: the largest of |d score/d red|, green and blue, pixels being in "
    "[0, 1] (Simonyan et al. 2013).",
    "guided": "How much the score changes with a pixel, counting only what raises it on the whole way through the "
    "network (guided backpropagation, Springenberg et al. 2014).",
    "smoothgrad": "How much the score changes with a pixel, on average over noisy copies of the image (SmoothGrad, "
    "Smilkov et al. 2017).",
}


def saliency_report(
    images: Sequence[Path],
    target: str,
    *,
    method: str,
    samples: int | None,
    noise: float | None,
    size: int | None,
    vgg: str,
    device: str,
) -> Report:
    """Draw a heat map per image. Raises as `deconvnet_report` does."""
    check_choice("saliency method", method, METHODS)
    for name, value in (("--samples", samples), ("--noise", noise)):
        if value is not None and method != "smoothgrad":
            raise UserError(f"{name} is for --method smoothgrad, not for {method}; leave it out")
    samples, noise = 25 if samples is None else samples, 0.15 if noise is None else noise
    chosen = parse_target(target)
    size = options.vgg_size([chosen.layer], size)
    torch_device = resolve_device(device)
    crops = options.read_crops(images, size, [chosen.layer])
    figures = []
    with options.memory_errors(torch_device, "--size", size):
        net = options.load_vgg_for_target(vgg, chosen, torch_device)
        with ProgressReport("saliency", len(images), "images") as progress:
            for path, name, crop in zip(images, image_names(images), crops, strict=True):
                values = saliency(net, crop.to(net.mean), chosen, method=method, samples=samples, noise=noise)
                base = float(score(net, chosen, crop.to(net.mean)))
                figures.append(
                    heat_figure(
                        f"{name}-saliency",
                        f"visualize/saliency/{printable(name)}/{chosen.name}",
                        path,
                        crop,
                        values.float().cpu(),
                        title=f"{method} saliency of {chosen.name}, score {number(base)}",
                        note=f"black = 0; palest = {number(colour_scale(values))} and more, per unit of a pixel",
                    )
                )
                progress.advance()
    settings = {"target": chosen.name, "layer": chosen.layer} | options.size_setting(crops[0]) | {"method": method}
    if method == "smoothgrad":
        settings["noisy copies"] = f"{samples}, standard deviation {noise:g} of the image's range"
    settings |= options.weights_setting(vgg, net)
    return Report(f"Saliency of {chosen.name}", _HOW_TO_READ[method], settings, figures)
