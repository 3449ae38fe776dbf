"""Import transform nets trained by other projects."""

from pathlib import Path

import numpy as np
import torch

from fastnst.errors import DataError
from fastnst.models.files.file_checks import check_regular_file, excerpt
from fastnst.models.transform_net import ConvLayer, TransformNet, UpLayer


def load_lengstrom_npz(path: Path | str) -> TransformNet:
    """Load a network of lengstrom/fast-style-transfer from its TensorFlow variables in NumPy's `.npz`.

    `Variable`, `Variable_1`, …, `Variable_47` are weight, shift and scale of each of the 16 convolutions in order,
    weights as [H, W, in, out], those of the two transposed convolutions as [H, W, out, in].

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    path = Path(path)
    net = TransformNet("lengstrom")
    layers = [layer for layer in net.modules() if isinstance(layer, ConvLayer | UpLayer)]
    try:
        check_regular_file(path)
        # Size in double precision and headers: the limit of the file and of every decompressed member.
        largest = 8 * sum(parameter.numel() for parameter in net.parameters()) + (1 << 20)
        if path.stat().st_size > largest:
            raise ValueError(f"its {path.stat().st_size:,} bytes are above {largest:,}")
        with np.load(path, allow_pickle=False) as archive, torch.no_grad():
            for member in archive.zip.infolist():
                if member.file_size > largest:
                    raise ValueError(f"{member.filename} inflates to {member.file_size:,} bytes")
            for index, layer in enumerate(layers):
                # HWIO → OIHW and HWOI → IOHW are one permutation.
                _assign(layer.weight, archive, 3 * index, (3, 2, 0, 1))
                _assign(layer.shift, archive, 3 * index + 1, (0,))
                _assign(layer.scale, archive, 3 * index + 2, (0,))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot read the model {path}: {reason}; give an existing .npz file") from error
    except Exception as error:  # zipfile and NumPy raise nearly anything on a damaged file
        raise DataError(
            f"{path} is not a lengstrom transform net: {excerpt(str(error), 200)}; "
            "it must hold the TensorFlow variables Variable … Variable_47"
        ) from error
    return net


def _assign(parameter: torch.nn.Parameter, archive: np.lib.npyio.NpzFile, index: int, order: tuple[int, ...]) -> None:
    name = f"Variable_{index}" if index else "Variable"
    array = archive[name]
    needed = tuple(parameter.shape[order.index(axis)] for axis in range(len(order)))
    if array.shape != needed:
        raise ValueError(f"{name} has the shape {array.shape}, needed: {needed}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(array.transpose(order))))
