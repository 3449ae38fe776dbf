"""The report of kernel benchmarks: verdicts on the targets, table, merged files, unusable ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import report
from kernel_bench import results

from helpers.run_command import script_exit_code


def _row(op: str, shape: tuple[int, ...], direction: str, provider: str, us: float, gb_per_s: float) -> dict[str, Any]:
    return {
        **{"op": op, "shape": list(shape), "direction": direction, "provider": provider, "p50_us": us, "p20_us": us},
        **{"p80_us": us, "gb_per_s": gb_per_s, "percent_of_copy": 80.0, "copy_gb_per_s": 4000.0, "launches": 2},
        **{"minimum_bytes": 10**6, "peak_memory_bytes": 10**6, "drift": 1.0, "launch_overhead_included": False},
        **{"device": "made up H200", "device_type": "cuda", "driver": "1", "cuda": "13", "torch": "2", "triton": "3"},
        **{"revision": "abc", "date": "2000-01-01", "dtype": "bf16", "layout": "channels_last"},
    }


def _rows(op: str, direction: str, fastnst: list[tuple[float, float]], **others: float) -> list[dict[str, Any]]:
    """One shape per pair of (µs, GB/s) of the library; the others' µs are the same for all shapes."""
    rows = []
    for i, (us, rate) in enumerate(fastnst):
        shape = (16, 64, 2**i, 2**i)
        rows.append(_row(op, shape, direction, "fastnst", us, rate))
        rows += [_row(op, shape, direction, name, other, 1000.0) for name, other in others.items()]
    return rows


def _verdict(text: str, rows: list[dict[str, Any]]) -> results.Verdict:
    (target,) = [target for target in results.TARGETS if target.text == text]
    return results.check(target, results.Results(rows, []))


def test_check_verdicts() -> None:
    name = "max_pool2d_switches forward"
    five = [(10.0, 3700.0)] * 5
    assert _verdict(name, _rows("max_pool2d_switches", "forward", five)).word == "met"
    assert _verdict(name, _rows("max_pool2d_switches", "forward", five[:4])).word == "not measured in full"
    missed = _verdict(name, _rows("max_pool2d_switches", "forward", [*five, (10.0, 3500.0)]))
    assert (missed.word, missed.worst, missed.met, missed.measured) == ("not met", 3.5, 5, 6)
    assert missed.where == "max_pool2d_switches [16, 64, 32, 32]"
    assert _verdict(name, _rows("max_pool2d_switches", "backward", five)).word == "not measured"
    for key, value in (("device", "A100"), ("dtype", "fp32"), ("layout", "contiguous")):
        others = [row | {key: value} for row in _rows("max_pool2d_switches", "forward", five)]
        assert _verdict(name, others).word == "not measured"


def test_check_verdicts_against_other_providers() -> None:
    name = "style_loss forward + backward against torch.compile"
    rows = _rows("style_loss", "forward+backward", [(10.0, 1.0)] * 4 + [(11.0, 1.0)], compile=16.0, eager=9.0)
    assert _verdict(name, rows).word == "not met"
    assert _verdict(name, rows).worst == pytest.approx(16 / 11)
    assert _verdict(name, rows).met == 4
    assert _verdict("style_loss forward + backward against cuBLAS (eager)", rows).met == 0
    without = [row for row in rows if row["provider"] != "compile"]
    assert _verdict(name, without).word == "not measured"


def test_check_counts_epilogues_for_their_norm() -> None:
    rows = _rows("instance_norm", "forward", [(1.0, 4000.0)]) + _rows("instance_norm+relu", "forward", [(1.0, 3000.0)])
    verdict = _verdict("instance_norm forward", rows)
    assert (verdict.met, verdict.measured, verdict.where) == (1, 2, "instance_norm+relu [16, 64, 1, 1]")


def test_markdown_has_table_and_remarks() -> None:
    rows = _rows("gram_matrix", "forward", [(12.5, 80.0)], eager=25.0)
    rows[0] |= {"launch_overhead_included": True}
    rows[1] |= {"drift": 1.1}
    text = results.markdown(results.Results(rows, [(4000.0, 3990.0)]))
    assert "| gram_matrix | 16×64×1×1 | 1.0 | 12.5 | 12.5 … 12.5 | 80 | 80 | 25.0 | 2.00 | – | 2 | 1 |" in text
    assert "Plain copy, the ceiling: 4,000 GB/s (4,000 at the beginning and 3,990 at the end of the run)." in text
    assert "gram_matrix [16, 64, 1, 1] forward, fastnst: the host could not keep ahead of the device" in text
    assert "gram_matrix [16, 64, 1, 1] forward, eager: its second half took 1.10 times as long as its first" in text
    assert "not measured in full" not in text


def _file(path: Path, rows: list[dict[str, Any]]) -> Path:
    copies = [{"begin": 4000.0, "end": 3990.0}]
    path.write_text(json.dumps({"benchmarks": [{"extra_info": row} for row in rows], "copy_gb_per_s": copies}))
    return path


def test_merge_keeps_the_last_measurement(tmp_path: Path) -> None:
    first = _file(tmp_path / "a.json", _rows("gram_matrix", "forward", [(12.5, 80.0)]))
    again = _rows("gram_matrix", "forward", [(10.0, 100.0)]) + _rows("style_loss", "forward", [(7.0, 9.0)])
    second = _file(tmp_path / "b.json", again)
    merged = tmp_path / "c.json"
    results.merge([first, second], merged)
    for found in (results.read([first, second]), results.read([merged])):
        assert [(row["op"], row["p50_us"]) for row in found.rows] == [("gram_matrix", 10.0), ("style_loss", 7.0)]
        assert found.ceilings == [(4000.0, 3990.0)] * 2


def test_read_refuses_unusable_files(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with pytest.raises(results.UnusableResults, match="is no JSON of kernel benchmarks"):
        results.read([file])
    for text in ("not JSON", "[1, 2]", '{"benchmarks": []}', '{"benchmarks": [{"extra_info": {}}]}'):
        file.write_text(text)
        message = "holds no kernel benchmarks" if text.startswith("{") else "is no JSON of kernel benchmarks"
        with pytest.raises(results.UnusableResults, match=message):
            results.read([file])


def test_report_refuses_several_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _rows("gram_matrix", "forward", [(12.5, 80.0)])
    files = [_file(tmp_path / "a.json", rows), _file(tmp_path / "b.json", [rows[0] | {"device": "another"}])]
    assert script_exit_code(monkeypatch, report.__file__, *files) == 3
    message = "report: the files differ in their device: another, made up H200; report them apart"
    assert capsys.readouterr().err.strip() == message
