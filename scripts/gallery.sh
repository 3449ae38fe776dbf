#!/usr/bin/env bash
# Make the images of the README from a run of the demo, with photos in the public domain.
#
#   scripts/gallery.sh RUN [VGG]       RUN: the run directory of `fastnst demo`; VGG: as --vgg, default auto
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${FASTNST_VENV:-$root/.venv}
[[ $# -ge 1 ]] || { echo "usage: $0 RUN [VGG]" >&2; exit 2; }
run=$1 vgg=${2:-auto} images=$1-images
photo=$images/photos/chelsea.png
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

fastnst() { "$venv/bin/fastnst" "$@"; }
fastnst stylize "$run" "$photo" --out "$made/stylized.png"
fastnst visualize transform "$run" "$photo" --size 128 --out "$made/transform"
fastnst visualize deconvnet "$photo" --layer relu1_2 --layer relu2_2 --layer relu3_4 --maps top:6 --size 176 \
    --vgg "$vgg" --out "$made/deconvnet"
fastnst visualize top "$images/photos" --layer relu3_4 --maps 10,74,78,186 --count 4 --size 224 --vgg "$vgg" \
    --out "$made/top"
fastnst visualize saliency "$photo" --target relu3_4:186 --method guided --size 176 --vgg "$vgg" --out "$made/saliency"
fastnst visualize occlusion "$photo" --target relu3_4:186 --patch 24 --stride 8 --fill blur --size 176 --vgg "$vgg" \
    --out "$made/occlusion"

mkdir -p "$root/scripts/gallery"
for sheet in transform/chelsea-layers deconvnet/chelsea-layers deconvnet/chelsea-relu3_4-close top/relu3_4 \
    saliency/chelsea-saliency occlusion/chelsea-occlusion; do
    cp "$made/$sheet.png" "$root/scripts/gallery/$(tr / - <<<"$sheet").png"
done

# Photo, style and result side by side, 192 px each.
"$venv/bin/python" - "$root/scripts/gallery/photo-style-stylized.png" "$photo" "$images/style.png" \
    "$made/stylized.png" <<'PYTHON'
import sys
from PIL import Image, ImageOps

out, *files = sys.argv[1:]
strip = Image.new("RGB", (3 * 192 + 2 * 12, 192), "white")
for index, file in enumerate(files):
    strip.paste(ImageOps.fit(Image.open(file).convert("RGB"), (192, 192), Image.Resampling.LANCZOS), (index * 204, 0))
strip.save(out, optimize=True)
PYTHON
