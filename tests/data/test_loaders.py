"""Both loaders: the same images in the same order from any start, and good order when something breaks."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastnst.config import DataConfig
from fastnst.data.crop import crop_box, resize_crop
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.data.replacements import ImageReplacer
from fastnst.data.sampler import Fit, Sampler
from fastnst.errors import DataError, UserError
from fastnst.images import read_image

pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")

CPU = torch.device("cpu")
PROJECT = Path(__file__).resolve().parents[2]
# Two resamplers round alike except where a value lies within their arithmetic's error of one half.
LARGEST_DIFFERENCE = 1
LARGEST_MEAN_DIFFERENCE = 0.3


def config(loader: str, image_size: int = 32, **values: Any) -> DataConfig:
    return DataConfig(loader=loader, image_size=image_size, **{"workers": 1, "prefetch": 2, **values})


def load(
    loader: str,
    manifest: Manifest,
    order: Sampler,
    image_size: int = 32,
    *,
    start_step: int = 0,
    rank: int = 0,
    device: torch.device = CPU,
) -> list[torch.Tensor]:
    settings = config(loader, image_size)
    with open_loader(manifest, order, settings, device=device, start_step=start_step, rank=rank) as batches:
        return list(batches)


def one_epoch(manifest: Manifest, **values: Any) -> Sampler:
    count = len(manifest.images)
    return Sampler(1, count, 4, -(-count // 4), **values)


def assert_loaders_agree(manifest: Manifest, order: Sampler, image_size: int) -> None:
    by_pillow, by_dali = (torch.cat(load(name, manifest, order, image_size)).int() for name in ("pillow", "dali"))
    assert by_pillow.shape == (order.steps * order.batch_size, image_size, image_size, 3)
    difference = (by_pillow - by_dali).abs()
    indices = np.concatenate([order.batch(step).indices for step in range(order.steps)])
    wrong = [
        manifest.images[index]
        for index, one in zip(indices, difference, strict=True)
        if one.max() > LARGEST_DIFFERENCE or one.double().mean() > LARGEST_MEAN_DIFFERENCE
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("fit", "image_size"), [("random_crop", 128), ("center_crop", 48), ("squash", 100), ("random_crop", 500)]
)
def test_loaders_agree_on_photos(photos: Path, tmp_path: Path, fit: Fit, image_size: int) -> None:
    for file in sorted(photos.iterdir())[::16]:
        (tmp_path / file.name).symlink_to(file)
    manifest = build_manifest(tmp_path)
    assert_loaders_agree(manifest, one_epoch(manifest, fit=fit), image_size)


def test_loaders_agree_on_awkward_files_and_generated_ones(
    awkward: Path, generated_photos: Path, tmp_path: Path
) -> None:
    for file in [*awkward.iterdir(), *generated_photos.iterdir()]:
        (tmp_path / file.name).symlink_to(file)
    make_odd_images(tmp_path)
    manifest = build_manifest(tmp_path)
    assert len(manifest.images) > 60
    assert {entry.dali_safe for entry in manifest.images} == {True, False}
    assert_loaders_agree(manifest, one_epoch(manifest), 64)


def make_odd_images(folder: Path) -> None:
    """Every kind of JPEG, PNG and WebP that Pillow writes, and orientation tags good and bad."""
    y, x = np.mgrid[0:60, 0:90]
    colour = Image.fromarray(np.stack([x * 2, y * 4, x + y], -1).astype(np.uint8))
    clear = colour.copy()
    clear.putalpha(Image.fromarray((x * 2).astype(np.uint8)))
    deep = Image.fromarray((x * 700).astype(np.uint16))
    palette, gray = colour.quantize(32), colour.convert("L")
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("gray.jpg", gray, {}),
        ("progressive.jpg", colour, {"progressive": True}),
        ("restart.jpg", colour, {"restart_marker_blocks": 2}),
        *((f"sampling{index}.jpg", colour, {"subsampling": index}) for index in range(3)),
        ("rgb.jpg", colour, {"keep_rgb": True}),
        ("cmyk.jpg", colour.convert("CMYK"), {}),
        ("two.jpg", colour, {"format": "MPO", "save_all": True, "append_images": [gray.convert("RGB")]}),
        ("gray.png", gray, {}),
        ("bits.png", colour.convert("1"), {}),
        ("deep.png", deep, {}),
        ("palette.png", palette, {}),
        ("palette_clear.png", palette, {"transparency": 3}),
        ("palette_alpha.png", palette, {"transparency": bytes(range(0, 256, 8))}),
        ("alpha.png", clear, {}),
        ("gray_alpha.png", clear.convert("LA"), {}),
        ("colour_key.png", colour, {"transparency": (0, 0, 0)}),
        ("moving.png", colour, {"save_all": True, "append_images": [clear.convert("RGB").transpose(0)]}),
        ("alpha.webp", clear, {}),
        ("alpha_exact.webp", clear, {"lossless": True, "exact": True}),
        ("lossless.webp", colour, {"lossless": True}),
        ("moving.webp", colour, {"save_all": True, "append_images": [colour.transpose(0)]}),
    ]
    for order, head in ((">", b"MM\0*\0\0\0\x08"), ("<", b"II*\0\x08\0\0\0")):
        for value in (*range(10), 77):
            for kind, width in ((3, 2), (4, 4)):  # The standard says SHORT; some write LONG.
                big = "big" if order == ">" else "little"
                entry = b"".join(number.to_bytes(size, big) for number, size in ((1, 2), (0x112, 2), (kind, 2), (1, 4)))
                tags = b"Exif\0\0" + head + entry + value.to_bytes(width, big).ljust(4, b"\0") + bytes(4)
                kinds.append((f"tag{ord(order)}_{value}_{kind}.jpg", colour, {"exif": tags}))
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds += [(f"turned.{suffix}", colour, {"exif": turned}) for suffix in ("png", "webp")]
    kinds.append(("xmp.jpg", colour, {"xmp": b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'}))
    for name, image, options in kinds:
        image.save(folder / name, **options)


def test_only_what_decoders_agree_on_is_plain(tmp_path: Path) -> None:
    make_odd_images(tmp_path)
    entries = {entry.path: entry for entry in build_manifest(tmp_path).images}
    for name in (
        "gray.jpg",
        "progressive.jpg",
        "restart.jpg",
        "sampling2.jpg",
        "two.jpg",
        "alpha.png",
        "lossless.webp",
    ):
        assert entries[name].dali_safe, name
    for name in (
        "rgb.jpg",
        "cmyk.jpg",
        "deep.png",
        "moving.png",
        "moving.webp",
        "turned.png",
        "turned.webp",
        "xmp.jpg",
    ):
        assert not entries[name].dali_safe, name
    for value in range(1, 9):
        # Byte orders M and I; SHORT (3) is beyond doubt, LONG (4) is not.
        for byte_order in (ord("<"), ord(">")):
            assert entries[f"tag{byte_order}_{value}_3.jpg"].dali_safe
            assert not entries[f"tag{byte_order}_{value}_4.jpg"].dali_safe
    for name in ("tag62_6_3.jpg", "tag62_6_4.jpg", "turned.png", "turned.webp", "xmp.jpg"):
        assert (entries[name].width, entries[name].height) == (60, 90), name


def test_damage_of_any_kind_is_refused_or_read_alike(tmp_path: Path) -> None:
    """Bytes changed at random: what passes the check must come out of both loaders, the same."""
    rng = np.random.default_rng(3)
    image = Image.fromarray(np.kron(rng.integers(0, 256, (6, 8, 3), np.uint8), np.ones((10, 10, 1), np.uint8)))
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "maker"
    options: dict[str, dict[str, Any]] = {"jpg": {"exif": tags}, "png": {}, "webp": {}}
    for suffix, values in options.items():
        image.save(tmp_path / f"whole.{suffix}", **values)
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        for index in range(80):
            damaged = bytearray(whole)
            reach = (40, 250, len(whole))[index % 3]
            damaged[rng.integers(0, min(reach, len(whole)))] = rng.integers(0, 256)
            (tmp_path / f"{index:02d}.{suffix}").write_bytes(damaged[: len(whole) - index % 5 // 4])
    manifest = build_manifest(tmp_path)
    usual = [entry for entry in manifest.images if entry.width * entry.height < 10**5]
    manifest = replace(manifest, images=usual)
    assert len(manifest.rejected) > 80
    assert len(usual) > 40
    assert_loaders_agree(manifest, one_epoch(manifest), 32)


@pytest.mark.parametrize("width", [90, 128, 200])
def test_window_is_resize_then_crop(width: int) -> None:
    """Against PyTorch: short side to 32 with antialiasing, then the crop; flipped last."""
    size, height = 32, 64
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    scaled = F.interpolate(
        torch.tensor(image).permute(2, 0, 1)[None].double(), (size, width // 2), mode="bilinear", antialias=True
    )
    left = width // 2 - size
    crop = np.array([(left - 3) / left, 0.7], np.float32)
    window = crop_box(width, height, "random_crop", crop, size)
    square = resize_crop(Image.fromarray(image), window, size, flip=True).astype(int)
    expected = scaled[0, :, :, left - 3 : left - 3 + size].flip(-1).permute(1, 2, 0).numpy()
    # PyTorch leaves pixels beyond the border out of the mean; both loaders repeat the border.
    assert np.abs(square - expected)[1:-1, 1:-1].max() <= 1
    assert np.abs(square - expected).max() <= 64


def test_window_at_the_border_repeats_it() -> None:
    row = np.array([100, 40, 0, 80], np.uint8)
    image = Image.fromarray(np.broadcast_to(row[None, :, None], (4, 4, 3)).copy())
    # Half as wide: weights 1/8 3/8 3/8 1/8, and the border pixel stands in for the one beyond it.
    square = resize_crop(image, (0.0, 0.0, 4.0, 4.0), 2, flip=False)
    assert square[:, :, 0].tolist() == [[50 + 15, 5 + 40]] * 2
    assert resize_crop(image, (0.0, 0.0, 4.0, 4.0), 2, flip=True)[0, :, 0].tolist() == [45, 65]


@pytest.mark.parametrize(
    ("fit", "crop", "window"),
    [
        ("random_crop", (0.25, 0.9), (15.0, 0.0, 55.0, 40.0)),
        ("center_crop", (0.5, 0.5), (30.0, 0.0, 70.0, 40.0)),
        ("squash", (0.25, 0.9), (0.0, 0.0, 100.0, 40.0)),
    ],
)
def test_windows(fit: Fit, crop: tuple[float, float], window: tuple[float, ...]) -> None:
    assert crop_box(100, 40, fit, np.array(crop, np.float32), 40) == window
    left, top, right, bottom = crop_box(40, 100, fit, np.array(crop[::-1], np.float32), 40)
    assert (top, left, bottom, right) == window


@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_batches_are_what_the_order_says(loader: str, generated_photos: Path) -> None:
    manifest = build_manifest(generated_photos)
    order = Sampler(3, 12, 5, 5)
    batches = load(loader, manifest, order)
    assert len(batches) == 5
    for step, batch in enumerate(batches):
        assert batch.dtype == torch.uint8
        assert batch.shape == (5, 32, 32, 3)
        assert batch.is_contiguous()
        samples = order.batch(step)
        for index, crop, flip, square in zip(samples.indices, samples.crop, samples.flip, batch, strict=True):
            entry = manifest.images[index]
            image = Image.fromarray(read_image(generated_photos / entry.path))
            window = crop_box(entry.width, entry.height, "random_crop", crop, 32)
            expected = torch.tensor(resize_crop(image, window, 32, bool(flip))).int()
            assert (square.int() - expected).abs().max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_starting_in_the_middle_and_sharing_change_nothing(loader: str, generated_photos: Path) -> None:
    manifest = build_manifest(generated_photos)
    alone = load(loader, manifest, Sampler(3, 12, 6, 6))
    shared = Sampler(3, 12, 6, 6, world_size=2)
    ranks = [load(loader, manifest, shared, start_step=4, rank=rank) for rank in range(2)]
    for whole, first, second in zip(alone[4:], *ranks, strict=True):
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=0)
    assert load(loader, manifest, Sampler(3, 12, 6, 6), start_step=6) == []


def test_a_folder_may_be_smaller_than_a_batch(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30), (10, 20, 30)).save(tmp_path / "only.png")
    manifest = build_manifest(tmp_path)
    (batch,) = load("dali", manifest, Sampler(0, 1, 7, 1))
    assert (batch == torch.tensor([10, 20, 30], dtype=torch.uint8)).all()
    assert len(batch) == 7


@pytest.mark.parametrize("loader", ["dali", "pillow"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "when the folder was checked"),
    ],
)
def test_images_that_change_during_a_run_are_named(
    loader: str, photo_folder: Path, damage: Callable[[Path], object], reason: str
) -> None:
    manifest = build_manifest(photo_folder)
    damage(photo_folder / manifest.images[5].path)
    with pytest.raises(DataError, match=reason) as caught:
        load(loader, manifest, Sampler(0, 12, 4, 6))
    assert manifest.images[5].path in str(caught.value)


def test_other_bytes_of_the_same_length_are_named_too(photo_folder: Path) -> None:
    manifest = build_manifest(photo_folder)
    path = photo_folder / manifest.images[5].path
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="no image"):
        load("dali", manifest, Sampler(0, 12, 4, 6))
    with pytest.raises(DataError, match=manifest.images[5].path):
        load("pillow", manifest, Sampler(0, 12, 4, 6))


def test_what_only_dali_refuses_is_decoded_by_pillow(photo_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An image wrongly taken for plain neither ends the run nor changes what other images look like."""
    jpeg = (photo_folder / "image_00.jpg").read_bytes()
    end_of_first_segment = 4 + int.from_bytes(jpeg[4:6], "big")
    with_junk = jpeg[:end_of_first_segment] + bytes(40) + jpeg[end_of_first_segment:]
    (photo_folder / "image_00.jpg").write_bytes(with_junk)
    manifest = build_manifest(photo_folder)
    assert [entry.dali_safe for entry in manifest.images].count(False) == 1
    order = Sampler(0, 12, 4, 9)
    expected = load("dali", manifest, order)
    mistaken = replace(manifest, images=[replace(entry, plain=True) for entry in manifest.images])
    for start_step in (0, 4):
        caplog.clear()
        batches = load("dali", mistaken, order, start_step=start_step)
        assert caplog.messages == ["DALI cannot decode image_00.jpg; Pillow decodes it"]
        for batch, one in zip(batches, expected[start_step:], strict=True):
            torch.testing.assert_close(batch, one, rtol=0, atol=0)


def test_a_failure_that_no_image_causes_says_where_and_what_to_do(
    generated_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastnst.data.loaders import dali

    manifest = build_manifest(generated_photos)
    with open_loader(manifest, Sampler(0, 12, 4, 9), config("dali"), device=CPU) as batches:
        next(batches)
        run = dali.DaliLoader._run
        failures = []

        def fail(self: dali.DaliLoader, pipeline: Any) -> torch.Tensor:
            if pipeline.max_batch_size > 1 and len(failures) < 3:
                failures.append(pipeline)
                raise RuntimeError("out of memory\nCurrent pipeline object is no longer valid.")
            return run(self, pipeline)

        monkeypatch.setattr(dali.DaliLoader, "_run", fail)
        with pytest.raises(DataError, match=r"step 2 \(out of memory\), near image_.*; use --loader pillow"):
            next(batches)
    assert len(failures) == 2, "once more, and no more"


def test_without_dali_the_other_loader_is_named(generated_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastnst.data.loaders.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    manifest = build_manifest(generated_photos)
    with pytest.raises(UserError, match="--loader pillow"):
        open_loader(manifest, Sampler(0, 12, 4, 9), config("dali"), device=CPU)


def test_batches_stay_as_they_were(generated_photos: Path) -> None:
    """A batch is DALI's own buffer, which DALI must not use again as long as anyone has the batch."""
    manifest = build_manifest(generated_photos)
    with open_loader(manifest, Sampler(0, 12, 4, 20), config("dali"), device=CPU) as batches:
        kept = [(batch, batch.clone()) for batch in batches]
    with open_loader(manifest, Sampler(1, 12, 4, 20), config("dali"), device=CPU) as batches:
        for batch in batches:
            batch.zero_()
    assert len({batch.data_ptr() for batch, _ in kept}) == 20
    for batch, copy in kept:
        assert torch.equal(batch, copy)


def test_the_decoding_engines_are_told_the_usual_size(generated_photos: Path) -> None:
    from fastnst.data.loaders.dali import _Feed

    manifest = build_manifest(generated_photos)

    def usual(sizes: list[tuple[int, int, str, bool]]) -> tuple[int, int]:
        kinds = [
            replace(manifest.images[0], path=f"{index:03d}", width=width, height=height, format=kind, plain=plain)
            for index, (width, height, kind, plain) in enumerate(sizes)
        ]
        many = replace(manifest, images=kinds)
        order = Sampler(0, len(kinds), 4, 1)
        feed = _Feed(many, order, config("dali"), ImageReplacer(many), 0)
        feed.close()
        return feed.usual_size()

    assert usual([(640, 480, "JPEG", True)] * 300 + [(480, 641, "JPEG", True)] * 9 + [(9000, 9000, "JPEG", True)]) == (
        640,
        641,
    )
    assert usual([(640, 480, "JPEG", True), (9000, 100, "JPEG", True)]) == (2048, 480)
    assert usual([(640, 480, "PNG", True), (500, 400, "JPEG", False)]) == (0, 0)


@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_closing_early_and_twice(loader: str, generated_photos: Path) -> None:
    manifest = build_manifest(generated_photos)
    batches = open_loader(manifest, Sampler(0, 12, 4, 100), config(loader), device=CPU)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


# A run in a process of its own, because it is interrupted or killed. It says which workers it has.
SCRIPT = """
import multiprocessing, sys, signal, torch
from pathlib import Path
from fastnst.config import DataConfig
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import build_manifest
from fastnst.data.sampler import Sampler

if __name__ == "__main__":
    interrupts = []
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
    manifest = build_manifest(Path(sys.argv[1]))
    order = Sampler(0, 12, 4, 10**6)
    config = DataConfig(loader="pillow", image_size=32, workers=2)
    with open_loader(manifest, order, config, device=torch.device("cpu")) as loader:
        next(loader)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        after = 0
        while after < 20:
            next(loader)
            after += bool(interrupts)
    print("ended in good order", flush=True)
"""


@pytest.fixture
def run_of_its_own(generated_photos: Path, tmp_path: Path) -> Any:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(generated_photos)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    # Its workers, too, should they have outlived it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def worker_ids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def test_ctrl_c_reaches_all_and_stops_none(run_of_its_own: subprocess.Popen[str]) -> None:
    assert len(worker_ids(run_of_its_own)) == 2
    os.killpg(run_of_its_own.pid, signal.SIGINT)
    out, err = run_of_its_own.communicate(timeout=60)
    assert out == "ended in good order\n"
    assert err == ""
    assert run_of_its_own.returncode == 0


def test_a_killed_worker_is_replaced(run_of_its_own: subprocess.Popen[str]) -> None:
    os.kill(worker_ids(run_of_its_own)[0], signal.SIGKILL)
    assert run_of_its_own.stderr is not None
    assert "ended unexpectedly; a new one goes on" in run_of_its_own.stderr.readline()
    os.kill(run_of_its_own.pid, signal.SIGINT)
    out, err = run_of_its_own.communicate(timeout=60)
    assert out == "ended in good order\n"
    assert err == ""


def test_workers_end_with_their_parent(run_of_its_own: subprocess.Popen[str]) -> None:
    workers = worker_ids(run_of_its_own)
    run_of_its_own.kill()
    run_of_its_own.wait()
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.05)


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.gpu
def test_gpu_delivers_the_same_images(photos: Path, tmp_path: Path) -> None:
    for file in sorted(photos.iterdir())[::16]:
        (tmp_path / file.name).symlink_to(file)
    make_odd_images(tmp_path)
    manifest = build_manifest(tmp_path)
    order = one_epoch(manifest)
    on_gpu = load("dali", manifest, order, 128, device=torch.device("cuda"))
    assert all(batch.is_cuda for batch in on_gpu)
    on_cpu = load("dali", manifest, order, 128)
    difference = (torch.cat(on_gpu).cpu().int() - torch.cat(on_cpu).int()).abs().double()
    # The GPU's decoders have an inverse transform and a chroma interpolation of their own.
    assert difference.mean((1, 2, 3)).max() < 2
    assert difference.mean() < 0.7
