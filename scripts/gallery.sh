#!/usr/bin/env bash
# Make the pictures of the README's gallery: from a run of the demo, whose photographs are in the public domain.
#
#   scripts/gallery.sh RUN [VGG]       RUN: what `fastnst demo` has trained; VGG: as --vgg, default auto
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
fastnst=${FASTNST_VENV:-$root/.venv}/bin/fastnst
[[ $# -ge 1 ]] || { echo "usage: $0 RUN [VGG]" >&2; exit 2; }
run=$1 vgg=${2:-auto} photos=$1-pictures/photos
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

"$fastnst" visualize transform "$run" "$photos/chelsea.png" --size 128 --out "$made/transform"
"$fastnst" visualize deconvnet "$photos/chelsea.png" --layer relu1_2 --layer relu2_2 --layer relu3_4 \
    --maps top:6 --size 176 --vgg "$vgg" --out "$made/deconvnet"
"$fastnst" visualize top "$photos" --layer relu3_4 --maps 10,74,78,186 --count 4 --size 224 --vgg "$vgg" --out "$made/top"
"$fastnst" visualize saliency "$photos/chelsea.png" --target relu3_4:186 --method guided --size 176 \
    --vgg "$vgg" --out "$made/saliency"
"$fastnst" visualize occlusion "$photos/chelsea.png" --target relu3_4:186 --patch 24 --stride 8 --fill blur --size 176 \
    --vgg "$vgg" --out "$made/occlusion"

mkdir -p "$root/scripts/gallery"
for sheet in transform/chelsea-layers deconvnet/chelsea-layers deconvnet/chelsea-relu3_4-close top/relu3_4 \
    saliency/chelsea-saliency occlusion/chelsea-occlusion; do
    cp "$made/$sheet.png" "$root/scripts/gallery/$(tr / - <<<"$sheet").png"
done
