"""`index.html`: the figures of one report side by side, in one static file without scripts."""

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from fastnst.images import printable

GENERATOR = b'<meta name="generator" content="fastnst visualize">'
"""In every page: what has it may be replaced by the next."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --faint: #62626a; --paper: #f6f6f7; --card: #fff; --line: #d9d9de; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --faint: #a2a2ac; --paper: #16161a; --card: #212127; --line: #3a3a42; }
}
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 110rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.5rem; }
p { max-width: 60rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem 1.2rem .2rem 0; text-align: left; vertical-align: top; font-weight: normal;
  overflow-wrap: anywhere; }
th { color: var(--faint); white-space: nowrap; }
code { font: .9em ui-monospace, monospace; }
a { color: inherit; }
main { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; margin-top: 1.5rem; }
figure { margin: 0; padding: 1rem; max-width: 100%; box-sizing: border-box; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; }
figure { min-width: min(100%, 24rem); }
/* Texts are as wide as the sheet, not the sheet's frame as wide as the texts. */
figcaption, details { contain: inline-size; }
figcaption { margin-top: .6rem; font-size: .9rem; color: var(--faint); overflow-wrap: anywhere; }
figcaption strong { color: var(--ink); }
details { margin-top: .5rem; font-size: .85rem; }
details th { padding-top: .4rem; }
"""


@dataclass(frozen=True)
class Figure:
    """One contact sheet of a report, with the numbers behind it."""

    name: str
    """File name of its PNG, without the suffix."""
    tag: str
    """In TensorBoard."""
    image: np.ndarray
    """uint8 `[H, W, 3]`."""
    caption: str
    alt: str
    """Text in place of the image."""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    """End of a file name → uint8 `[H, W, 3]` for `….png`, or numbers for `….npy`."""
    table: Sequence[Sequence[str]] = ()
    """Details; the first row holds the column heads."""

    @property
    def files(self) -> dict[str, np.ndarray]:
        """File name → content, the sheet's PNG first."""
        return {f"{self.name}.png": self.image} | {self.name + end: array for end, array in self.extras.items()}


def build_page(title: str, about: str, settings: Mapping[str, str], figures: Sequence[Figure]) -> bytes:
    """Build the page.

    Args:
        title, about: heading, and how to read the figures.
        settings: name → value: the command and its settings.
        figures: in order.

    Returns:
        HTML in UTF-8. Texts are escaped; links are relative and quote the bytes of the file name.
    """
    rows = "\n".join(
        f"<tr><th scope=row>{_text(name)}</th><td>{_code(name, value)}</td></tr>" for name, value in settings.items()
    )
    shown = "\n".join(_figure(figure) for figure in figures)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{GENERATOR.decode()}
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p>{_text(about)}</p>
<table>
{rows}
</table>
<main>
{shown}
</main>
</body>
</html>
"""
    return page.encode()


def _figure(figure: Figure) -> str:
    file, *downloads = figure.files
    link = _link(file)
    height, width = figure.image.shape[:2]
    parts = [
        "<figure>",
        f'<a href="{link}"><img src="{link}" width="{width}" height="{height}" alt="{_text(figure.alt)}"></a>',
        f"<figcaption><strong>{_text(file)}</strong><br>{_text(figure.caption)}",
        *(f'<br><a href="{_link(name)}">{_text(name)}</a>' for name in downloads),
        "</figcaption>",
    ]
    if figure.table:
        heads = "".join(f"<th scope=col>{_text(head)}</th>" for head in figure.table[0])
        rows = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in figure.table[1:])
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f"<details><summary>details</summary><table>\n<tr>{heads}</tr>\n{body}\n</table></details>")
    return "\n".join([*parts, "</figure>"])


def _code(name: str, value: str) -> str:
    return f"<code>{_text(value)}</code>" if name == "command" else _text(value)


def _text(text: str) -> str:
    return escape(printable(text))


def _link(name: str) -> str:
    # With "./" a name that begins with `javascript:` or `//` stays a file name.
    return "./" + urllib.parse.quote(os.fsencode(name))
