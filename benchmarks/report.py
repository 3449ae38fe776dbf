"""Kernel benchmarks as a table, targets and a plot.

    pytest benchmarks/ --benchmark-json kernels.json
    python benchmarks/report.py kernels.json --markdown kernels.md --plot kernels.png

Without `--markdown` the table goes to standard output. Several files of one device make one report; of the same
measurement the last one counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kernel_bench import results
from result_files import result_file


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 3 with a message if a file cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--markdown", type=result_file, metavar="FILE", help="write the table here")
    parser.add_argument("--plot", type=result_file, metavar="FILE.png", help="draw achieved bandwidth here")
    parser.add_argument("--merge", type=result_file, metavar="FILE.json", help="write the benchmarks of all files here")
    parser.add_argument("--batch", type=int, metavar="N", help="the batch size to draw; default: 16, else the largest")
    options = parser.parse_args(arguments)
    try:
        found = results.read(options.files)
        if options.merge is not None:
            results.merge(options.files, options.merge)
        batch = found.batch_to_show() if options.batch is None else options.batch
        if options.plot is not None:
            from kernel_bench.plot import draw  # matplotlib takes a second to load, which a table need not wait for

            draw(found, options.plot, batch)
    except results.UnusableResults as error:
        print(f"report: {error}", file=sys.stderr)
        return 3
    text = results.markdown(found)
    if options.markdown is None:
        print(text, end="")
    else:
        options.markdown.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
