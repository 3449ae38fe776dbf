"""Caches that are damaged, of another size, or malicious: refused, with advice; and what is verified when."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastnst.data.cache import format as cache_format
from fastnst.data.cache import verify as cache_verify
from fastnst.data.cache.build import build_cache
from fastnst.data.cache.format import Cache, as_manifest, is_cache, manifest_bytes, read_cache, read_head
from fastnst.data.cache.verify import open_cache, verify
from fastnst.data.loaders.cache import Shards
from fastnst.data.manifest import build_manifest
from fastnst.data.sampler import Fit
from fastnst.errors import DataError


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_format, "SHARD_BYTES", 40_000)


@pytest.fixture
def cache(generated_photos: Path, tmp_path: Path) -> Cache:
    """Twelve images in some shards."""
    return build_cache(build_manifest(generated_photos), tmp_path / "cache", size=64, fit="random_crop").cache


def use(cache: Cache) -> object:
    return open_cache(cache.folder, size=64, fit="random_crop")


def test_read_cache_returns_what_was_built(photo_folder: Path, tmp_path: Path) -> None:
    (photo_folder / "image_03.jpg").rename(photo_folder / os.fsdecode(b"caf\xe9 \xff.jpg"))
    (photo_folder / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (20, 30)).save(photo_folder / "flat.png")
    manifest = build_manifest(photo_folder, allow_uniform=False)
    cache = build_cache(manifest, tmp_path / "cache", size=64, fit="random_crop").cache
    assert read_cache(cache.folder) == cache
    assert [item.path for item in cache.rejected] == ["broken.png", "flat.png"]
    assert sum(path.stat().st_size for path in cache.folder.glob("*.u8")) == cache.bytes
    assert (cache.folder / "manifest.json").read_bytes() == manifest_bytes(cache)


def test_as_manifest_fingerprint(cache: Cache, generated_photos: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, size: int, fit: Fit) -> str:
        return as_manifest(build_cache(folder, tmp_path / name, size=size, fit=fit).cache).fingerprint

    folder = build_manifest(generated_photos)
    assert fingerprint("again", 64, "random_crop") == as_manifest(cache).fingerprint
    others = {fingerprint("b", 32, "random_crop"), fingerprint("c", 64, "squash")}
    assert len({*others, as_manifest(cache).fingerprint, folder.fingerprint}) == 4


def change(path: Path) -> None:
    """Flip one bit and restore the mtime; only the ctime tells."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def link_elsewhere(path: Path) -> None:
    path.rename(path.with_suffix(".u9"))
    path.symlink_to(path.with_suffix(".u9"))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (change, "is damaged: its SHA-256 differs from the manifest's"),
    (lambda path: os.truncate(path, 1000), "is damaged: it has 1000 bytes instead of "),
    (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is damaged: it has "),
    (lambda path: path.unlink(), "is missing"),
    (link_elsewhere, "is a symbolic link, which a cache never holds"),
    (lambda path: (path.unlink(), os.mkfifo(path)), "is damaged: it is no regular file"),
    (lambda path: (path.unlink(), path.mkdir()), "is damaged: it is no regular file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_open_cache_names_a_damaged_shard(damage: Any, message: str, cache: Cache) -> None:
    use(cache)
    path = cache.folder / cache.shards[1].name
    damage(path)
    command = f"fastnst data cache {cache.source} --size 64 --fit random_crop --out {cache.folder} --rebuild"
    advice = f"rebuild what is damaged with: {command}"
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            use(cache)
        assert str(caught.value).startswith(f"{path} {message}")
        assert str(caught.value).endswith(advice)
        assert caught.value.exit_code == 3
    if damage is not change:
        with pytest.raises(DataError, match=r"shard_0001\.u8"):
            Shards(cache)


def test_open_cache_counts_damaged_shards(cache: Cache) -> None:
    assert len(cache.shards) >= 5
    for shard in cache.shards[:5]:
        (cache.folder / shard.name).unlink()
    with pytest.raises(DataError, match=r"_0000.u8 is missing; .*_0002.u8 is missing and 2 more; rebuild what"):
        use(cache)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are hashed."""
    names: list[str] = []
    original = cache_verify.sha256_of_shard

    def watched(folder: Path, name: str, *arguments: Any) -> str:
        names.append(name)
        return original(folder, name, *arguments)

    monkeypatch.setattr(cache_verify, "sha256_of_shard", watched)
    return names


def test_verify_reads_unchanged_shards_once(cache: Cache, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [shard.name for shard in cache.shards]
    # Written just now, so it may still change within the clock's resolution.
    use(cache)
    assert sorted(hashed) == everything
    monkeypatch.setattr(cache_verify, "_SETTLED_NS", -(10**9))
    use(cache)
    hashed.clear()
    use(cache)
    assert hashed == []
    change(cache.folder / "shard_0002.u8")
    assert len(verify(cache)) == 1
    assert hashed == ["shard_0002.u8"]
    hashed.clear()
    done: list[tuple[int, int]] = []
    assert len(verify(cache, skip_verified=False, progress=lambda *count: done.append(count))) == 1
    assert sorted(hashed) == everything
    assert done[-1] == (cache.bytes, cache.bytes)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"shard_0000.u8": 1}', b"[" * 100_000])
def test_verify_ignores_malformed_stamps(content: bytes, cache: Cache, hashed: list[str]) -> None:
    stamps = cache_verify._stamps_file(cache.folder)
    stamps.parent.mkdir(parents=True, exist_ok=True)
    stamps.write_bytes(content)
    use(cache)
    assert len(hashed) == len(cache.shards)


def test_open_cache_refuses_another_size_or_fit(cache: Cache) -> None:
    with pytest.raises(DataError, match=r"data.image_size is 256, and .*cache was made for 64; make a") as caught:
        open_cache(cache.folder, size=256, fit="random_crop")
    wanted = f"fastnst data cache {cache.source} --size 256 --fit random_crop --out {cache.folder}-256-random_crop"
    assert wanted in str(caught.value)
    assert "--set data.image_size=64" in str(caught.value)
    with pytest.raises(DataError, match=r"data.fit is squash, and .*cache was made for random_crop; ") as caught:
        open_cache(cache.folder, size=64, fit="squash")
    assert "--size 64 --fit squash --out" in str(caught.value)


def test_read_head_reads_what_a_cache_was_made_for(cache: Cache) -> None:
    assert read_head(cache.folder) == replace(cache, shards=(), images=[], rejected=[])
    manifest = cache.folder / "manifest.json"
    whole = manifest.read_bytes()
    for damaged in (
        b"",
        whole[:30],
        whole.replace(b"random_crop", b"diagonal", 1),
        whole.replace(b": 64", b': "64"', 1),
    ):
        manifest.write_bytes(damaged)
        assert read_head(cache.folder) is None
    manifest.unlink()
    assert read_head(cache.folder) is None


def test_open_cache_refuses_an_unfinished_cache(cache: Cache) -> None:
    (cache.folder / "manifest.json").unlink()
    assert is_cache(cache.folder)
    with pytest.raises(DataError, match=r"an unfinished cache .*fastnst data cache FOLDER --size SIZE --out .*cache$"):
        use(cache)


def edit(cache: Cache, change: Callable[[dict[str, Any]], object]) -> None:
    path = cache.folder / "manifest.json"
    value = json.loads(path.read_bytes())
    replaced = change(value)
    path.write_text(json.dumps(value if replaced is None else replaced))


def put(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


ROW = ("shards", 0, "pictures", 0)
ATTACKS: list[Callable[[dict[str, Any]], object]] = [
    *(put(name, "shards", 0, "name") for name in ("../shard_0000.u8", "/etc/passwd", "shard_0001.u8", 7, None)),
    *(put(path, *ROW, 0) for path in ("../a.jpg", "/a.jpg", "a/%2e%2e/b", "%00", "", 5, None, "zzz.jpg", "\ud800")),
    *(put(number, *ROW, column) for number in (0, -1, 10**30, 1.5, "1", True, None) for column in (1, 2, 3)),
    *(put(number, *ROW, 7) for number in (1, -1, 10**30, 0.0, None)),
    *(put(number, *ROW, column) for number in (63, -64, 10**12, "64") for column in (8, 9)),
    *(put(value, *ROW, 4) for value in ("EPS", None, ["JPEG"], {})),
    *(put(value, *ROW, 5) for value in (1, "true", None)),
    *(put(value, *ROW, 6) for value in (10**30, 1.0, None)),
    *(put(row, *ROW) for row in ([], None, "abc", ["a.jpg"], [0] * 11)),
    *(put(value, "shards", 0, "size") for value in (0, -1, 1 << 40, 10**400, "1", None)),
    *(put(value, "shards", 0, "sha256") for value in ("", "a" * 63, "A" * 64, 5, None)),
    *(put(value, "shards", 0, "plan") for value in ("", "0" * 64, None)),
    *(put(value, "shards", 0, "pictures") for value in ([], None, {}, "rows")),
    *(put(value, "shards", 0) for value in ([], None, {}, 5)),
    *(put(value, "shards") for value in ([], None, {}, "shards", 5)),
    *(put(value, "size") for value in (0, -64, 65, 64.0, 2**40, "64", None, True)),
    *(put(value, "fit") for value in ("", "stretch", "squash", 5, None, [])),
    *(put(value, "format") for value in (0, -1, "1", None, True, 1.0)),
    *(put(value, "kind") for value in ("other", None, 5, [])),
    *(put(value, "pillow") for value in ("0", None, 5)),
    *(put(value, "fingerprint") for value in ("", "0" * 64, None)),
    *(put(value, "rejected") for value in (None, 5, [[]], [["a"]], [[5, 5]], "ab")),
    *(put(value, "source") for value in (None, 5, [])),
    lambda manifest: manifest["shards"].reverse(),
    lambda manifest: manifest["shards"].append(manifest["shards"][0]),
    lambda manifest: manifest["shards"][0]["pictures"].reverse(),
    lambda manifest: manifest["shards"][0]["pictures"].pop(),
    *(lambda manifest, key=key: manifest.pop(key) and None for key in ("shards", "size", "kind", "pillow", "rejected")),
    lambda _: [],
    lambda _: 5,
]


def test_read_cache_refuses_a_malicious_manifest(cache: Cache) -> None:
    path = cache.folder / "manifest.json"
    whole = path.read_bytes()
    for attack in ATTACKS:
        path.write_bytes(whole)
        edit(cache, attack)
        assert path.read_bytes() != whole
        with pytest.raises(DataError, match=r"manifest.json is damaged, or not a cache's .*--rebuild"):
            read_cache(cache.folder)
    path.write_bytes(whole)
    assert read_cache(cache.folder) == cache


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a": ' * 200_000, b"1" * 10_000])
def test_read_cache_refuses_a_manifest_that_is_no_json(content: bytes, cache: Cache) -> None:
    (cache.folder / "manifest.json").write_bytes(content)
    assert is_cache(cache.folder)
    with pytest.raises(DataError, match="damaged, or not a cache's"):
        use(cache)


def test_read_cache_refuses_a_newer_format_a_large_file_and_a_pipe(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.folder / "manifest.json"
    edit(cache, put(2, "format"))
    with pytest.raises(DataError, match=r"has format 2, this fastnst reads 1; use a newer fastnst"):
        use(cache)
    monkeypatch.setattr(cache_format, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(DataError, match="above 100"):
        use(cache)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        use(cache)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_read_cache_one_changed_byte_moves_no_image(cache: Cache, place: float, value: int) -> None:
    """The manifest is refused, or its images are unchanged."""
    whole = bytearray(manifest_bytes(cache))
    whole[int(place * len(whole))] = value
    (cache.folder / "manifest.json").write_bytes(whole)
    try:
        changed = read_cache(cache.folder)
    except DataError:
        return
    assert changed.images == cache.images
    assert (changed.size, changed.fit) == (cache.size, cache.fit)
    assert [shard.size for shard in changed.shards] == [shard.size for shard in cache.shards]


def test_build_cache_rebuild_replaces_a_damaged_manifest(cache: Cache, generated_photos: Path) -> None:
    def build(**options: bool) -> Cache:
        manifest = build_manifest(generated_photos)
        return build_cache(manifest, cache.folder, size=64, fit="random_crop", **options).cache

    edit(cache, put(63, "size"))
    with pytest.raises(DataError, match="--rebuild"):
        build()
    assert as_manifest(build(rebuild=True)).fingerprint == as_manifest(cache).fingerprint
    assert use(cache)
