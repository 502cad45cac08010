from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InvalidInput
from pipeline.files.atomic import check_writable, write_atomic
from pipeline.files.strict_yaml import MAX_BYTES, MAX_DEPTH, dumps, load, loads


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("+7", 7),
        ("012", 12),
        ("0x1f", 31),
        ("0o17", 15),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-31", "2026-01-31"),
        ("0b11", "0b11"),
        ("'1e-3'", "1e-3"),
        ("=", "="),
    ],
)
def test_a_scalar_reads_as_yaml_1_2_has_it(scalar: str, value: object) -> None:
    (read,) = loads(f"key: {scalar}", source="test").values()
    assert (read, type(read)) == (value, type(value))


def test_nan_reads_as_a_number() -> None:
    assert math.isnan(loads("key: .nan", source="test")["key"])


def test_every_key_is_text_and_merge_keys_mean_nothing_special() -> None:
    assert loads("1: a\ntrue: b\n<<: {c: d}", source="test") == {"1": "a", "true": "b", "<<": {"c": "d"}}


def test_equal_keys_are_all_named_with_their_lines_nested_ones_too() -> None:
    text = "epochs: 1\nsgd:\n  lr: 1\n  lr: 2\n  nested: [{a: 1, a: 2}]\nepochs: 3\nepochs: 4\n"
    with pytest.raises(InvalidInput) as caught:
        loads(text, source="mine.yaml")
    assert sorted(str(caught.value).splitlines()) == [
        "  line 4: key 'lr' is already set on line 3; keep one of them",
        "  line 5: key 'a' is already set on line 5; keep one of them",
        "  line 6: key 'epochs' is already set on line 1; keep one of them",
        "  line 7: key 'epochs' is already set on line 1; keep one of them",
        "mine.yaml: 4 problems",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x\n", "line 2, column 4: aliases"),
        ("a: !!python/name:os.system ''\n", "line 1, column 4: tags (tag:yaml.org,2002:python/name:os.system)"),
        ("a: !!int '1'\n", "line 1, column 4: tags"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: must be one document, got a second one"),
        ("a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH, f"deeper than {MAX_DEPTH} levels"),
        ("a: " + "[" * 100_000, f"deeper than {MAX_DEPTH} levels"),
        ("a:\n\tb: 1\n", "line 2, column 1: a tab cannot indent YAML; use blanks"),
        ("a: 1\nb: \0\n", r"line 2: must be text, got the character '\x00'; is this a YAML file?"),
        ("a: 1\n\n\x1b[31m", r"line 3: must be text, got the character '\x1b'"),
        ('"\\e[31m": 1', r"line 1: a key must be printable, got '\x1b[31m'"),
        ("? [a, b]\n: 1\n", "line 1: a key must be a word, got a list or a mapping"),
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed here"),
        ("a: [1, 2\n", "line 2, column 1: expected ',' or ']'"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("", "must be a mapping of settings, `key: value`, got an empty file"),
        ("# only a comment\n", "got an empty file"),
        ("- a\n", "must be a mapping of settings, `key: value`, got list"),
        ("words", "must be a mapping of settings, `key: value`, got str"),
    ],
)
def test_a_text_that_is_not_strict_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        loads(text, source="mine.yaml")
    assert str(caught.value).startswith("mine.yaml: 1 problem\n")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa: 1\nb: 2\n", b"a: 1\r\nb: 2\r\n", "a: 1\nb: 2  # é\n".encode()])
def test_a_byte_order_mark_windows_line_ends_and_utf8_are_fine(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    assert load(path) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: é\n".encode("latin-1"), "must be UTF-8 text, got byte 0xe9 at offset 3; save it as UTF-8"),
        ("a: 1\n".encode("utf-16"), "must be UTF-8 text, got byte 0xff at offset 0"),
        (b"a: " + b"x" * MAX_BYTES, f"must be at most {MAX_BYTES} bytes, got more"),
        (b"", "got an empty file"),
    ],
)
def test_a_file_that_is_not_text_or_too_large_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(InvalidInput, match=f"must be at most {MAX_BYTES} bytes"):
        load(Path("/dev/zero"))


def test_a_file_that_is_missing_or_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        load(tmp_path)


LOOKS_LIKE_SOMETHING_ELSE = [
    "1",
    "1e-3",
    ".5",
    "012",
    "0x1f",
    "true",
    "no",
    "null",
    "~",
    "",
    ".inf",
    "- a",
    "a: b",
    "*x",
]
LOOKS_LIKE_SOMETHING_ELSE += [
    "# a",
    "a #b",
    " a ",
    "a\nb",
    "\ta",
    "'",
    '"',
    "{",
    "[",
    "!x",
    "&x",
    "%x",
    "?",
    "é",
    "\x00\x85",
]
texts = st.sampled_from(LOOKS_LIKE_SOMETHING_ELSE) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.floats(allow_nan=False) | st.integers(-(10**30), 10**30)
leaves = st.none() | st.booleans() | numbers | texts
keys = texts.filter(str.isprintable)
documents = st.dictionaries(
    keys,
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)),
    max_size=4,
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(documents)
def test_what_is_written_reads_back_exactly(document: dict[str, Any]) -> None:
    again = loads(dumps(document, comment="two\nlines"), source="test")
    assert again == document
    assert repr(again) == repr(document)  # 1 is not 1.0, -0.0 is not 0.0, and the order is kept


def test_leaf_mappings_and_lists_of_scalars_are_written_on_one_line() -> None:
    text = dumps({"sgd": {"base_lr": {"low": 1e-05, "high": 0.1}}, "milestones": (2, 4)}, comment="found")
    assert text == "# found\nsgd:\n  base_lr: {low: 1e-05, high: 0.1}\nmilestones: [2, 4]\n"


def test_the_same_list_twice_is_written_out_twice_not_as_an_alias() -> None:
    twice = [1, 2]
    assert dumps({"a": twice, "b": twice}) == "{a: [1, 2], b: [1, 2]}\n"


def test_write_atomic_makes_the_folder_and_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "best.yaml"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["best.yaml"]


def test_write_atomic_keeps_the_permissions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("before")
    path.chmod(0o600)
    write_atomic(path, "after")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("after", 0o600)


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder" / "file")
    check_writable(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "folder" / "file")
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)


def test_write_atomic_that_fails_leaves_no_stray_file(tmp_path: Path) -> None:
    folder = tmp_path / "best.yaml"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=r"best\.yaml"):
        write_atomic(folder, "text")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "other.yaml", "text", cast(Any, 3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.yaml"]
    assert list(folder.iterdir()) == []
