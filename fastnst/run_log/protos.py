"""Protocol buffers for TensorBoard's histograms, hyper-parameters and custom scalars."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnst.config import Config, Section, VisualizeConfig

if TYPE_CHECKING:
    import numpy as np
    from tensorboard.compat.proto.summary_pb2 import Summary

METRICS = ("loss/total", "loss/content", "loss/style", "loss/tv")
"""The metrics of the hyper-parameters page, and of the first custom chart."""

BINS = 80

# Paths, devices and reporting intervals, which do not change the result.
_NO_HYPER_PARAMETERS = frozenset(
    f"{section}.{key}"
    for section, keys in {
        "data": ("folder", "loader", "workers", "prefetch", "max_failed_percent"),
        "train": (
            *("device", "log_every", "sample_every", "samples"),
            *("checkpoint_every", "keep_checkpoints", "max_skipped_steps"),
        ),
        "visualize": tuple(VisualizeConfig.model_fields),
    }.items()
    for key in keys
)


def histogram(values: "np.ndarray", bins: int = BINS) -> dict[str, Any] | None:
    """Compute the arguments of PyTorch's `histogram_raw`: `bins` equal bins over the range of the values.

    TensorBoard's default bins grow by a factor of 1.1 each: two dozen hold all weights between 0.1 and 1.

    Args:
        values: any shape, fp32; NaN and Inf are left out.
        bins: number of bins; equal values get one.

    Returns:
        None if no value is finite: TensorBoard refuses an empty histogram.
    """
    import numpy as np

    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    counts, limits = [finite.size], [high]
    if low < high:
        counts_of_bins, edges = np.histogram(finite, bins, (low, high))
        # TensorBoard wants right edges only.
        counts, limits = counts_of_bins.tolist(), edges[1:].tolist()
    return {
        "min": low,
        "max": high,
        "num": finite.size,
        "sum": float(finite.sum()),
        "sum_squares": float((finite * finite).sum()),
        "bucket_limits": limits,
        "bucket_counts": counts,
    }


def hyper_parameters(config: Config) -> dict[str, bool | float | str]:
    """Collect the configuration keys that change the result, such as `loss.style_weight`.

    Lists become texts, paths become file names; unset keys are left out.
    """
    flat: dict[str, Any] = {"preset": config.preset}
    for name in ("data", "style", "model", "loss", "train"):
        section: Section = getattr(config, name)
        flat |= {f"{name}.{key}": getattr(section, key) for key in type(section).model_fields}
    return {key: _plain(value) for key, value in flat.items() if value is not None and key not in _NO_HYPER_PARAMETERS}


def session_start(values: dict[str, bool | float | str], started: float) -> "list[Summary]":
    """Describe the hyper-parameters and metrics, and this run's values; `started` in seconds since 1970.

    For the run's own log: PyTorch's `add_hparams` would show them as a second run.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64))
            for name, value in values.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in METRICS],
        time_created_secs=started,
    )
    session = plugin_data_pb2.SessionStartInfo(start_time_secs=started)
    for name, value in values.items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(session.hparams[name], field, value)
    return [
        _hparams_summary(metadata.EXPERIMENT_TAG, experiment=experiment),
        _hparams_summary(metadata.SESSION_START_INFO_TAG, session_start_info=session),
    ]


def session_end(ended: float) -> "Summary":
    """Mark the run as finished; `ended` in seconds since 1970."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=ended)
    return _hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def chart_layout(layers: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Lay out the custom-scalars page, for PyTorch's `custom_scalars`.

    Args:
        layers: of the loss, front to back.
    """

    def chart(*tags: str) -> list[Any]:
        # TensorBoard reads tags as regular expressions, matched at the beginning only.
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    return {
        "loss": {
            "all terms": chart(*METRICS),
            "content, by layer": chart(*(f"loss/content/{layer}" for layer in layers)),
            "style, by layer": chart(*(f"loss/style/{layer}" for layer in layers)),
        },
        "speed": {
            "images per second": chart("speed/images_per_second"),
            "percent of the time": chart("speed/data_wait_percent"),
        },
    }


def _hparams_summary(tag: str, **data: Any) -> "Summary":
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**data))
    return Summary(value=[Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)])


def _plain(value: Any) -> bool | float | str:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Path):
        return value.name
    return ", ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
