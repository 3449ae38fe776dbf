"""What a file is by its first bytes."""

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from fastnst.file_kind import HEAD_BYTES, file_group, file_kind, read_ends


def image(image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, image_format)
    return buffer.getvalue()


def torch_file(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"features.0.weight": torch.zeros(3)}, buffer, **options)
    return buffer.getvalue()


def zip_file(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "content")
    return buffer.getvalue()


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("train2017/a.jpg"))
    return buffer.getvalue()


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def media(*brands: bytes) -> bytes:
    box = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (len(box) + 4).to_bytes(4, "big") + box + bytes(8) + b"mdat"


KINDS: list[tuple[bytes, str | None, str | None]] = [
    (image("JPEG"), "a JPEG", "image"),
    (image("PNG"), "a PNG", "image"),
    (image("WEBP"), "a WebP", "image"),
    (image("GIF"), "a GIF", "image"),
    (image("BMP"), "a BMP", "image"),
    (image("TIFF"), "a TIFF", "image"),
    (image("JPEG2000"), "a JPEG 2000", "image"),
    (image("PPM"), "a PNM image", "image"),
    (media(b"avif", b"mif1"), "an AVIF", "image"),
    (media(b"mif1", b"avif", b"miaf"), "an AVIF", "image"),
    (media(b"mif1", b"heic"), "a HEIF image (HEIC)", "image"),
    (media(b"heic", b"mif1"), "a HEIF image (HEIC)", "image"),
    (media(b"isom", b"mp41"), "an MP4 video", "video"),
    (media(b"qt  "), "a QuickTime video", "video"),
    (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webm", "a WebM video", "video"),
    (b"\x1a\x45\xdf\xa3\xa3B\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\x82\x88matroska", "a Matroska video", "video"),
    (b"RIFF\x24\0\0\0AVI LIST", "an AVI video", "video"),
    (b"MATLAB 5.0 MAT-file Platform: posix, Created on: Mon Nov 17 2014", "a MATLAB file", "network"),
    (b"MATLAB 7.3 MAT-file, Platform: PCWIN64", "a MATLAB file (version 7.3)", "network"),
    (b"\x89HDF\r\n\x1a\n\0\0\0", "an HDF5 file, as Keras writes", "network"),
    (written(lambda file: np.save(file, np.zeros(3))), "a NumPy array", "network"),
    (written(lambda file: np.savez(file, Variable=np.zeros(3))), "a NumPy archive (.npz)", "network"),
    (safetensors.numpy.save({"a": np.zeros(3)}), "a safetensors file", "network"),
    (torch_file(), "a zip file of torch.save", "network"),
    (torch_file(_use_new_zipfile_serialization=False), "an older file of torch.save", "network"),
    *((pickle.dumps({"a": 1}, version), "a pickle of Python", "network") for version in (2, 3, 4, 5)),
    (b"\x04\0\0\0\x01\0\0\0\x03\0\0\0V 1\x0d\0\0\0nn.Sequential", "a file of Torch7", "network"),
    (b"4\n1\n3\nV 1\n13\nnn.Sequential\n", "a file of Torch7", "network"),
    (b'model_checkpoint_path: "fns.ckpt"\n', "TensorFlow's list of checkpoints", "network"),
    (bytes(600) + bytes.fromhex("57fb808b247547db"), "a checkpoint of TensorFlow", "network"),
    (b"\x08\x01\x12\xb4\x9e\x0b\x0a", "a SavedModel of TensorFlow", "network"),
    (b"\x0a\x3d\x0a\x09X_content\x12\x0bPlaceholder", "a frozen graph of TensorFlow", "network"),
    (b"\x0a\xa5\x01\x0a\x09X_content\x12\x0bPlaceholder", "a frozen graph of TensorFlow", "network"),
    (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "an ONNX model", "network"),
    (b"\x0a\x14VGG_ILSVRC_19_layers\x12\x09\x0a\x04data", "a Caffe model", "network"),
    (b"\x0a\x09vgg19_net\xa2\x06\x12", "a Caffe model", "network"),
    (zip_file("config.json"), "a file of Keras", "network"),
    (zip_file("train2017/a.jpg"), "a zip archive", "archive"),
    (zip_file("[Content_Types].xml"), "an office document", "document"),
    (written(lambda file: zipfile.ZipFile(file, "w").close()), "an empty zip archive", "archive"),
    (gzip.compress(b"x"), "a gzip archive", "archive"),
    (bz2.compress(b"x"), "a bzip2 archive", "archive"),
    (lzma.compress(b"x"), "an xz archive", "archive"),
    (b"7z\xbc\xaf\x27\x1c\0\x04", "a 7z archive", "archive"),
    (tar_file(), "a tar archive", "archive"),
    (b"%PDF-1.7", "a PDF", "document"),
    (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing", "text"),
    (b"%!PS-Adobe-3.0 EPSF-3.0", "a PostScript file", "text"),
    (b"\n<!DOCTYPE html>\n<html>", "a web page", "text"),
    (b"\xef\xbb\xbf<HTML><HEAD>", "a web page", "text"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a pointer of Git LFS", "text"),
    (b"#!/bin/sh\necho", "a text", "text"),
    ("Grüße aus München".encode(), "a text", "text"),
    (b"", "an empty file", None),
    (b"\x93\x01\x02\x03 something", None, None),
    (bytes(600), None, None),
]  # fmt: skip


@pytest.mark.parametrize(("content", "kind", "group"), KINDS, ids=[str(kind) for _, kind, _ in KINDS])
def test_file_kind(content: bytes, kind: str | None, group: str | None, tmp_path: Path) -> None:
    path = tmp_path / "wrong_suffix.pth"
    path.write_bytes(content)
    beginning, end = read_ends(path)
    assert (beginning, end) == (content[:HEAD_BYTES], content[-8:])
    assert file_kind(beginning, end) == kind
    assert file_group(beginning, end) == group
    # Neither cut off earlier nor with a wrong end is it taken for something else that could be used.
    assert file_kind(beginning[:16]) in {name for _, name, _ in KINDS} | {None}


def test_read_ends_of_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path("/dev/zero")):
        with pytest.raises(OSError, match=r"directory|regular file"):
            read_ends(path)
