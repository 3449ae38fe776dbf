"""The strongest activations of a folder: known answers, brute force, ties, memory, real photos, bad input."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from fastnst.data.crop import crop_box, read_crop
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.errors import DataError, UserError
from fastnst.models.vgg19 import VGG19
from fastnst.visualize.attribution.folder_batches import CenterCrops
from fastnst.visualize.attribution.top_activations import (
    RunningTop,
    TopActivations,
    crop_size,
    find_top_activations,
    project_top,
)
from fastnst.visualize.deconv.receptive_field import receptive_field
from fastnst.visualize.deconv.vgg import Deconvnet

CPU = torch.device("cpu")
LAYER = "relu2_1"
SIZE = 24


@pytest.fixture(scope="module")
def net() -> VGG19:
    return VGG19(LAYER, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(scope="module")
def manifest(generated_photos: Path) -> Manifest:
    return build_manifest(generated_photos)


@pytest.fixture(scope="module")
def found(net: VGG19, manifest: Manifest) -> TopActivations:
    return find(net, manifest, maps=[5, 0, 127], count=4, batch_size=5)


def find(net: VGG19, manifest: Manifest, layer: str = LAYER, *, size: int = SIZE, **options: Any) -> TopActivations:
    return find_top_activations(net, center_crops(manifest, size, options), layer, **options)


def project(
    net: VGG19, manifest: Manifest, top: TopActivations, *, size: int = SIZE, **options: Any
) -> tuple[Tensor, Tensor]:
    shown = project_top(net, center_crops(manifest, size, options), top, **options)
    return shown.projections, shown.patches


def center_crops(manifest: Manifest, size: int, options: dict[str, Any]) -> CenterCrops:
    """Takes its own options out of the dictionary."""
    own = {name: options.pop(name) for name in ("loader", "batch_size") if name in options}
    return CenterCrops(manifest, size, CPU, workers=1, **own)


def prepared(manifest: Manifest, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """All images, `[N, 3, size, size]`, each read on its own."""
    rows = []
    for entry in manifest.images:
        window = crop_box(entry.width, entry.height, "center_crop", np.array([0.5, 0.5]), size)
        path = str(manifest.folder / entry.path)
        rows.append(read_crop(path, entry, window, size, False))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).to(dtype) / 255


def ranked(values: Sequence[float], count: int) -> list[int]:
    """Indices of the largest, of equal ones the first."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def dot_detector() -> VGG19:
    """Map 0 is the red of a pixel, map 1 that of its upper left neighbour, map 2 how dark a pixel's green is."""
    net = VGG19("relu1_1").double()
    net.conv1_1.weight.zero_()
    net.conv1_1.weight[0, 0, 1, 1] = 1 / net.gain[0, 0, 0]
    net.conv1_1.weight[1, 0, 0, 0] = 1 / net.gain[0, 0, 0]
    net.conv1_1.weight[2, 1, 1, 1] = -1 / net.gain[1, 0, 0]
    net.conv1_1.bias[:2] = net.mean[0, 0, 0]
    net.conv1_1.bias[2] = 1 - net.mean[1, 0, 0]
    return net


def write_dots(folder: Path, dots: Sequence[tuple[int, int, int]]) -> Manifest:
    """Images of green 51 with red 0 but for one dot: row, column, red."""
    for index, (row, column, red) in enumerate(dots):
        pixels = np.full((16, 16, 3), (0, 51, 0), np.uint8)
        pixels[row, column, 0] = red
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return build_manifest(folder)


# Known answers.


def test_find_top_activations_of_dots(tmp_path: Path) -> None:
    manifest = write_dots(tmp_path, [(3, 4, 153), (0, 0, 255), (15, 7, 51), (9, 15, 204)])
    top = find(dot_detector(), manifest, "relu1_1", maps=[1, 0], count=3, size=16, batch_size=3)
    assert (top.layer, top.maps) == ("relu1_1", (1, 0))
    assert top.images.tolist() == [[1, 0, 2], [1, 3, 0]]
    # Map 1: one row down and one column right of the dots; for the third and the fourth that is outside, and the border
    # counts as the channel's mean.
    assert top.positions.tolist() == [[[1, 1], [4, 5], [0, 0]], [[0, 0], [9, 15], [3, 4]]]
    torch.testing.assert_close(top.values[1], torch.tensor([255, 204, 153], dtype=torch.float64) / 255)


def test_project_top_of_dots(tmp_path: Path) -> None:
    net = dot_detector()
    manifest = write_dots(tmp_path, [(3, 4, 102), (0, 0, 255), (9, 15, 204)])
    top = find(net, manifest, "relu1_1", maps=[0], count=3, size=16)
    projections, patches = project(net, manifest, top, size=16)
    assert projections.shape == patches.shape == (1, 3, 3, 3, 3)
    assert projections.dtype == patches.dtype == torch.float32
    # The dots themselves stand in the middle; beyond the image all is grey.
    expected_red = [
        [[0.5, 0.5, 0.5], [0.5, 1.0, 0.0], [0.5, 0.0, 0.0]],
        [[0.0, 0.0, 0.5], [0.0, 0.8, 0.5], [0.0, 0.0, 0.5]],
        [[0.0, 0.0, 0.0], [0.0, 0.4, 0.0], [0.0, 0.0, 0.0]],
    ]
    torch.testing.assert_close(patches[0, :, 0], torch.tensor(expected_red))
    torch.testing.assert_close(patches[0, 2, 1:], torch.tensor([0.2, 0.0])[:, None, None].expand(2, 3, 3))
    # Map 0 has one weight: each projection has one non-zero entry, in proportion to the activation.
    centre = projections[0, :, 0, 1, 1].clone()
    torch.testing.assert_close(centre / centre[0], torch.tensor([1.0, 0.8, 0.4]))
    assert centre[0] > 0
    projections[0, :, 0, 1, 1] = 0
    assert not projections.any()


def test_find_top_activations_of_fewer_images_than_count(tmp_path: Path) -> None:
    net, manifest = dot_detector(), write_dots(tmp_path, [(3, 4, 102), (5, 5, 255)])
    top = find(net, manifest, "relu1_1", maps=[0, 2], size=16)
    assert top.images.tolist() == [[1, 0] + [-1] * 7, [0, 1] + [-1] * 7]
    assert (top.values[:, 2:] == -torch.inf).all()
    assert (top.positions[:, 2:] == -1).all()
    projections, patches = project(net, manifest, top, size=16)
    assert projections[:, :2].flatten(2).any(2).all()
    assert not projections[:, 2:].any()
    assert (patches[:, 2:] == 0.5).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_find_top_activations_of_equal_ones_takes_the_first(tmp_path: Path, batch_size: int) -> None:
    manifest = write_dots(tmp_path, [(3, 4, 102)] * 5 + [(5, 5, 255)] + [(7, 1, 102)] * 2)
    top = find(dot_detector(), manifest, "relu1_1", maps=[0, 2, 40], count=7, size=16, batch_size=batch_size)
    assert top.images.tolist() == [[5, 0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    # Green is everywhere alike, and map 40, without weights, is zero everywhere.
    assert not top.positions[1:].any()
    assert not top.values[2].any()


# Brute force.


@given(
    values=st.lists(st.lists(st.integers(-2, 3), min_size=3, max_size=3), min_size=1, max_size=12),
    count=st.integers(1, 9),
    data=st.data(),
)
def test_running_top_does_not_depend_on_order_and_batches(
    values: list[list[int]], count: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(values))))
    top = RunningTop(3, count, dtype=torch.float64, device=CPU)
    while order:
        batch = torch.tensor(order[: data.draw(st.integers(1, len(order)))])
        order = order[len(batch) :]
        places = torch.stack((batch, batch + 100), dim=1).expand(3, -1, 2)
        top.merge(torch.tensor(values, dtype=torch.float64)[batch].T, batch, places)
    missing = max(0, count - len(values))
    for number in range(3):
        of_map = [row[number] for row in values]
        best = ranked(of_map, count)
        assert top.images[number].tolist() == best + [-1] * missing
        assert top.values[number].tolist() == [of_map[index] for index in best] + [-torch.inf] * missing
        assert top.positions[number].tolist() == [[index, index + 100] for index in best] + [[-1, -1]] * missing


@pytest.mark.parametrize(("loader", "batch_size", "count"), [("pillow", 5, 9), ("dali", 16, 12)])
def test_find_top_activations_agrees_with_exhaustive_search(
    net: VGG19, manifest: Manifest, loader: str, batch_size: int, count: int
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")
    top = find(net, manifest, count=count, batch_size=batch_size, loader=loader)
    assert top.maps == tuple(range(128))
    images = prepared(manifest, SIZE)
    if loader == "dali":
        # Its pixels may differ from Pillow's by 1 of 255, and two activations that are nearly equal change places.
        (passed,) = CenterCrops(manifest, SIZE, CPU, loader, batch_size=12, workers=1)
        by_dali = passed[1][passed[0].argsort()].permute(0, 3, 1, 2).double() / 255
        torch.testing.assert_close(by_dali, images, rtol=0, atol=1.01 / 255)
        images = by_dali
    activations = net(images, [LAYER])[LAYER]
    for number in range(128):
        values, places = activations[:, number].flatten(1).max(1)
        best = ranked(values.tolist(), count)
        torch.testing.assert_close(top.values[number], values[best], rtol=1e-12, atol=1e-12)
        assert top.images[number].tolist() == best
        assert (top.positions[number] @ torch.tensor([SIZE // 2, 1])).tolist() == places[best].tolist()


@pytest.mark.parametrize("batch_size", [5, 50])
def test_center_crops_hold_every_image_once(manifest: Manifest, batch_size: int) -> None:
    passed = list(CenterCrops(manifest, SIZE, CPU, batch_size=batch_size, workers=1))
    assert [len(batch) for _, batch in passed] == [len(indices) for indices, _ in passed]
    indices, batches = (torch.cat(parts) for parts in zip(*passed, strict=True))
    assert sorted(indices.tolist()) == list(range(12))
    assert torch.equal(batches.permute(0, 3, 1, 2), (prepared(manifest, SIZE)[indices] * 255).round().to(torch.uint8))


@pytest.mark.parametrize("loader", ["pillow", "dali"])
def test_project_top_agrees_with_single_projections(
    net: VGG19, manifest: Manifest, found: TopActivations, loader: str
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")
    projections, patches = project(net, manifest, found, batch_size=4, loader=loader)
    images = prepared(manifest, SIZE)
    field = receptive_field(LAYER)
    deconvnet = Deconvnet(net)
    margin = field.size
    for row, number in enumerate(found.maps):
        for place in range(4):
            image = images[found.images[row, place]][None]
            at = found.positions[row, place].tolist()
            recording = deconvnet.record(image, [LAYER])
            activation = recording.activations[LAYER][0, number, at[0], at[1]]
            torch.testing.assert_close(activation, found.values[row, place], rtol=1e-12, atol=1e-12)
            top, left = (field.start + field.jump * index + margin for index in at)
            window = (0, slice(None), slice(top, top + field.size), slice(left, left + field.size))
            frame = [margin] * 4
            patch = torch.nn.functional.pad(image, frame, value=0.5)[window].float()
            torch.testing.assert_close(patches[row, place], patch, atol=1e-6 if loader == "pillow" else 0.004, rtol=0)
            if loader == "pillow":
                whole = deconvnet(image, LAYER, [number], activation=(at[0], at[1]))[:, 0]
                projection = torch.nn.functional.pad(whole, frame)[window].float()
                torch.testing.assert_close(projections[row, place], projection, rtol=1e-5, atol=1e-6)


# Good order.


def test_find_top_activations_memory_does_not_grow_with_images(net: VGG19, manifest: Manifest) -> None:
    held: list[int] = []

    def measure(done: int, _total: int) -> None:
        # Walking over all objects is slow.
        if done in (4, 12):
            gc.collect()
            held.append(sum(x.nbytes for x in gc.get_objects() if type(x) in (Tensor, Parameter)))

    find(net, manifest, count=2, batch_size=1, progress=measure)
    assert len(held) == 2
    assert held[0] == held[1]


def test_find_top_activations_reports_progress(net: VGG19, manifest: Manifest, found: TopActivations) -> None:
    seen: list[tuple[int, int]] = []
    find(net, manifest, maps=[0], batch_size=5, progress=lambda *now: seen.append(now))
    assert seen == [(0, 12), (5, 12), (10, 12), (12, 12)]
    seen.clear()
    project(net, manifest, found, progress=lambda *now: seen.append(now))
    kept = len(found.images.unique())
    assert seen == [(0, kept), (kept, kept)]


def test_project_top_reads_only_the_images_it_shows(net: VGG19, photo_folder: Path) -> None:
    manifest = build_manifest(photo_folder)
    top = find(net, manifest, maps=[3], count=2)
    for index, entry in enumerate(manifest.images):
        if index not in top.images:
            (photo_folder / entry.path).unlink()
    projections, _ = project(net, manifest, top)
    assert projections.flatten(2).any(2).all()
    (photo_folder / manifest.images[int(top.images[0, 1])].path).unlink()
    with pytest.raises(DataError, match="cannot read"):
        project(net, manifest, top)


# Bad input.


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("fc6", {}, "fc6 depends on the whole image .* choose a layer up to pool5"),
        ("relu3_1", {}, "relu3_1 lies behind relu2_1, where this VGG19 ends; load it up to relu3_1"),
        (LAYER, {"maps": [0, 128]}, "relu2_1 has no map 128; its maps are 0 … 127"),
        (LAYER, {"maps": []}, "no map of relu2_1 was given"),
        ("conv1_1", {"size": 15}, "a crop size of 15 px is out of range; give 16 … 2048 px"),
        (LAYER, {"size": 4096}, "a crop size of 4096 px is out of range"),
        (LAYER, {"count": 0}, "count is 0; give at least 1"),
        (LAYER, {"batch_size": 0}, "batch_size is 0; give at least 1"),
        (LAYER, {"loader": "cv2"}, "unknown loader 'cv2'; choose one of pillow, dali"),
    ],
)
def test_find_top_activations_refuses_bad_arguments_before_any_work(
    net: VGG19, manifest: Manifest, layer: str, options: dict[str, Any], message: str
) -> None:
    progress: list[object] = []
    with pytest.raises(UserError, match=message) as raised:
        find(net, manifest, layer, **{"progress": lambda *now: progress.append(now), **options})
    assert raised.value.exit_code == 2
    assert not progress


def test_find_top_activations_refuses_an_empty_folder(net: VGG19, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        find(net, Manifest(tmp_path, [], [], ""))


@pytest.mark.parametrize(
    ("layer", "size"), [("conv1_1", 224), ("relu3_4", 224), ("pool4", 224), ("conv5_4", 256), ("pool5", 288)]
)
def test_crop_size_holds_the_receptive_field(layer: str, size: int) -> None:
    field = receptive_field(layer).size
    assert crop_size(layer, None) == size >= field
    assert crop_size(layer, field) == field
    with pytest.raises(UserError, match=f"smaller than the receptive field of {layer}, {field} px"):
        crop_size(layer, field - 1)
