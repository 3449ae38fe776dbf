"""Say what a file is by its first bytes, for messages about files that cannot be used."""

_SIGNATURES = (
    (b"\xff\xd8", "a JPEG"),
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
)


def file_kind(beginning: bytes) -> str | None:
    """Name the kind of a file with its article, such as `a TIFF`; None if it is unknown.

    Args:
        beginning: its first bytes; 512 suffice.
    """
    if beginning[4:8] == b"ftyp":
        return {b"avif": "an AVIF", b"avis": "an AVIF"}.get(beginning[8:12], "a HEIF image or a video")
    for start, name in _SIGNATURES:
        if beginning.startswith(start):
            return name
    text = beginning[:512].strip()
    if text and all(byte >= 32 or byte in b"\t\r\n\f" for byte in text) and b"\x7f" not in text:
        return "a text"
    return None
