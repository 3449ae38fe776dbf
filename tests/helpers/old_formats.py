"""Files as fastnst 0.1.0 wrote them, from literals: a run, a folder of styles, a style model, a cache of images.

Nothing here uses today's writers or names of keys, so that whoever renames one finds out what it costs: old files.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

CONFIG = """\
preset = "vgg-conv3"

[data]
folder = "{data}"
image_size = 16
loader = "pillow"
fit = "random_crop"
flip = true
workers = 1
prefetch = 3
max_failed_percent = 1.0

[style]
picture = "{style}"
size = 16

[model]
architecture = "lengstrom"
norm = "instance"

[loss]
vgg = "{vgg}"
vgg_flavour = "caffe"
content_layers = ["relu1_1"]
style_layers = ["relu1_1"]
style_layer_weights = []
content_weight = 2.0
style_weight = 50.0
tv_weight = 20.0
style_reduction = "mean"
tv_reduction = "mean"
feature_scale = "0-255"

[train]
batch_size = 2
steps = 3
epochs = 2.0
learning_rate = 0.003
precision = "{precision}"
device = "cpu"
engine = "fused"
compile = false
capture = "auto"
max_skipped_steps = 50
deterministic = false
seed = 0
log_every = 1
sample_every = 50
samples = 0
checkpoint_every = 2
keep_checkpoints = 3

[visualize]
every = 0
max_percent = 3.0
pictures = 1
vgg_maps = []
transform_maps = ["conv2:0", "conv3:0", "res1:0", "res3:0", "res5:0", "up1:0", "up2:0"]
"""

GONE = "image_03.png"
"""Accepted by the check, and gone in step 2; the next image takes its place."""


def write_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """Three photos of 24 × 20 px, two styles, and VGG19's first layer; returns the folders and the weights file."""
    photos, styles = folder / "photos", folder / "styles"
    rng = np.random.default_rng(0)
    for path in (*(photos / f"image_{index:02}.png" for index in range(3)), styles / "wave.png", styles / "storm.png"):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    vgg = {"features.0.weight": torch.randn(64, 3, 3, 3) / 9, "features.0.bias": torch.zeros(64)}
    (folder / "vgg.safetensors").write_bytes(safetensors.torch.save(vgg))
    return photos, styles, folder / "vgg.safetensors"


def write_run(run: Path, photos: Path, style: Path, vgg: Path, precision: str = "fp32") -> None:
    """A run of 3 steps that was killed behind its checkpoint of step 2; in fp16 it had skipped 7 before."""
    run.mkdir(parents=True)
    text = CONFIG.format(data=photos, style=style, vgg=vgg, precision=precision)
    (run / "config.toml").write_text(text)
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss/total": 1274.5, "loss/content": 11.25, "train/learning_rate": 0.003}\n'
        '{"step": 2, "loss/total": 937.25, "loss/content": 10.5, "train/learning_rate": 0.003}\n'
    )
    (run / "rejected.jsonl").write_text(
        '{"path": "broken.png", "reason": "it holds text, not a picture; give JPEG, PNG or WebP"}\n'
        f'{{"path": "{GONE}", "reason": "No such file or directory", "step": 2, "checked": {{"name": "{GONE}", '
        '"size": 1500, "width": 24, "height": 20, "format": "PNG", "plain": true}}\n'
    )
    images = [(path.name, path.stat().st_size) for path in sorted(photos.iterdir())]
    scaler = {"scale": 2.0**-10, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    scaler |= {"_growth_tracker": 1, "skipped_steps": 7, "skipped_in_a_row": 0}
    state = {
        "scaler": scaler if precision == "fp16" else {},
        "configuration": _dotted(text),
        "fingerprints": {
            "data": _fingerprint([*images, (GONE, 1500)]),
            "style": hashlib.sha256(style.read_bytes()).hexdigest(),
            "vgg": _vgg_fingerprint(vgg),
        },
        "pictures": 4,
        "world_size": 1,
    }
    weights = net_tensors("lengstrom", "instance")
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        tensors |= {f"optimizer.exp_avg.{name}": tensor / 100, f"optimizer.exp_avg_sq.{name}": tensor**2}
        tensors[f"optimizer.step.{name}"] = torch.tensor(2.0)
    tensors["rng.cpu"] = torch.get_rng_state()
    checkpoint = run / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    files = {"state.safetensors": safetensors.torch.save(tensors), "state.json": _json(state)}
    manifest = {
        "format": 1,
        "step": 2,
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    for name, data in {**files, "manifest.json": _json(manifest)}.items():
        (checkpoint / name).write_bytes(data)
    write_style_model(run / "model.safetensors", "lengstrom", "instance")


def write_style_folder(out: Path, photos: Path, styles: Path, vgg: Path) -> None:
    """Two styles that were trained together."""
    images = {path.stem: path for path in sorted(styles.iterdir(), reverse=True)}
    for name, image in images.items():
        write_run(out / name, photos, image, vgg)
    (out / "styles.json").write_bytes(_json({name: str(image) for name, image in images.items()}))


def write_style_model(file: Path, architecture: str, norm: str) -> None:
    """A `model.safetensors` of 2 steps."""
    metadata = {
        **{"kind": "fastnst style model", "format_version": "1", "fastnst_version": "0.1.0"},
        **{"architecture": architecture, "norm": norm, "preset": "vgg-conv3", "style": "wave.png"},
        **{"style_sha256": "0" * 64, "steps": "2", "image_size": "16"},
    }
    file.write_bytes(safetensors.torch.save(net_tensors(architecture, norm), metadata=metadata))


def write_cache(cache: Path, photos: Path) -> list[np.ndarray]:
    """The photos at 16 px for `random_crop`, grey values that tell them apart; returns the images as stored."""
    cache.mkdir()
    images, rows, paths = [], [], sorted(photos.iterdir())
    for index, path in enumerate(paths):
        images.append(np.full((16, 19, 3), 50 * (index + 1), dtype=np.uint8))
        rows.append([path.name, path.stat().st_size, 24, 20, "PNG", True, 1795962345732936353, index * 912, 16, 19])
    shard = b"".join(image.tobytes() for image in images)
    plan = hashlib.sha256(b"1 random_crop 16 13.0.0" + b"".join(json.dumps(row).encode() for row in rows)).hexdigest()
    head = {
        **{"kind": "fastnst cache", "format": 1, "size": 16, "fit": "random_crop", "pillow": "13.0.0"},
        "source": str(photos),
        "fingerprint": _fingerprint([(path.name, path.stat().st_size) for path in paths]),
        "columns": ["path", "bytes", "width", "height", "format", "plain", "mtime_ns", "offset", "rows", "columns"],
        "rejected": [["broken.png", "it holds text, not a picture; give JPEG, PNG or WebP"]],
        "shards": [
            {
                **{"name": "shard_0000.u8", "size": len(shard), "sha256": hashlib.sha256(shard).hexdigest()},
                **{"plan": plan, "pictures": rows},
            }
        ],
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    (cache / "manifest.json").write_text(f"{{\n{lines}\n}}\n")
    (cache / "shard_0000.u8").write_bytes(shard)
    return images


def net_tensors(architecture: str, norm: str) -> dict[str, Tensor]:
    """Weights of a transform net, by the names and shapes that they had."""
    layers = {"conv1": (32, 3, 9, 9), "conv2": (64, 32, 3, 3), "conv3": (128, 64, 3, 3)}
    layers |= {f"res{block}.conv{index}": (128, 128, 3, 3) for block in range(1, 6) for index in (1, 2)}
    transposed = architecture != "johnson"
    layers |= {"up1": (128, 64, 3, 3), "up2": (64, 32, 3, 3)} if transposed else {}
    layers |= {"up1": (64, 128, 3, 3), "up2": (32, 64, 3, 3)} if not transposed else {}
    layers |= {"out": (3, 32, 9, 9)}
    tensors = {}
    for name, shape in layers.items():
        channels = shape[1] if transposed and name.startswith("up") else shape[0]
        tensors[f"{name}.weight"] = torch.randn(shape) / 50
        if name == "out" and not transposed:
            tensors["out.bias"] = torch.zeros(3)
            continue
        tensors |= {f"{name}.scale": torch.ones(channels), f"{name}.shift": torch.zeros(channels)}
        if norm == "batch":
            tensors |= {f"{name}.running_mean": torch.zeros(channels), f"{name}.running_var": torch.ones(channels)}
    return tensors


def _dotted(toml: str) -> dict[str, str]:
    """Each line of a configuration as the checkpoints have it: `section.key` → value as TOML."""
    values, section = {}, ""
    for line in toml.splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif line:
            key, _, value = line.partition(" = ")
            values[section + key] = value
    return values


def _fingerprint(images: list[tuple[str, int]]) -> str:
    return hashlib.sha256(b"".join(f"{name}\0{size} 24 20\0".encode() for name, size in images)).hexdigest()


def _vgg_fingerprint(file: Path) -> str:
    tensors = safetensors.torch.load_file(file)
    parts = [("conv1_1.weight", "features.0.weight"), ("conv1_1.bias", "features.0.bias")]
    return hashlib.sha256(
        b"caffe" + b"".join(name.encode() + tensors[key].numpy().tobytes() for name, key in parts)
    ).hexdigest()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
