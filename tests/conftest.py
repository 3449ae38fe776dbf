"""Fixtures and scheduling for all tests: a clean environment, real test data, small generated images.

Nothing here imports torch at module level, so that the tests of imports see what users see.

Slow tests: the files in `_SLOW`; kernel tests in Triton's interpreter except those `…_by_hand`; names that match
`_SLOW_NAMES`; tests marked `slow`. `scripts/test.sh --quick` leaves them out. Files run in the order of `_SLOW`,
longest first, so that the workers of pytest-xdist finish together. Add a file when it takes more than eight seconds.
"""

import functools
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
from PIL import Image

from helpers.run_command import exit_code_of

if TYPE_CHECKING:
    from helpers.fork_server import ForkServer

PROJECT = Path(__file__).resolve().parents[1]
TEST_DATA = Path(os.environ.get("FASTNST_TEST_DATA") or PROJECT / "../shared/data").resolve()

_INTERPRETER = re.compile(r"^tests/kernels/.*[\[-]interpreter[\]-]")
_QUICK_IN_INTERPRETER = re.compile(r"_by_hand\[")
_SLOW_NAMES = re.compile(r"::test_.*(gradcheck|opcheck|registered_as|compile|one_graph)")
_SLOW = (
    "kernels/test_compiled",
    "training/test_trainer",
    "benchmarks/test_kernel_benchmark_session",
    "training/test_crash",
    "training/test_signals_in_training",
    "training/test_graphed_step",
    "run_log/test_tensorboard_pages",
    "benchmarks/test_end_to_end",
    "training/test_multi_style",
    "training/test_divergence",
    "security/test_files",
    "images/test_every_reader",
    "kernels/test_kernel_report",
    "training/test_distributed",
    "visualize/test_deconv_vgg",
    "training/test_snapshots",
    "training/test_determinism",
    "security/test_network",
    "training/test_multi_style_distributed",
    "visualize/test_top_activations",
    "visualize/test_deconv_transform_net",
    "data/test_replacements",
    "training/test_train_with_bad_images",
    "benchmarks/test_visualize",
    "kernels/test_runtime",
    "benchmarks/test_styles",
    "training/test_io_faults",
    "benchmarks/test_data_pipeline",
    "benchmarks/test_roofline",
    "benchmarks/test_kernel_bench",
    "training/test_run_dir_lock",
    "training/test_graphed_step_in_runs",
    "models/test_fuzz_weights",
    "cli/test_fuzz_command_line",
)

# The settings of whoever runs the tests must not decide their outcome, nor reach child processes. Only the test data's
# folder stays: pytest-xdist's controlling process runs these lines before it starts the workers, which need it.
for _variable in [name for name in os.environ if name.startswith("FASTNST_") and name != "FASTNST_TEST_DATA"]:
    del os.environ[_variable]
# The tensors are tiny and every core has a process: more threads would only wait for one another. OpenMP reads this
# once, when torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the kernel has outlives a killed process, so no test needs the disk. Tests that count calls patch this in turn.
os.fsync = lambda _: None
# Shells start background jobs with SIGINT ignored, nohup ignores SIGHUP, and child processes inherit that: tests could
# not interrupt runs.
for _signum, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, _handler)
# The time of one example depends on the machine.
hypothesis.settings.register_profile(
    "fastnst", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("fastnst")


@pytest.fixture(scope="session", autouse=True)
def _cache_in_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep cached files out of the user's home."""
    os.environ["FASTNST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real images and weights (`FASTNST_TEST_DATA`, default `../shared/data`)."""
    if not TEST_DATA.is_dir():
        pytest.skip(f"no test data at {TEST_DATA}; set FASTNST_TEST_DATA to the folder that holds it")
    return TEST_DATA


@pytest.fixture(scope="session")
def photos(test_data: Path) -> Path:
    """256 JPEG photos, two of them grayscale."""
    return _subfolder(test_data, "photos")


@pytest.fixture(scope="session")
def styles(test_data: Path) -> Path:
    """Nine paintings."""
    return _subfolder(test_data, "styles")


@pytest.fixture(scope="session")
def awkward(test_data: Path) -> Path:
    """21 images that break loaders."""
    return _subfolder(test_data, "awkward")


@pytest.fixture(scope="session")
def weights(test_data: Path) -> Path:
    """VGG19's first layers, a published transform net, and its output for a photo."""
    return _subfolder(test_data, "weights")


@pytest.fixture(scope="session")
def content(test_data: Path) -> Path:
    """Six photos on which style-transfer projects show their results."""
    return _subfolder(test_data, "content")


@pytest.fixture(scope="session")
def generated_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve RGB images of 40 to 120 px: JPEG, PNG and WebP. Shared: do not write here."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(12):
        width, height = (int(side) for side in rng.integers(40, 121, size=2))
        suffix = (".jpg", ".png", ".webp")[index % 3]
        image = Image.fromarray(_smooth_image(rng, height, width))
        image.save(folder / f"image_{index:02d}{suffix}", quality=92)
    return folder


@pytest.fixture(scope="session")
def few_photos(generated_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of `generated_photos`, so that short runs make more than one pass."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(generated_photos.iterdir())[:5]:
        shutil.copy2(path, folder)
    return folder


@pytest.fixture(scope="session")
def fork_server() -> "Iterator[ForkServer]":
    """Server that forks processes with everything imported; see `helpers/fork_server.py`."""
    from helpers.fork_server import ForkServer

    with ForkServer() as server:
        yield server


@pytest.fixture
def fastnst(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a `fastnst` command in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = exit_code_of(monkeypatch, *arguments)
        output = capfd.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def photo_folder(generated_photos: Path, tmp_path: Path) -> Path:
    """Copy of `generated_photos` that the test may change."""
    return Path(shutil.copytree(generated_photos, tmp_path / "photos"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give each file to one worker, so that its fixtures are made once.

    All tests in Triton's interpreter form one group, run in a child of its worker: see `tests/kernels/conftest.py`.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "interpreter" if _INTERPRETER.search(nodeid) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # the items are in order: longest file first
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests before `-m` selects, and sort: the interpreter first, then the order of `_SLOW`."""

    def rank(item: pytest.Item) -> int:
        file = slow_name(item.path)
        if _INTERPRETER.search(item.nodeid):
            return -2 if _QUICK_IN_INTERPRETER.search(item.nodeid) else -1
        return _SLOW.index(file) if file in _SLOW else len(_SLOW)

    for item in items:
        if rank(item) in range(-1, len(_SLOW)) or (rank(item) >= 0 and _SLOW_NAMES.search(item.nodeid)):
            item.add_marker("slow")
    items.sort(key=rank)


def slow_name(path: Path) -> str:
    """Return a test file's area and name, as in `_SLOW`: `tests/visualize/deconv/test_x.py` → `visualize/test_x`."""
    parts = path.parts[len(PROJECT.parts) + 1 :]
    return f"{parts[0]}/{path.stem}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` without a GPU."""
    if item.get_closest_marker("gpu") is not None and (reason := _why_no_gpu()):
        pytest.skip(reason)


@functools.cache
def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"needs an NVIDIA GPU, and torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and CUDA finds none on this machine"
    return ""


def _subfolder(test_data: Path, name: str) -> Path:
    folder = test_data / name
    if not folder.is_dir():
        pytest.skip(f"the test data at {test_data} has no folder {name}")
    return folder


def _smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return blended random colours with a little grain, uint8 [H, W, 3]; like a photo, it survives JPEG."""
    colours = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
    blended = np.asarray(colours.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    grain = rng.normal(0.0, 3.0, size=(height, width, 3)).astype(np.float32)
    return np.clip(blended + grain, 0, 255).astype(np.uint8)
