"""Configuration: the published numbers of the presets, precedence, messages, and files that read back equal."""

import os
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastnst.config import (
    LOSS_LAYERS,
    TRANSFORM_LAYERS,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    StyleConfig,
    TrainConfig,
    load_config,
    preset_names,
    to_toml,
)
from fastnst.errors import UserError

STYLE_1 = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


def load(*assignments: str, environment: dict[str, str] | None = None, **sources: Any) -> Config:
    return load_config(assignments=assignments, environment=environment or {}, **sources)


def message(*assignments: str, **sources: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*assignments, **sources)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert text.count("\n") <= 1
    assert "pydantic" not in text
    return text


# The numbers of the published implementations.


# Preset: content layers, style layers, their weights, weights of content, style and total variation.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "lengstrom": (("relu4_2",), STYLE_1, (), (7.5, 1e2, 2e2)),
    "hwalsuklee": (("relu4_2",), STYLE_1, (0.2,) * 5, (7.5, 5e2, 2e2)),
    "johnson": (("relu2_2",), ("relu1_2", "relu2_2", "relu3_3", "relu4_3"), (), (1e5, 1e10, 0.0)),
    "vgg-conv3": (("relu3_3",), ("relu1_1", "relu2_1", "relu3_1", "relu3_4"), (10, 1, 1, 0.02), (2.0, 50.0, 20.0)),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_load_config_gives_the_published_numbers_of_a_preset(preset: str) -> None:
    config = load(preset=preset)
    assert config.preset == preset
    architecture = "johnson" if preset == "vgg-conv3" else preset
    assert config.model == ModelConfig(architecture=architecture, norm="instance")
    loss = config.loss
    weights = (loss.content_weight, loss.style_weight, loss.tv_weight)
    assert (loss.content_layers, loss.style_layers, loss.style_layer_weights, weights) == PUBLISHED[preset]
    assert loss.feature_scale == ("unit" if preset == "johnson" else "0-255")
    assert loss.style_reduction == "mean"
    # All of them: batch of 4, Adam, two passes over images of 256²; the published ones at 1e-3.
    learning_rate = 3e-3 if preset == "vgg-conv3" else 1e-3
    assert (config.train.batch_size, config.train.learning_rate, config.train.epochs) == (4, learning_rate, 2.0)
    assert config.train.steps is None
    assert config.data.image_size == 256


def test_preset_names_begin_with_the_default() -> None:
    assert preset_names() == ["hwalsuklee", "johnson", "lengstrom", "vgg-conv3"]
    assert load() == load(preset="hwalsuklee")


def test_layers_to_choose_from_are_those_of_the_networks() -> None:
    from fastnst.models.transform_net import LAYER_NAMES
    from fastnst.models.vgg19 import LAYERS

    assert sorted(LOSS_LAYERS) == sorted(LAYERS[: LAYERS.index("pool5") + 1])
    assert TRANSFORM_LAYERS == LAYER_NAMES


# Precedence.


def test_load_config_precedence(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[loss]\nstyle_weight = 2\ntv_weight = 2\ncontent_weight = 2\n[train]\nsteps = 2\n")
    config = load(
        "loss.content_weight=5",
        preset="lengstrom",
        file=file,
        environment={"FASTNST_LOSS__TV_WEIGHT": "3", "FASTNST_LOSS__CONTENT_WEIGHT": "3", "FASTNST_TRAIN__STEPS": "3"},
        options={"train.steps": 4, "loss.content_weight": 4.0, "train.batch_size": None},
    )
    assert config.loss.style_layers == STYLE_1  # default
    assert config.model.architecture == "lengstrom"  # preset over default
    assert config.loss.style_weight == 2  # file over preset
    assert config.loss.tv_weight == 3  # environment over file
    assert config.train.steps == 4  # named option over environment
    assert config.loss.content_weight == 5  # --set over named option
    assert config.train.batch_size == 4  # an option that was not given changes nothing


def test_load_config_precedence_of_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('preset = "johnson"\n')
    variable = {"FASTNST_PRESET": "vgg-conv3"}
    assert load(file=file).preset == "johnson"
    assert load(file=file).model.architecture == "johnson"
    assert load(file=file, environment=variable).preset == "vgg-conv3"
    assert load(file=file, environment=variable, preset="lengstrom").preset == "lengstrom"
    assert load("preset=hwalsuklee", file=file, environment=variable, preset="lengstrom").preset == "hwalsuklee"


def test_load_config_reads_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNST_TRAIN__STEPS", "77")
    assert "FASTNST_CACHE" in os.environ  # no configuration key, and no error
    assert load_config().train.steps == 77


def test_load_config_unset_removes_what_the_preset_sets() -> None:
    assert load(preset="vgg-conv3").style.size == 256
    assert load("style.size=unset", preset="vgg-conv3").style.size is None
    assert "train.batch_size is 'unset'" in message("train.batch_size=unset")


# Values as they are typed.


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("train.steps=1_000", 1000),
        (" train.steps = 3 ", 3),
        ("train.learning_rate=2e-3", 2e-3),
        ("train.learning_rate=1", 1.0),
        ("data.flip=false", False),
        ("train.precision=fp16", "fp16"),
        ('train.precision="fp16"', "fp16"),
        ("train.device=gpu", "cuda"),
        ("data.folder=2024-05-01", Path("2024-05-01")),
        ("data.folder=007", Path("007")),
        ("data.folder=a=b", Path("a=b")),
        ("style.image=/p/night # 2.jpg", Path("/p/night # 2.jpg")),
        ("loss.vgg=1e3", "1e3"),
        ("loss.style_layers=[]", ()),
        ('loss.style_layers=["relu1_1", "pool2"]', ("relu1_1", "pool2")),
        ("loss.style_layers=relu1_1,pool2", ("relu1_1", "pool2")),
        ("loss.style_layers=[relu1_1, pool2]", ("relu1_1", "pool2")),
        ("loss.style_layers=pool2", ("pool2",)),
    ],
)
def test_load_config_parses_values_as_they_are_typed(assignment: str, value: object) -> None:
    config = load("loss.style_layer_weights=[]", assignment)
    section, key = assignment.partition("=")[0].strip().split(".")
    got = getattr(getattr(config, section), key)
    assert got == value
    assert type(got) is type(value)


# Messages.


def test_load_config_names_the_nearest_preset() -> None:
    text = message(preset="lengstrm")
    assert "'lengstrm'" in text
    assert "did you mean 'lengstrom'?" in text
    assert all(name in text for name in preset_names())


@pytest.mark.parametrize("value", ["5", "[1]", "{a = 1}"])
def test_load_config_refuses_a_preset_that_is_no_name(tmp_path: Path, value: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(f"preset = {value}\n")
    assert "unknown preset" in message(file=file)


def test_load_config_refuses_a_section_and_a_key_below_it() -> None:
    assert "'train.steps' sets a key below 'train'" in message("train=3", "train.steps=3")


def test_load_config_names_the_source_of_an_unknown_key(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[train]\nspeed = 3\n")
    assert f"{file}: unknown key 'train.speed'" in message(file=file)
    assert "the environment: unknown key 'train.speed'" in message(environment={"FASTNST_TRAIN__SPEED": "3"})


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("train.steps=many", ("train.steps", "'many'", "integer")),
        ("train.steps=1.5", ("train.steps", "1.5", "integer")),
        ("train.steps=true", ("train.steps", "a number, got true")),
        ("loss.style_layer_weights=[1, 1, false, 1, 1]", ("loss.style_layer_weights", "numbers, got [1, 1, false")),
        ("loss.style_layer_weights=[1, 1, -2, 1, 1]", ("loss.style_layer_weights", "0 or more", "-2")),
        ("loss.style_layer_weights=[1, 2]", ("style_layer_weights has 2 numbers for 5 style_layers",)),
        ("train.batch_size=0", ("train.batch_size", "0", "greater than or equal to 1")),
        ("data.image_size=8", ("data.image_size", "8", "16")),
        ("train.learning_rate=nan", ("train.learning_rate", "nan", "finite")),
        ("loss.style_weight=inf", ("loss.style_weight", "inf", "finite")),
        ("train.precision=bf61", ("train.precision", "'bf61'", "auto, bf16, fp16, fp32", "did you mean 'bf16'?")),
        ("model.architecture=jonson", ("'jonson'", "did you mean 'johnson'?")),
        ("loss.content_layers=relu4_9", ("loss.content_layers", "'relu4_9'", "did you mean 'relu4_")),
        ("loss.content_layers=relu4_2,relu4_2", ("loss.content_layers", "named twice")),
        ("data.flip=perhaps", ("data.flip", "'perhaps'", "boolean")),
        ("train.steps.a=1", ("train.steps", "integer")),
        ("train.steps=1\npreset = 'johnson'", ("train.steps", "integer")),
        ("visualize.vgg_maps=['relu3_5:1']", ("vgg_maps: there is no layer 'relu3_5'; did you mean 'relu3_",)),
        ("visualize.transform_maps=['res6']", ("transform_maps: there is no layer 'res6'; did you mean 'res",)),
        ("visualize.transform_maps=['res5:']", ("'res5:' names no map; write a layer and a number, as in 'res5:0'",)),
        ("visualize.transform_maps=['res5:-1']", ("'res5:-1' names no map",)),
        ("visualize.every=-1", ("visualize.every is -1: input should be greater than or equal to 0",)),
        ("train.stps=3", ("the command line", "'train.stps'; did you mean 'train.steps'?", "learning_rate")),
        ("trian.steps=3", ("unknown key 'trian'; did you mean 'train'?",)),
        ("steps=3", ("unknown key 'steps'; did you mean 'train.steps'?",)),
        ("train=3", ("'train' is a section; set one of its keys: batch_size",)),
        ("nothing", ("section.key=value", "'nothing'", "--set train.steps=100")),
        ("=3", ("section.key=value",)),
    ],
)
def test_load_config_names_a_wrong_key_or_value_and_what_is_allowed(assignment: str, parts: tuple[str, ...]) -> None:
    text = message(assignment)
    assert all(part in text for part in parts), text


def test_load_config_refuses_a_loss_without_layers() -> None:
    text = message("loss.content_layers=[]", "loss.style_layers=[]", "loss.style_layer_weights=[]")
    assert "content_layers and style_layers are both empty" in text


def test_load_config_names_all_wrong_values() -> None:
    text = message("train.batch_size=0", "data.image_size=x")
    assert all(key in text for key in ("train.batch_size", "data.image_size"))


def test_load_config_of_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read the configuration" in message(file=tmp_path / "absent.toml")
    assert "Is a directory" in message(file=tmp_path)
    file = tmp_path / "own.toml"
    file.write_text("steps: 3\n")
    assert f"{file} is not TOML" in message(file=file)
    file.write_bytes(b"\xff\xfe")
    assert f"{file} is not TOML" in message(file=file)


TEXT = '[data]\nfolder = "größe"\n'


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
    ],
)
def test_load_config_of_a_file_with_a_byte_order_mark(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "own.toml"
    file.write_bytes(data)
    assert load(file=file).data.folder == Path("größe")


def test_load_config_of_a_file_in_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_bytes(TEXT.encode("latin-1"))
    assert f"{file} is not TOML: it is not UTF-8 (byte 0xf6 in line 2: perhaps Windows-1252" in message(file=file)
    assert "save it as UTF-8" in message(file=file)
    file.write_bytes(TEXT.encode("utf-16-le"))
    assert "it looks like UTF-16" in message(file=file)


@pytest.mark.parametrize(
    "line", [r'folder = "C:\data\new"', r'folder = "C:\temp"', r"folder = C:\data", r'folder = "\\srv\share"']
)
def test_load_config_of_a_file_with_backslashes(tmp_path: Path, line: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(f"[data]\n{line}\n")
    path = line.removeprefix("folder = ").strip('"')
    assert f"write a path with backslashes in single quotes: '{path}'" in message(file=file)
    file.write_text(f"[data]\nfolder = '{path}' # not \"{path}\"\n")
    assert str(load(file=file).data.folder) == path


# The sections themselves.


def test_sections_are_frozen_and_refuse_unknown_keys() -> None:
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.train = TrainConfig()
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainConfig(stps=3)  # type: ignore[call-arg]


def choices(section: type, key: str) -> st.SearchStrategy[str]:
    return st.sampled_from(get_args(section.model_fields[key].annotation))


weights = st.floats(0, 1e300)
# Any text that a file name can hold, control characters and quotes included; a lone surrogate is tested by itself.
paths = st.none() | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).map(Path)
layers = st.lists(st.sampled_from(LOSS_LAYERS), unique=True, min_size=1, max_size=6).map(tuple)
losses = layers.flatmap(
    lambda style: st.builds(
        LossConfig,
        vgg=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")),
        vgg_flavour=choices(LossConfig, "vgg_flavour"),
        content_layers=layers,
        style_layers=st.just(style),
        style_layer_weights=st.just(()) | st.lists(weights, min_size=len(style), max_size=len(style)).map(tuple),
        content_weight=weights,
        style_weight=weights,
        tv_weight=weights,
        style_reduction=choices(LossConfig, "style_reduction"),
        feature_scale=choices(LossConfig, "feature_scale"),
    )
)
configs = st.builds(
    Config,
    preset=st.sampled_from(preset_names()),
    data=st.builds(
        DataConfig, folder=paths, image_size=st.integers(16, 2048), fit=choices(DataConfig, "fit"), flip=st.booleans()
    ),
    style=st.builds(StyleConfig, image=paths, size=st.none() | st.integers(16, 4096)),
    model=st.builds(ModelConfig, norm=choices(ModelConfig, "norm")),
    loss=losses,
    train=st.builds(
        TrainConfig,
        steps=st.none() | st.integers(1, 10**12),
        epochs=st.floats(0, 1e9, exclude_min=True),
        learning_rate=st.floats(0, 10, exclude_min=True),
        seed=st.integers(0, 2**63 - 1),
        compile=st.booleans(),
    ),
)


@given(config=configs)
def test_to_toml_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(to_toml(config), "utf-8")
    assert load(file=file) == config


def test_to_toml_of_a_file_named_unset(tmp_path: Path) -> None:
    config = load(options={"data.folder": Path("unset")})
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load(file=tmp_path / "config.toml").data.folder == config.data.folder == Path("unset")


def test_to_toml_refuses_a_path_that_is_not_utf_8() -> None:
    config = load(options={"data.folder": Path(os.fsdecode(b"caf\xe9"))})
    with pytest.raises(UserError, match="not UTF-8"):
        to_toml(config)
