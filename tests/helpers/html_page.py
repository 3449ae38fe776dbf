"""The tags, texts and links of an HTML page."""

import urllib.parse
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags, texts and links of a page whose elements are all closed, in order."""

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(content.decode("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def files(self) -> set[bytes]:
        """What the links lead to, as a browser reads them: up to `#` or `?`, then unquoted."""
        parts = [urllib.parse.urlsplit(urllib.parse.urljoin("file:///out/index.html", link)) for link in self.links]
        assert all(part.scheme == "file" and not part.netloc and not part.query and not part.fragment for part in parts)
        return {urllib.parse.unquote_to_bytes(part.path).removeprefix(b"/out/") for part in parts}
