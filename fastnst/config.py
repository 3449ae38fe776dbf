"""The configuration of a run: frozen sections, presets, and the precedence of sources.

Precedence: command line (`--set` and named options) > environment (`FASTNST_SECTION__KEY`) > TOML file > preset
> default. The value `unset` removes an optional key's value that a lower source sets.
Each part of the program receives its own section only.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fastnst.config_text import (
    RENAMED_KEYS,
    UNSET,
    environment_texts,
    nearest,
    parse_value,
    read_toml,
    shown,
    split_assignment,
    toml_value,
    update_old_keys,
)
from fastnst.errors import UserError

DEFAULT_PRESET = "hwalsuklee"

# Layers of VGG19 and of the transform net. Repeated here, and compared with `models` by tests, because reading a
# configuration must not import torch.
LOSS_LAYERS = tuple(
    f"{kind}{block}_{index}"
    for block, count in enumerate((2, 2, 4, 4, 4), start=1)
    for index in range(1, count + 1)
    for kind in ("conv", "relu")
) + tuple(f"pool{block}" for block in range(1, 6))
TRANSFORM_LAYERS = ("conv1", "conv2", "conv3", *(f"res{index}" for index in range(1, 6)), "up1", "up2", "out")


class Section(BaseModel):
    """Base class of the sections: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _unset_and_numbers(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[str(info.field_name)].annotation
        types = {annotation, *get_args(annotation)}
        if value == UNSET and NoneType in types:
            return None
        # To Python true is 1; to a user `steps = true` is a mistake.
        items = value if isinstance(value, list | tuple) else (value,)
        if types & {int, float} and any(isinstance(item, bool) for item in items):
            raise ValueError(f"expects {'numbers' if items is value else 'a number'}, got {toml_value(value)}")
        # Tensors, event logs and file systems would refuse these much later, with worse messages.
        if any(isinstance(item, int) and abs(item) >= 2**63 for item in items):
            raise ValueError("a number has to fit in 64 bits")
        if any(isinstance(item, str | Path) and "\0" in str(item) for item in items):
            raise ValueError("a text must not contain a null character")
        return value


class DataConfig(Section):
    """Training images: source, decoding, cropping."""

    folder: Path | None = None
    """Folder of images, including its subfolders, or a cache (`fastnst data cache`)."""
    image_size: int = Field(default=256, ge=16, le=2048)
    """Side of the square crops, in pixels."""
    loader: Literal["dali", "pillow"] = "dali"
    """Decoder: DALI (on the GPU if there is one) or Pillow in worker processes; a cache needs neither."""
    fit: Literal["random_crop", "center_crop", "squash"] = "random_crop"
    """Resize the short side to `image_size` and crop, or resize both sides."""
    flip: bool = True
    """Mirror each image left to right with probability one half."""
    workers: int | None = Field(default=None, ge=1, le=256)
    """Threads of DALI or the cache, or processes of Pillow; unset: one per core, at most 16."""
    prefetch: int = Field(default=3, ge=1, le=64)
    """Batches loaded ahead of the training step."""
    max_failed_percent: float = Field(default=1.0, ge=0, le=100)
    """Percentage of images that may become unreadable during the run, at least three images; each is replaced by the
    next one. 0: none."""


class StyleConfig(Section):
    """The style image."""

    image: Path | None = None
    size: int | None = Field(default=None, ge=16, le=4096)
    """Longest side, in pixels, to which the style image is reduced before its Gram matrices are computed; smaller
    values give larger strokes. Unset: the image's own size, at most 1024."""


class ModelConfig(Section):
    """The transform net."""

    architecture: Literal["hwalsuklee", "lengstrom", "johnson"] = "hwalsuklee"
    """Padding, upsampling, output and initialisation of one published implementation."""
    norm: Literal["instance", "batch"] = "instance"
    """Statistics per image (Ulyanov et al. 2016) or per batch (Johnson et al. 2016)."""


class LossConfig(Section):
    """The loss network φ and the terms measured on it (paper, equations 1 to 4)."""

    vgg: str = "auto"
    """VGG19 weights: `auto` (cached or downloaded), `random` (He initialisation, seeded), or a `.pth` or `.safetensors`
    file with torchvision's key names."""
    vgg_flavour: Literal["auto", "torchvision", "caffe"] = "auto"
    """Input preprocessing that the weights expect; `auto` detects it from the file."""
    content_layers: tuple[str, ...] = ("relu4_2",)
    style_layers: tuple[str, ...] = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    style_layer_weights: tuple[float, ...] = ()
    """One factor per style layer; empty means 1 for each."""
    content_weight: float = Field(default=7.5, ge=0)
    style_weight: float = Field(default=5e2, ge=0)
    tv_weight: float = Field(default=2e2, ge=0)
    style_reduction: Literal["mean", "sum"] = "mean"
    """Over the C² entries of G - A: `sum` is equation 4, ‖G - A‖²_F; `mean` divides it by C², as most codes do."""
    tv_reduction: Literal["mean", "sum"] = "mean"
    """Over the squared differences of each direction of ŷ."""
    feature_scale: Literal["0-255", "unit"] = "0-255"
    """Input scale of φ for which the weights above were tuned: 0-255 pixels (Caffe) or unit variance (torchvision).
    φ is positively homogeneous, so features of the other flavour are rescaled to it."""

    @field_validator("content_layers", "style_layers")
    @classmethod
    def _known_layers(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for layer in layers:
            if layer not in LOSS_LAYERS:
                raise ValueError(f"no VGG19 layer is named {layer!r}{nearest(layer, LOSS_LAYERS)}")
        if len(set(layers)) != len(layers):
            raise ValueError(f"a layer is named twice in {list(layers)}")
        return layers

    @field_validator("style_layer_weights")
    @classmethod
    def _no_negative_weight(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if any(weight < 0 for weight in weights):
            raise ValueError(f"weights are 0 or more, got {list(weights)}")
        return weights

    @model_validator(mode="after")
    def _one_weight_per_layer(self) -> "LossConfig":
        if self.style_layer_weights and len(self.style_layer_weights) != len(self.style_layers):
            raise ValueError(
                f"style_layer_weights has {len(self.style_layer_weights)} numbers for {len(self.style_layers)} "
                "style_layers; give one for each, or none"
            )
        if not self.content_layers and not self.style_layers:
            raise ValueError("content_layers and style_layers are both empty; name at least one layer")
        return self


class TrainConfig(Section):
    """Optimisation, logging and checkpoints."""

    batch_size: int = Field(default=4, ge=1, le=4096)
    steps: int | None = Field(default=None, ge=1)
    """Training steps; unset: as many as `epochs` needs."""
    epochs: float = Field(default=2.0, gt=0, le=1e9)
    """Passes over the images; used where `steps` is unset."""
    learning_rate: float = Field(default=1e-3, gt=0)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of matrix products; sums, losses and statistics stay fp32. `auto`: bf16 on CUDA, fp32 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    engine: Literal["fused", "autograd"] = "fused"
    """Gradient of the loss: hand-written passes, or autograd of the plain formula. They round differently."""
    compile: bool = False
    """Compile both networks and the loss with torch.compile; uses the plain formula, whatever `engine` says."""
    capture: Literal["auto", "off"] = "auto"
    """`auto`: on CUDA, in a single process, with the fused engine, unless deterministic, a step is captured as a CUDA
    graph and replayed. The graph keeps a step's memory between steps; `off` launches each operation anew."""
    max_skipped_steps: int = Field(default=50, ge=1)
    """fp16: this many consecutive steps with overflowing gradients end the run. Each halves the loss scale from 65536:
    after 50 it is 6e-11, and gradients that still overflow are above 1e15, or NaN at any scale."""
    deterministic: bool = False
    """Bitwise equal runs: deterministic algorithms only, which are slower; an operation without one is an error. On a
    CPU for one number of threads (`OMP_NUM_THREADS`); on CUDA for one GPU model and one version of torch, CUDA, cuDNN
    and Triton.

    Not covered: DALI on CUDA, which decodes JPEGs with a hardware engine and with kernels, which may round differently
    (`data.loader = "pillow"` decodes on the CPU), and torch.compile's choices by timing. Without this key cuDNN's
    algorithms are chosen by timing, too, and may add floats in any order."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    log_every: int = Field(default=20, ge=1)
    """Steps between rows of metrics; the first and last step are always logged."""
    sample_every: int = Field(default=500, ge=1)
    """Steps between sets of stylized samples and histograms in TensorBoard."""
    samples: int = Field(default=4, ge=0, le=64)
    """Number of images, the first of the folder, stylized for TensorBoard."""
    checkpoint_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=3, ge=1)
    """Number of checkpoints to keep."""

    @field_validator("device", mode="before")
    @classmethod
    def _device_name(cls, device: object) -> object:
        return "cuda" if device == "gpu" else device


class VisualizeConfig(Section):
    """Projections back to pixels while training, for TensorBoard."""

    every: int = Field(default=500, ge=0)
    """Steps between two sets of projections, beside those before the first step and after the last; 0: none at all."""
    images: int = Field(default=2, ge=1, le=64)
    """Fixed images, the first of the folder, on which the networks are watched."""
    vgg_maps: tuple[str, ...] = ()
    """Maps of VGG19 on the stylized image: `relu3_1:17` (strongest activation of this map) or `relu3_1` (all maps).
    Empty: in each layer of the loss, the map with the strongest activation on the first image."""
    transform_maps: tuple[str, ...] = ("conv2:0", "conv3:0", "res1:0", "res3:0", "res5:0", "up1:0", "up2:0")
    """Maps of the transform net, in the same notation; all activations of a map are projected together."""

    @field_validator("vgg_maps", "transform_maps")
    @classmethod
    def _layers_and_maps(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        layers = LOSS_LAYERS if info.field_name == "vgg_maps" else TRANSFORM_LAYERS
        for name in names:
            layer, colon, number = name.partition(":")
            if layer not in layers:
                raise ValueError(f"there is no layer {layer!r}{nearest(layer, layers)}")
            if colon and not number.isdecimal():
                raise ValueError(f"{name!r} names no map; write a layer and a number, as in '{layer}:0'")
        return names


class Config(Section):
    """Everything that determines a run's outcome; saved as `config.toml` in its directory."""

    preset: str = DEFAULT_PRESET
    data: DataConfig = DataConfig()
    style: StyleConfig = StyleConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    visualize: VisualizeConfig = VisualizeConfig()


SECTIONS: dict[str, type[Section]] = {
    name: type(field.default) for name, field in Config.model_fields.items() if isinstance(field.default, Section)
}


def preset_names() -> list[str]:
    """List the presets, the default first."""
    files = [entry.name for entry in resources.files("fastnst.presets").iterdir()]
    names = [name.removesuffix(".toml") for name in files if name.endswith(".toml")]
    return sorted(names, key=lambda name: (name != DEFAULT_PRESET, name))


def load_config(
    *,
    preset: str | None = None,
    file: Path | None = None,
    is_saved: bool = False,
    assignments: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Merge all sources into a validated configuration.

    Args:
        preset: name of a preset; None: `preset` of the environment or file, else `hwalsuklee`.
        file: a TOML file with any of the sections.
        is_saved: `file` is a run's own `config.toml`: do not warn of old keys, which no user wrote.
        assignments: `section.key=value` strings, values in TOML syntax (bare words are strings).
        options: dotted key → value from named command-line options; None values are ignored.
        environment: `FASTNST_SECTION__KEY` variables; default `os.environ`.

    Raises:
        UserError: an unknown preset, section or key, a wrong type, or a value out of range; the message names the key,
            the value, what is allowed and the nearest name.
    """
    in_file = {} if file is None else read_toml(file)
    variables = environment_texts(os.environ if environment is None else environment)
    in_environment = _nested((key, _parse(key, text)) for key, text in variables.items())
    given = [(key, value) for key, value in {"preset": preset, **(options or {})}.items() if value is not None]
    given += [(key, _parse(key, text)) for key, text in map(split_assignment, assignments)]
    sources = ((str(file), in_file), ("the environment", in_environment), ("the command line", _nested(given)))
    name: Any = DEFAULT_PRESET
    for source, values in sources:
        update_old_keys(values, source, warn=not (is_saved and values is in_file))
        _check_keys(values, source)
        name = values.get("preset", name)
    if name not in preset_names():
        near = nearest(shown(name).strip("'"), preset_names())
        raise UserError(f"unknown preset {shown(name)}{near}; presets: {', '.join(preset_names())}")
    merged = tomllib.loads(resources.files("fastnst.presets").joinpath(f"{name}.toml").read_text("utf-8"))
    for _, values in sources:
        _merge(merged, values)
    return _validate(merged | {"preset": name})


def to_toml(config: Config) -> str:
    """Write all keys as TOML, so that `load_config(file=…)` gives an equal configuration whatever the presets contain.

    Raises:
        UserError: a path is not UTF-8.
    """
    lines = [f"preset = {toml_value(config.preset)}"]
    for section, model in SECTIONS.items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {toml_value(getattr(getattr(config, section), key))}" for key in model.model_fields]
    return "\n".join(lines) + "\n"


def _parse(key: str, text: str) -> Any:
    return parse_value(text, _annotation(RENAMED_KEYS.get(key, key)))


def _nested(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Turn dotted keys into nested dictionaries; a later pair overrides an earlier one."""
    nested: dict[str, Any] = {}
    for dotted, value in pairs:
        *sections, key = dotted.split(".")
        values = nested
        for section in sections:
            values = values.setdefault(section, {})
            if not isinstance(values, dict):
                raise UserError(f"{dotted!r} sets a key below {section!r}, which already has a value")
        values[key] = value
    return nested


def _merge(base: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _check_keys(values: Mapping[str, Any], source: str) -> None:
    """Refuse unknown names with the nearest known one, which pydantic's message would lack."""
    for section_name, section in values.items():
        if section_name not in Config.model_fields:
            dotted = [f"{name}.{key}" for name, model in SECTIONS.items() for key in model.model_fields]
            raise UserError(
                f"{source}: unknown key {shown(section_name)}{nearest(section_name, [*Config.model_fields, *dotted])}"
            )
        if section_name == "preset":
            continue
        keys = list(SECTIONS[section_name].model_fields)
        if not isinstance(section, Mapping):
            raise UserError(f"{source}: {section_name!r} is a section; set one of its keys: {', '.join(keys)}")
        for key in section:
            if key not in keys:
                near = nearest(key, keys, prefix=section_name + ".")
                raise UserError(
                    f"{source}: unknown key {shown(f'{section_name}.{key}')}{near}; "
                    f"[{section_name}] has {', '.join(keys)}"
                )


def _validate(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"][:2])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "literal_error":
        allowed = [str(value) for value in get_args(_annotation(key))]
        given = shown(item["input"])
        near = nearest(given.strip("'"), allowed)
        return f"{key} is {given}; allowed: {', '.join(allowed)}{near}"
    if item["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key} is {shown(item['input'])}: {message[0].lower()}{message[1:]}"


def _annotation(dotted: str) -> Any:
    """Return the type of a key; None for an unknown key."""
    section, _, key = dotted.partition(".")
    fields = SECTIONS[section].model_fields if section in SECTIONS else Config.model_fields
    field = fields.get(key or section)
    return None if field is None else field.annotation
