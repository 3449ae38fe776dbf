"""Random files, variables and assignments: each gives a configuration or a UserError."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastnst.config import SECTIONS, load_config, to_toml
from fastnst.errors import UserError

KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
keys = st.sampled_from([*KEYS, "preset", "train", "train.steps.a"]) | words
plain = st.one_of(
    st.integers().map(str),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["true", "false", "unset", "''", '"unset"', "nan", "inf", "-inf", "1979-05-27", "07:32:00", "0x_f"]
    ),
    st.sampled_from(["9" * 5000, "0x" + "f" * 5000, "[" * 5000, "{a=" * 300 + "1" + "}" * 300, "a" + ".a" * 2000]),
    st.sampled_from(["relu1_1", "cuda", "gpu", "bf16", "lengstrom", "random", "2e3", "1_000", '"\\u0000"', "'a'\nb=1"]),
    words,
    words.map(repr),
)
values = plain | st.lists(plain, max_size=4).map(lambda items: f"[{', '.join(items)}]")
assignments = st.lists(st.tuples(keys, values), max_size=4)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "config.toml"


def check(back: Path, **sources: Any) -> None:
    """Loads; where that gives a configuration, it can be written, and comes back equal."""
    try:
        config = load_config(**{"environment": {}, **sources})
    except UserError as error:
        refusal = str(error)
        assert 10 < len(refusal) < 20_000
        return
    try:
        text = to_toml(config)
    except UserError as error:
        refusal = str(error)
        assert "UTF-8" in refusal  # a name from the environment, of other bytes
        return
    back.write_text(text, "utf-8")
    assert load_config(file=back, environment={}) == config


@given(assignments)
@settings(max_examples=100)
@example([("train.steps", "9" * 5000)])
@example([("style.image", '"\\u0000"')])
@example([("train.steps" + ".a" * 3000, "1")])
@example([("train.epochs", "1e308")])
def test_load_config_of_random_assignments(file: Path, pairs: list[tuple[str, str]]) -> None:
    check(file, assignments=[f"{key}={value}" for key, value in pairs])


@given(assignments | st.lists(st.tuples(st.sampled_from(KEYS), st.just("\udcff")), max_size=1))
@settings(max_examples=100)
@example([("loss.vgg", "\udcff")])
@example([("data.folder", "a" + ".a" * 2000)])
def test_load_config_of_random_variables(file: Path, pairs: list[tuple[str, str]]) -> None:
    environment = {f"FASTNST_{key.upper().replace('.', '__', 1)}": value for key, value in pairs}
    check(file, environment=environment)


@given(
    st.lists(st.one_of(st.tuples(keys, values).map(" = ".join), keys.map(lambda key: f"[{key}]"), words), max_size=6)
)
@settings(max_examples=100)
@example(["train.steps = 0x" + "f" * 5000])
@example(["preset = 0x" + "f" * 5000])
@example(["a" + ".a" * 100_000 + " = 1"])
@example(['x = ["""', '""", {a' + ".a" * 100_000 + ' = 1}, ""]'])
@example(["""x = ['\"', {a""" + ".a" * 100_000 + """ = 1}, '\"']"""])
def test_load_config_of_files_of_random_lines(file: Path, lines: list[str]) -> None:
    given_file = file.with_name("given.toml")
    given_file.write_text("\n".join(lines), "utf-8")
    check(file, file=given_file)


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_load_config_of_files_of_random_bytes(file: Path, data: bytes) -> None:
    given_file = file.with_name("given.toml")
    given_file.write_bytes(data)
    check(file, file=given_file)


@pytest.mark.campaign
@given(assignments, assignments, assignments)
@settings(max_examples=50_000)
def test_load_config_of_random_sources_by_the_ten_thousand(file: Path, one: Any, two: Any, three: Any) -> None:
    """A quarter of an hour: `pytest -m campaign tests/config/test_fuzz_config.py`."""
    given_file = file.with_name("given.toml")
    given_file.write_text("\n".join(f"{key} = {value}" for key, value in one), "utf-8")
    environment = {f"FASTNST_{key.upper().replace('.', '__', 1)}": value for key, value in two}
    check(file, file=given_file, environment=environment, assignments=[f"{key}={value}" for key, value in three])
