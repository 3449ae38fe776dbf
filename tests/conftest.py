"""What every test may lean on: an environment without the user's settings, real test data, small generated images.

Nothing here imports torch before a test asks for it, so that the tests which watch over imports see what users see.
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
_DEAR_FIXTURES = re.compile(
    r"^tests/(benchmarks/test_kernel_benchmark_session|benchmarks/test_end_to_end|run_log/test_tensorboard_pages"
    r"|training/test_multi_style_distributed|kernels/test_compiled)\.py"
    r"|^tests/security/test_files\.py(?=::test_(hostile_files_are_refused_shortly|a_header_that_no_model_needs))"
)

# Settings of the person who runs the tests must not decide their outcome; nor may child processes inherit them.
for _variable in [name for name in os.environ if name.startswith("FASTNST_")]:
    del os.environ[_variable]
# The tensors are tiny, and every core has a process of its own: more threads would wait for one another longer than
# they compute. OpenMP reads this once, when torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts its background jobs deaf to Ctrl-C, and so are their children: runs that the tests mean to stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "fastnst", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("fastnst")


@pytest.fixture(scope="session", autouse=True)
def _cache_in_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep downloads, manifests and anything else that is cached out of the user's home."""
    os.environ["FASTNST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images and weights (`FASTNST_TEST_DATA`, default `../shared/data`)."""
    if not TEST_DATA.is_dir():
        pytest.skip(f"no test data at {TEST_DATA}; set FASTNST_TEST_DATA to the folder that holds it")
    return TEST_DATA


@pytest.fixture(scope="session")
def photos(test_data: Path) -> Path:
    """256 photos, JPEG, of which two are grayscale."""
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
    """Real VGG19 layers, a published transform net, and an image that it made."""
    return _subfolder(test_data, "weights")


@pytest.fixture(scope="session")
def content(test_data: Path) -> Path:
    """Six photos that style-transfer projects show their results on."""
    return _subfolder(test_data, "content")


@pytest.fixture(scope="session")
def generated_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve RGB images of 40 to 120 px, four each of JPEG, PNG and WebP. All tests share them: do not write here."""
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
    """Five of `generated_photos`: more than one pass over them in the shortest of runs."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(generated_photos.iterdir())[:5]:
        shutil.copy2(path, folder)
    return folder


@pytest.fixture(scope="session")
def fork_server() -> "Iterator[ForkServer]":
    """Forks of a process that has imported everything; see `fork_server.py`."""
    from helpers.fork_server import ForkServer

    with ForkServer() as server:
        yield server


@pytest.fixture
def fastnst(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = exit_code_of(monkeypatch, *arguments)
        output = capfd.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def photo_folder(generated_photos: Path, tmp_path: Path) -> Path:
    """A copy of `generated_photos` of the test's own, which it may change."""
    return Path(shutil.copytree(generated_photos, tmp_path / "photos"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Deal tests out one by one, but to one worker those that share what takes long to make.

    All of Triton's interpreter is such a group, which its worker runs in a child process: `tests/kernels/conftest.py`.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if _INTERPRETER.search(nodeid):
                return "interpreter"
            shared = _DEAR_FIXTURES.search(nodeid)
            return shared[0] if shared else nodeid

    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu`, with the reason, where no GPU answers."""
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
    """Random colours, blended, with a little grain, as uint8 [H, W, 3]: like a photo, it survives JPEG."""
    colours = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
    blended = np.asarray(colours.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    grain = rng.normal(0.0, 3.0, size=(height, width, 3)).astype(np.float32)
    return np.clip(blended + grain, 0, 255).astype(np.uint8)
