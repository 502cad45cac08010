from __future__ import annotations

import pytest

from pipeline.errors import DataError, InvalidInput, PipelineError, Problem, StorageError, printable, shortened


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, 8×8 · über 日本", "plain, 8×8 · über 日本"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u202eright to left", "\\u202eright to left"),
        ("undecodable \udcff", "undecodable \\udcff"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs are at http://me:pw@host:5000/x, not here", "runs are at http://***@host:5000/x, not here"),
        ("postgresql+psycopg2://me:p@/w:@host/runs", "postgresql+psycopg2://***@host/runs"),
        ("https://token@host", "https://***@host"),
        ("postgresql://me@host:5432/runs?options=a@b", None),
        ("postgresql+psycopg://me@host/runs", None),
        ("postgresql://me@there:pw@host/runs", "postgresql://***@host/runs"),
        ("postgresql://host/runs?user=me&password=pw&sslmode=require", None),
        ("http://host/?access_token=pw", "http://host/?access_token=***"),
        ("http://127.0.0.1:5000/#/experiments/1, file:///home/me, me@host, a//b@c", None),
    ],
)
def test_a_password_in_a_url_is_masked(text: str, expected: str | None) -> None:
    assert printable(text) == (expected or text.replace("password=pw", "password=***"))
    assert str(StorageError(text)) == printable(text)
    assert str(InvalidInput(text, [Problem(text, text)])).count("pw") == 0


@pytest.mark.parametrize("cls", [PipelineError, DataError, StorageError])
def test_a_message_keeps_its_lines_and_escapes_the_rest(cls: type[PipelineError]) -> None:
    assert str(cls("a\x1b[31m\nb")) == "a\\x1b[31m\nb"


def test_a_problem_is_one_printable_line() -> None:
    error = InvalidInput("\x1b.yaml", [Problem("a\nb", "must be c,\x07 got d\ne")])
    assert str(error) == "\\x1b.yaml: 1 problem\n  a\\nb: must be c,\\x07 got d\\ne"


def test_a_text_as_long_as_allowed_stays_whole() -> None:
    assert shortened("x" * 200, 200) == "x" * 200
    assert shortened("a" * 100 + "x" * 7 + "b" * 100, 200) == "a" * 100 + "… (7 more) …" + "b" * 100


def test_a_long_value_leaves_the_rule_and_the_remedy_of_a_problem() -> None:
    problem = str(Problem("key" * 20_000, f"must be short, got {'x' * 50_000!r}; shorten it"))
    assert problem.startswith("keykey")
    assert ": must be short, got 'xxx" in problem
    assert problem.endswith("xxx'; shorten it")
    assert len(problem) < 900


def test_a_message_lists_twenty_problems_and_counts_the_rest() -> None:
    first, *listed, last = str(InvalidInput("a.yaml", [Problem("", str(n)) for n in range(5000)])).splitlines()
    assert (first, last) == ("a.yaml: 5000 problems", "  … (4980 more)")
    assert listed == [f"  {n}" for n in range(20)]
    assert "more" not in str(InvalidInput("a.yaml", [Problem("", str(n)) for n in range(20)]))
