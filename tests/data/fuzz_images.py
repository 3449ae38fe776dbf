"""Coverage-guided search for images that `read_image` neither reads nor refuses; not part of the test run.

    pip install atheris
    python tests/data/fuzz_images.py -max_total_time=600 [FOLDER]

FOLDER keeps what reached new code, and is where the next search begins. An input that breaks something is written to
the working folder as `crash-…`; give it a place in `test_fuzz_images.py`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "fastnst"]):
    import test_fuzz_images


def main() -> None:
    """Starts from the seeds of the test."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "seeds").mkdir()
        (Path(folder) / "images").mkdir()
        for number, data in enumerate(test_fuzz_images.SEEDS):
            (Path(folder) / "seeds" / str(number)).write_bytes(data)
        file = Path(folder) / "images" / "image.png"
        kept = [] if any(not argument.startswith("-") for argument in sys.argv[1:]) else [str(Path(folder) / "seeds")]
        atheris.Setup([*sys.argv, *kept], lambda data: test_fuzz_images.check(data, file) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
