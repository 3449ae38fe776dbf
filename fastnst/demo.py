"""`fastnst demo`: a small style from nothing but what is installed, in a few minutes on two CPU cores.

The photos come with scikit-image and are in the public domain (NASA's astronaut and deep field, a rocket, a cat, a
cup of coffee); the style image is drawn here.
"""

import logging
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastnst.config import load_config
from fastnst.errors import UserError
from fastnst.images import check_replaceable, write_image
from fastnst.progress import phase
from fastnst.storage import ForeignFileError
from fastnst.training.signals import StopRequest

log = logging.getLogger(__name__)

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
SHOWN = "chelsea"
IMAGE_SIZE = 128
STEPS = 120

# Features of random weights are of one size in all layers, and their Grams closer to one another than trained ones'.
RANDOM_WEIGHTS = (
    "loss.style_layer_weights=[3.0, 7.0, 30.0, 30.0]",
    "loss.style_weight=5.0",
    "loss.content_weight=25.0",
    "loss.tv_weight=4.0",
)

_PALETTE = ("#0b1e3f", "#123c69", "#1f6f8b", "#3fa7a3", "#e8c547", "#f2e3bc", "#d1603d", "#7a1e2c")


def run_demo(out: Path, *, vgg: str, steps: int | None, stop: StopRequest | None = None) -> tuple[Path, Path]:
    """Train a style on crops of a few photos, and stylize one of them.

    Args:
        out: the run directory, new or empty; images are put into `out` with the suffix `-images`, where only images
            that fastnst wrote are replaced.
        vgg: as `--vgg`; if `auto` finds no weights and cannot download them, the demo says so and uses `random`.
        steps: training steps; None: enough to show the style.
        stop: as for `train`.

    Returns:
        The stylized image and the style model.

    Raises:
        UserError: scikit-image is not installed, `out` holds another run, or a foreign file has the name of an image.
    """
    from fastnst.models.files.early_checks import check_vgg19
    from fastnst.training.run_dir.layout import validate_run_dir

    logged = ["train.sample_every=50", "train.log_every=10", "visualize.every=50"]
    assignments = [f"data.image_size={IMAGE_SIZE}", *logged]
    if out.name in ("", ".."):  # `.` has a name only as an absolute path.
        out = out.resolve()
    images = out.parent / f"{out.name}-images"
    style, stylized = images / "style.png", images / f"{SHOWN}-stylised.png"
    options = {
        "train.steps": steps or STEPS,
        "style.image": style.absolute(),
        "data.folder": (images / "photos").absolute(),
    }
    validate_run_dir(out, load_config(preset="vgg-conv3", assignments=assignments, options=options), resume=False)
    for path in (style, stylized, *(images / "photos" / f"{name}.png" for name in PHOTOS)):
        try:
            check_replaceable(path)
        except ForeignFileError as error:
            raise UserError(f"{path} exists, and fastnst did not write it; choose another --out") from error
    check_vgg19(vgg)
    with phase("import PyTorch"):
        from fastnst.inference import stylize_files
        from fastnst.models.weights import WeightsUnavailable, load_vgg19
        from fastnst.training.train import train
    with phase("draw the photos and the style"):
        photos = write_photos(images / "photos")
        write_image(style, draw_strokes(256))
    if vgg == "auto":
        try:
            load_vgg19("auto", last_layer="relu3_4")
        except WeightsUnavailable as error:
            log.warning("%s\nThe demo goes on with random VGG19 weights: textures and colours still carry over.", error)
            vgg = "random"
    if vgg == "random":
        assignments += RANDOM_WEIGHTS
    config = load_config(preset="vgg-conv3", assignments=assignments, options=options | {"loss.vgg": vgg})
    (model,) = train(config, out, stop=stop)
    shown = next(path for path in photos if path.stem == SHOWN)
    stylize_files(out, [shown], stylized)
    return stylized, model


def write_photos(folder: Path) -> list[Path]:
    """Write the demo's photos as PNG files into `folder`."""
    try:
        from skimage import data
    except ImportError as error:
        raise UserError("the demo's photos come with scikit-image; pip install 'fastnst[demo]'") from error
    paths = []
    for name in PHOTOS:
        path = folder / f"{name}.png"
        write_image(path, np.asarray(getattr(data, name)()))
        paths.append(path)
    return paths


def draw_strokes(side: int, seed: int = 7) -> np.ndarray:
    """Draw a style image: brush strokes along a swirling flow, uint8 `[side, side, 3]`."""
    rng = np.random.default_rng(seed)
    scale = 3  # drawn larger and reduced, for smooth edges
    canvas = Image.new("RGB", (side * scale, side * scale), _PALETTE[1])
    draw = ImageDraw.Draw(canvas)
    vortices = [(*rng.uniform(0.05, 0.95, 2), rng.uniform(0.08, 0.22), rng.choice([-1, 1])) for _ in range(9)]
    palette = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in _PALETTE]
    for width, count in ((0.03, 1500), (0.016, 2500), (0.008, 3500)):
        for start in rng.uniform(-0.05, 1.05, (count, 2)):
            points = _streamline(start, vortices, steps=int(rng.integers(8, 18)))
            color = palette[_color_index(start, vortices, rng)]
            shade = rng.normal(0, 10)
            fill = tuple(int(np.clip(channel + shade, 0, 255)) for channel in color)
            pixels = [(x * side * scale, y * side * scale) for x, y in points]
            draw.line(pixels, fill=fill, width=max(1, round(width * side * scale)), joint="curve")
    return np.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS))


def _streamline(start: np.ndarray, vortices: list[tuple[float, ...]], steps: int) -> list[tuple[float, float]]:
    x, y = (float(value) for value in start)
    points = [(x, y)]
    for _ in range(steps):
        u, v = 0.35, 0.25 * math.sin(5 * x)
        for cx, cy, radius, sign in vortices:
            dx, dy = x - cx, y - cy
            strength = 1.6 * sign * math.exp(-(dx * dx + dy * dy) / (2 * radius * radius))
            u, v = u - strength * dy / radius, v + strength * dx / radius
        speed = math.hypot(u, v) or 1.0
        x, y = x + 0.009 * u / speed, y + 0.009 * v / speed
        points.append((x, y))
    return points


def _color_index(point: np.ndarray, vortices: list[tuple[float, ...]], rng: np.random.Generator) -> int:
    """Blues in the open, warm colours towards the middle of each vortex, with some strokes out of place."""
    nearest = min(math.hypot(point[0] - cx, point[1] - cy) / radius for cx, cy, radius, _ in vortices)
    base = 5.6 - 3.6 * min(nearest, 1.6) + rng.normal(0, 0.9)
    return int(np.clip(round(base), 0, len(_PALETTE) - 1)) if rng.random() > 0.06 else int(rng.integers(len(_PALETTE)))
