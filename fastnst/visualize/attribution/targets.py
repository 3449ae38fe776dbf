"""Targets of saliency and occlusion: a class's logit, or a feature map's total activation.

`imagenet_classes.txt` holds one line per class in the order of ILSVRC2012 (sorted by synset), which is the order of
fc8's outputs: the lemmas of the synset in WordNet 3.0 (Miller 1995, "WordNet: a lexical database for English";
© Princeton University). Parsing a target needs no torch.
"""

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from numbers import Integral
from typing import TYPE_CHECKING

from fastnst.errors import DataError, UserError
from fastnst.models.vgg19_layers import LAYERS, WEIGHT_SHAPES, check_layer
from fastnst.visualize.deconv.maps import check_maps

if TYPE_CHECKING:
    from torch import Tensor

    from fastnst.models.vgg19 import VGG19

CLASSES = 1000
CLASS_LAYER = "fc8"
FORMS = f"class:N (0 … {CLASSES - 1}), class:NAME or layer:map"
"""Forms that `parse_target` accepts, for messages."""
_MAX_SUGGESTED = 5


@dataclass(frozen=True)
class Target:
    """One output of VGG19.

    Attributes:
        layer: a layer of VGG19; `fc8` for a class.
        map: number of the feature map, or of the class.
        name: for captions, such as `golden retriever (class 207)` or `relu3_4:17`.
    """

    layer: str
    map: int
    name: str


def parse_target(text: str) -> Target:
    """Parse `class:207`, `class:golden_retriever` or `relu3_4:17`.

    A class is given by its number, any of its WordNet lemmas or its synset (`n02099601`); case, spaces, underscores and
    hyphens in a name are ignored.

    Raises:
        UserError: neither form; an unknown class, layer or map; or a name that several classes share.
    """
    head, colon, rest = (part.strip() for part in text.partition(":"))
    if not (head and colon and rest):
        raise UserError(f"target {text!r} is not understood; write {FORMS}, for example relu3_4:17")
    return _class_target(rest) if head.lower() == "class" else _map_target(head, rest)


def score(net: "VGG19", target: Target, images: "Tensor") -> "Tensor":
    """Compute the target's score of each image; differentiable.

    Args:
        net: VGG19, loaded at least up to the target's layer.
        target: class or map.
        images: `[N, 3, H, W]`, RGB in [0, 1].

    Returns:
        `[N]`, in the net's type, or fp32 for half precision. For a class its logit, before any softmax (Simonyan et al.
        2013, §3.1); for a feature map the sum of its activations over all positions (Zeiler & Fergus 2014, §4.2).

    Raises:
        DataError: a class, and the net ends before fc8.
        UserError: the net has no such layer or map, or the images do not suit it.
    """
    check_target(net, target)
    return total_activation(net(as_input(net, images), [target.layer])[target.layer], target)


def total_activation(activations: "Tensor", target: Target) -> "Tensor":
    """Compute the score `[N]` from its layer's `[N, C, H, W]` or `[N, C]`, or raise UserError."""
    import torch

    check_maps(target.layer, [target.map], activations.shape[1])
    chosen = activations[:, target.map].flatten(1) if activations.ndim == 4 else activations[:, target.map, None]
    # The sum may overflow fp16 where no activation does.
    return chosen.sum(dim=1, dtype=torch.promote_types(chosen.dtype, torch.float32))


def check_target(net: "VGG19", target: Target) -> None:
    """Raise DataError for a class if `net` ends before the classifier, UserError for an unknown layer or no target."""
    if not isinstance(target, Target):
        raise UserError(f"target is {target!r}; give a Target, as parse_target makes of {FORMS}")
    check_layer(target.layer)
    if target.layer == CLASS_LAYER and CLASS_LAYER not in net.layers:
        raise DataError(
            f"these VGG19 weights end at {net.last_layer}, and {target.name} needs the classifier up to {CLASS_LAYER}; "
            f"give --vgg auto (torchvision's file has it), or a target layer:map such as {net.last_layer}:0"
        )


def as_input(net: "VGG19", images: "Tensor") -> "Tensor":
    """Move `images` to the net's device and type.

    Raises:
        UserError: not a dense tensor `[N, 3, H, W]` with at least one image, or not floats.
    """
    from fastnst.visualize.deconv.neurons import check_images

    check_images(images)
    if images.ndim != 4 or images.shape[1] != 3 or not images.shape[0]:
        raise UserError(f"images are floats [N, 3, H, W] in [0, 1], got {images.dtype} {list(images.shape)}")
    return images.to(net.mean)


def check_choice(kind: str, given: str, choices: Sequence[str]) -> None:
    """Raise UserError, with the nearest choice, unless `given` is one of `choices`."""
    if given not in choices:
        near = difflib.get_close_matches(given, choices, n=1)
        hint = f"did you mean {near[0]!r}? The choices are" if near else "choose one of"
        raise UserError(f"unknown {kind} {given!r}; {hint} {', '.join(choices)}")


def check_at_least_one(name: str, value: int) -> None:
    """Raise UserError unless `value` is a whole number of 1 or more."""
    if not is_whole(value):
        raise UserError(f"{name} is {value!r}; give a whole number")
    if value < 1:
        raise UserError(f"{name} is {value}; give at least 1")


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number by type, which 4.0 and True are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def channels_of(layer: str) -> int:
    """Return the number of maps of a layer of VGG19; raise UserError for an unknown layer."""
    check_layer(layer)
    below = LAYERS[: LAYERS.index(layer) + 1]
    return WEIGHT_SHAPES[next(name for name in reversed(below) if name in WEIGHT_SHAPES)][0]


def _class_target(text: str) -> Target:
    if re.fullmatch(r"[+-]?[0-9]+", text):
        # Check the pattern first: Python refuses to parse thousands of digits.
        if not re.fullmatch(r"\+?0*[0-9]{1,3}", text):
            raise UserError(f"there is no class {text}; ImageNet's are 0 … {CLASSES - 1}")
        return _class(int(text))
    numbers = _numbers_by_name().get(_key(text), ())
    if not numbers:
        raise UserError(f"no ImageNet class is named {text!r}; {_nearest(text)}")
    if len(numbers) > 1:
        listed = ", ".join(f"class:{number} ({'; '.join(_classes()[number][1:])})" for number in numbers)
        raise UserError(f"several ImageNet classes are named {text!r}; give the number of one: {listed}")
    return _class(numbers[0])


def _class(number: int) -> Target:
    return Target(CLASS_LAYER, number, f"{_classes()[number][1]} (class {number})")


def _map_target(layer: str, text: str) -> Target:
    channels = channels_of(layer)
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
        raise UserError(f"target {layer}:{text} names no map; the maps of {layer} are 0 … {channels - 1}")
    check_maps(layer, [int(text)], channels)
    return Target(layer, int(text), f"{layer}:{int(text)}")


@functools.cache
def _classes() -> tuple[tuple[str, ...], ...]:
    """Return the synset and the lemmas of each class, the most common lemma first."""
    text = resources.files("fastnst.visualize.attribution").joinpath("imagenet_classes.txt").read_text("utf-8")
    lines = (line.split(" ", maxsplit=1) for line in text.splitlines())
    return tuple((synset, *lemmas.split(", ")) for synset, lemmas in lines)


@functools.cache
def _numbers_by_name() -> dict[str, tuple[int, ...]]:
    numbers: dict[str, tuple[int, ...]] = {}
    for number, names in enumerate(_classes()):
        for key in {_key(name) for name in names}:
            numbers[key] = (*numbers.get(key, ()), number)
    return numbers


def _key(name: str) -> str:
    return "".join(_words(name))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_-]+", name.casefold()) if word]


def _nearest(text: str) -> str:
    """Suggest a name of each class with all these words, or words spelled alike, or else names spelled alike."""
    lemmas = [(lemma, number) for number, names in enumerate(_classes()) for lemma in names[1:]]
    known = sorted({word for lemma, _ in lemmas for word in _words(lemma)})
    meant = [{word} if word in known else {*difflib.get_close_matches(word, known, 3, 0.8)} for word in _words(text)]
    near = {
        number: lemma
        for lemma, number in reversed(lemmas)
        if meant and all(set(_words(lemma)) & each for each in meant)
    }
    if not near:
        spelling = {_key(lemma): (number, lemma) for lemma, number in lemmas}
        near = dict(spelling[key] for key in difflib.get_close_matches(_key(text), spelling, n=3))
    if not near:
        return f"give another name, or a number 0 … {CLASSES - 1}"
    listed = ", ".join(f"{lemma!r} (class:{number})" for number, lemma in sorted(near.items())[:_MAX_SUGGESTED])
    more = f" or {len(near) - _MAX_SUGGESTED} more" if len(near) > _MAX_SUGGESTED else ""
    return f"did you mean {listed}{more}?"
