"""Every command that writes, on file systems that lack what ext4 has: a preloaded library stands in for them."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.fork_server import arguments

# Below the folder SHIM_DIR, calls that SHIM names fail.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int fails(int fd, const char *call) {
    char link[64], name[4096];
    const char *folder = getenv("SHIM_DIR"), *calls = getenv("SHIM"), *found;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = fd < 0 || !folder || !calls ? -1 : readlink(link, name, sizeof name - 1);
    if (length < 0) return 0;
    name[length] = 0;
    if (strncmp(name, folder, strlen(folder)) || !(found = strstr(calls, call))) return 0;
    errno = atoi(found + strlen(call));
    return 1;
}
#define NEXT(type, name, ...) type(*next)(__VA_ARGS__) = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
int fchmod(int fd, mode_t mode) {
    NEXT(int, "fchmod", int, mode_t);
    return fails(fd, "chmod=") ? -1 : next(fd, mode);
}
int fsync(int fd) {
    NEXT(int, "fsync", int);
    struct stat status;
    int is_folder = !fstat(fd, &status) && S_ISDIR(status.st_mode);
    return fails(fd, is_folder ? "dirsync=" : "filesync=") ? -1 : next(fd);
}
int flock(int fd, int operation) {
    NEXT(int, "flock", int, int);
    return fails(fd, "flock=") ? -1 : next(fd, operation);
}
void *mmap64(void *at, size_t length, int access, int flags, int fd, off_t offset) {
    NEXT(void *, "mmap64", void *, size_t, int, int, int, off_t);
    return fails(fd, "mmap=") ? MAP_FAILED : next(at, length, access, flags, fd, offset);
}
void *mmap(void *at, size_t length, int access, int flags, int fd, off_t offset) {
    return mmap64(at, length, access, flags, fd, offset);
}
"""

# Several commands in one process, since importing torch takes seconds.
COMMANDS = """
import json, sys
from fastnst.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["fastnst", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc or gcc), to stand in for other file systems")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "shim.so"


@pytest.mark.slow
def test_every_command_works_on_a_lesser_file_system(shim: Path, generated_photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "mount"
    photos, run, image = place / "photos", place / "run", place / "photos" / "image_01.png"
    shutil.copytree(generated_photos, photos)
    deconvnet = ("--layer", "relu1_1", "--maps", "0", "--vgg", "random", "--device", "cpu", "--size", "48")
    begin = arguments(photos, run, steps=2, settings=("train.sample_every=2",))
    commands = [
        begin,
        ("train", "--resume", "--out", str(run), "--steps", "3", "--profile", "1"),
        ("stylize", str(run), str(image), "--out", str(place / "out.png"), "--device", "cpu"),
        ("data", "cache", str(photos), "--size", "32", "--out", str(place / "cached")),
        ("visualize", "deconvnet", str(image), *deconvnet, "--out", str(place / "sheets")),
    ]
    lacks = f"chmod={errno.EPERM},dirsync={errno.EINVAL},filesync={errno.ENOTSUP},"
    lacks += f"flock={errno.ENOLCK},mmap={errno.ENODEV}"
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "FASTNST_CACHE": str(place / "cache")}
        | {"LD_PRELOAD": str(shim), "SHIM_DIR": str(place), "SHIM": lacks},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (place / "out.png").exists()
    assert (place / "sheets" / "index.html").exists()
    for what in ("make files durable", "make new names durable", "lock files"):
        assert done.stderr.count(f"does not {what} (") == 1, done.stderr
