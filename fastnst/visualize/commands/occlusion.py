"""`fastnst visualize occlusion`: heat maps of a score's drop when parts of the image are covered."""

from collections.abc import Sequence
from pathlib import Path

from fastnst.device import resolve_device
from fastnst.images import printable
from fastnst.progress import counted
from fastnst.visualize.attribution.occlusion import FILLS, occlusion
from fastnst.visualize.attribution.targets import check_choice, parse_target
from fastnst.visualize.commands import options
from fastnst.visualize.sheets.heat_figure import heat_figure
from fastnst.visualize.sheets.render import colour_scale, number
from fastnst.visualize.sheets.report import Report, image_names

_HOW_TO_READ = (
    "How far the score falls, on average, when a square that holds the pixel is covered (Zeiler & Fergus 2014, §4.2)."
)


def occlusion_report(
    images: Sequence[Path],
    target: str,
    *,
    patch: int,
    stride: int,
    fill: str,
    size: int | None,
    vgg: str,
    device: str,
) -> Report:
    """Draw a heat map per image. Raises as `deconvnet_report` does."""
    check_choice("fill", fill, FILLS)
    chosen = parse_target(target)
    size = options.vgg_size([chosen.layer], size)
    torch_device = resolve_device(device)
    crops = options.read_crops(images, size, [chosen.layer])
    figures = []
    with options.memory_errors(torch_device, "--size", size):
        net = options.load_vgg_for_target(vgg, chosen, torch_device)
        for path, name, crop in zip(images, image_names(images), crops, strict=True):
            with counted(f"occlusion of {printable(path.name)}", "occluders") as count:
                found = occlusion(
                    net,
                    crop.to(net.mean),
                    chosen,
                    size=patch,
                    stride=stride,
                    fill=fill,
                    batch_size=options.batch_that_fits(torch_device, size, 32),
                    progress=count,
                )
            scale = number(colour_scale(found.heat))
            figures.append(
                heat_figure(
                    f"{name}-occlusion",
                    f"visualize/occlusion/{printable(name)}/{chosen.name}",
                    path,
                    crop,
                    found.heat.float().cpu(),
                    signed=True,
                    title=f"{patch} × {patch} px {fill} occluder, {chosen.name}, score {number(float(found.base))}",
                    note=f"white = 0; dark red = the score falls by {scale} and more; dark blue = it rises by that",
                    arrays={"-scores.npy": found.scores[0].float().cpu().numpy()},
                )
            )
    settings = {"target": chosen.name, "layer": chosen.layer} | options.size_setting(crops[0])
    occluder = {"occluder": f"{patch} × {patch} px, {fill}", "stride": f"{stride} px"}
    settings |= occluder | options.weights_setting(vgg, net)
    return Report(f"Occlusion map of {chosen.name}", _HOW_TO_READ, settings, figures)
