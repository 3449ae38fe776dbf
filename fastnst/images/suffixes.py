"""Which files of a folder are images, by the ends of their names."""

IMAGE_SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
        *(".heic", ".heics", ".heif", ".hif", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        *(".jxl", ".jxr", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".psd", ".xcf", ".svg", ".eps", ".exr", ".hdr"),
        *(".qoi", ".pcx", ".ico", ".icns", ".dds", ".sgi"),
    ]
)
"""Lower case. What a file holds, and whether it can be read, is known only from its content: an image that cannot be
used is named. Raw files of cameras are absent: many begin with a thumbnail that would be taken for the photo."""
