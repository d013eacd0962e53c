"""Reading rows: formats and encodings found from content, every bad row kept as a problem, memory and time bounded."""

from __future__ import annotations

import gzip
import io
import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetuneflow.data.examples import Problem, visible
from finetuneflow.data.sources import Row, read_rows, sniff
from finetuneflow.data.streams import Limits
from finetuneflow.errors import CODES, DataError

GOOD = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]


def write(tmp_path: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path, **options: Any) -> tuple[list[dict[str, Any]], list[Problem]]:
    items = list(read_rows(path, **options))
    assert [item.place.row for item in items] == list(range(len(items)))
    return [item.fields for item in items if isinstance(item, Row)], [item for item in items if isinstance(item, Problem)]


def codes(problems: list[Problem]) -> list[str]:
    assert {problem.code for problem in problems} <= CODES.keys()
    assert all(problem.found and problem.hint for problem in problems)
    return [problem.code for problem in problems]


# --- formats -------------------------------------------------------------------------------------

FORMS = {
    "jsonl": jsonl(GOOD),
    "jsonl without final newline": jsonl(GOOD).rstrip("\n"),
    "jsonl with CRLF": jsonl(GOOD).replace("\n", "\r\n"),
    "jsonl with blank lines": jsonl(GOOD).replace("\n", "\n\n  \n"),
    "jsonl with byte-order mark": "\ufeff" + jsonl(GOOD),
    "array on one line": json.dumps(GOOD),
    "array, indented": json.dumps(GOOD, indent=2),
    "array, one row per line": "[\n" + ",\n".join(json.dumps(row) for row in GOOD) + "\n]\n",
    "objects over several lines": "\n".join(json.dumps(row, indent=1) for row in GOOD),
    "csv": "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in GOOD),
    "csv quoted": '"question","answer"\n' + "".join(f'"{row["question"]}","{row["answer"]}"\n' for row in GOOD),
    "tsv": "question\tanswer\n" + "".join(f"{row['question']}\t{row['answer']}\n" for row in GOOD),
    "semicolons": "question;answer\n" + "".join(f"{row['question']};{row['answer']}\n" for row in GOOD),
    "pipes": "question|answer\n" + "".join(f"{row['question']}|{row['answer']}\n" for row in GOOD),
    "csv with CRLF": "question,answer\r\n" + "".join(f"{row['question']},{row['answer']}\r\n" for row in GOOD),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["data", "data.json", "data.txt"])
def test_the_format_is_found_from_the_content_whatever_the_name(tmp_path: Path, form: str, name: str) -> None:
    assert read(write(tmp_path, FORMS[form], name)) == (GOOD, [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["jsonl", "array, indented", "csv"])
def test_unicode_encodings_are_found(tmp_path: Path, encoding: str, form: str) -> None:
    text = FORMS[form].replace("q1", "où « été » ? 🙂").replace("\\u", "\\u")
    rows, problems = read(write(tmp_path, text.encode(encoding)))
    assert problems == [] and rows[1] == {"question": "où « été » ? 🙂", "answer": "a1"}


def test_a_cp1252_table_is_read_without_mojibake(tmp_path: Path) -> None:
    text = "question;answer\nOù est l’été ?;« Là-bas » — 5 €\n"
    path = write(tmp_path, text.encode("cp1252"), "data.csv")
    assert sniff(path).encoding == "cp1252"
    assert read(path)[0] == [{"question": "Où est l’été ?", "answer": "« Là-bas » — 5 €"}]


def test_one_damaged_row_does_not_turn_a_utf8_table_into_cp1252(tmp_path: Path) -> None:
    rows = ["question,answer", *[f"où {i},là-bas été" for i in range(5)]]
    data = "\n".join(rows).encode() + b"\nbad,caf\xe9\n"
    good, problems = read(write(tmp_path, data, "data.csv"))
    assert len(good) == 5 and codes(problems) == ["ROW_INVALID_ENCODING"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("form", ["jsonl", "array, indented", "csv"])
def test_gzip_and_zstd_are_read_like_plain_files(tmp_path: Path, compress: Any, form: str) -> None:
    assert read(write(tmp_path, compress(FORMS[form].encode()))) == (GOOD, [])


def parquet_bytes(rows: list[dict[str, Any]], **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_parquet_is_read_also_when_compressed(tmp_path: Path, compress: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 600
    assert read(write(tmp_path, compress(parquet_bytes(rows)))) == (rows, [])


def test_bare_strings_and_lists_of_messages_become_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read(write(tmp_path, jsonl(["first", "second"])))[0] == [{"string": "first"}, {"string": "second"}]
    assert read(write(tmp_path, jsonl([turns, turns])))[0] == [{"messages": turns}] * 2
    assert read(write(tmp_path, json.dumps([turns, turns])))[0] == [{"messages": turns}] * 2


def test_a_text_file_of_long_lines_holds_one_document_per_line(tmp_path: Path) -> None:
    lines = [f"{i} " + "word " * 100 for i in range(4)]
    rows, _ = read(write(tmp_path, "\n".join(lines) + "\n", "wiki.txt"))
    assert [row["text"] for row in rows] == lines


def test_running_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}, with a comma.\n" + "line of prose\n" * 60 for i in range(40)]
    rows, problems = read(write(tmp_path, "\n".join(paragraphs), "book.md"))
    assert problems == [] and 2 < len(rows) < 10
    assert "\n\n".join(row["text"] for row in rows).split() == "\n".join(paragraphs).split()
    assert all(row["text"].startswith("Paragraph") for row in rows)


def test_prose_with_commas_is_not_taken_for_a_table(tmp_path: Path) -> None:
    assert sniff(write(tmp_path, "Hello, world\nGoodbye, world\nAgain, world\n", "a.txt")).format == "text"


def test_a_csv_with_quotes_newlines_and_one_column(tmp_path: Path) -> None:
    path = write(tmp_path, 'question,answer\n"line one\nline ""two"", here","a, b"\nx,y\n', "data.csv")
    items = list(read_rows(path))
    assert isinstance(items[0], Row) and items[0].fields == {"question": 'line one\nline "two", here', "answer": "a, b"}
    assert [item.place.line for item in items] == [2, 4]
    assert read(write(tmp_path, "text\nhello\nworld\n", "one.csv"))[0] == [{"text": "hello"}, {"text": "world"}]


# --- malformed rows (one bad row never costs a good one) -------------------------------------------


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ('{"question": "x", "answer": "y"', "ROW_BAD_JSON"),
        ('{"question": "x",}', "ROW_BAD_JSON"),
        ('{"question": "x"},', "ROW_BAD_JSON"),
        ("{'question': 'x'}", "ROW_BAD_JSON"),
        ("garbage", "ROW_BAD_JSON"),
        ('{"question": "a\tb"}', "ROW_BAD_JSON"),
        ('{"question": 1, "question": 2}', "ROW_DUPLICATE_KEY"),
        ('{"question": {"a": 1, "a": 2}}', "ROW_DUPLICATE_KEY"),
        ('{"question": NaN}', "ROW_BAD_NUMBER"),
        ('{"question": -Infinity}', "ROW_BAD_NUMBER"),
        ('{"question": 1e400}', "ROW_BAD_NUMBER"),
        ('{"question": 1' + "0" * 400 + "}", "ROW_BAD_NUMBER"),
        ('{"question": 1' + "0" * 10_000 + "}", "ROW_BAD_NUMBER"),
        ("[" * 100_000 + "]" * 100_000, "ROW_TOO_DEEP"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "ROW_TOO_DEEP"),
        ('{"a":' * 300 + "1" + "}" * 300, "ROW_TOO_DEEP"),
        ('{"question": "\\ud800"}', "ROW_LONE_SURROGATE"),
        ('{"question": "\\udc00 \\ud83d"}', "ROW_LONE_SURROGATE"),
        ('{"question": "a\\u0000b"}', "ROW_NUL_CHARACTER"),
        ('{"question": "a\0b"}', "ROW_BAD_JSON"),
        ("[1, 2]", "ROW_NOT_AN_OBJECT"),
        ("null", "ROW_NOT_AN_OBJECT"),
        ("17", "ROW_NOT_AN_OBJECT"),
        ("true", "ROW_NOT_AN_OBJECT"),
    ],
)
def test_a_bad_line_is_a_problem_with_its_number_and_the_good_lines_stay(tmp_path: Path, bad: str, code: str) -> None:
    content = jsonl(GOOD[:2]) + bad + "\n" + jsonl(GOOD[2:])
    started = time.monotonic()
    rows, problems = read(write(tmp_path, content))
    assert time.monotonic() - started < 5
    assert rows == GOOD and codes(problems) == [code]
    assert (problems[0].place.row, problems[0].place.line) == (2, 3)
    assert len(problems[0].found) < 250


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.jsonl.gz"])
@pytest.mark.parametrize("bad_first", ["[1, 2]", "[]", json.dumps(GOOD)])
def test_a_list_on_the_first_of_json_lines_is_a_bad_row_and_not_the_file(tmp_path: Path, name: str, bad_first: str) -> None:
    content = (bad_first + "\n" + jsonl(GOOD)).encode()
    rows, problems = read(write(tmp_path, gzip.compress(content) if name.endswith(".gz") else content, name))
    assert rows == GOOD and codes(problems) == ["ROW_NOT_AN_OBJECT"]
    assert "a list" in problems[0].found and "object" in problems[0].hint and problems[0].place.line == 1


@pytest.mark.parametrize("indent", [None, 1])
def test_one_array_is_read_under_the_name_of_json_lines_too(tmp_path: Path, indent: int | None) -> None:
    assert read(write(tmp_path, json.dumps(GOOD, indent=indent) + "\n")) == (GOOD, [])


@pytest.mark.parametrize("bad_first", ["{'a': 1}", '{"a": 1,}', "garbage"])
def test_a_bad_first_line_does_not_hide_that_the_file_is_json_lines(tmp_path: Path, bad_first: str) -> None:
    rows, problems = read(write(tmp_path, bad_first + "\n" + jsonl(GOOD)))
    assert rows == GOOD and codes(problems) == ["ROW_BAD_JSON"]


def test_a_json_fault_names_line_column_and_excerpt(tmp_path: Path) -> None:
    _, [problem] = read(write(tmp_path, jsonl(GOOD) + '{"question": "x" "answer": 1}\n'))
    assert str(problem.place).endswith("data.jsonl:6")
    assert "column 18" in problem.found and '"answer"' in problem.found


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "bad",
    ['{"question": "x", "answer": }', '{"question": "x" "answer": 1}', '{"question": "unterminated, "answer": "y"}', '{"question": NaN, "answer": 1}', "{'question': 1}",
     '{"question": 1, "question": 2}', '{"question": ' + "[" * 5000 + "]" * 5000 + "}", '{"question": "\\ud800"}'],
)  # fmt: skip
def test_a_bad_element_of_an_array_costs_only_itself(tmp_path: Path, indent: int | None, bad: str) -> None:
    parts = [json.dumps(row, indent=indent) for row in GOOD]
    parts.insert(2, bad)
    rows, problems = read(write(tmp_path, "[\n" + ",\n".join(parts) + "\n]"))
    assert rows == GOOD and len(problems) == 1
    assert problems[0].place.row == 2 and problems[0].place.line is not None


def test_a_bad_last_element_leaves_the_array_in_order(tmp_path: Path) -> None:
    rows, problems = read(write(tmp_path, json.dumps(GOOD)[:-1] + ', {"question": oops}]'))
    assert rows == GOOD and codes(problems) == ["ROW_BAD_JSON"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (json.dumps(GOOD)[:-1] + ",]", "ROW_BAD_JSON"),
        (json.dumps(GOOD)[:-1], "ROW_TRUNCATED"),
        (json.dumps(GOOD) + "{}", "ROW_BAD_JSON"),
        (json.dumps(GOOD).replace("}, {", "},, {", 1), "ROW_BAD_JSON"),
    ],
)
def test_commas_and_brackets_of_an_array_are_reported_and_rows_kept(tmp_path: Path, content: str, code: str) -> None:
    rows, problems = read(write(tmp_path, content))
    assert rows == GOOD and codes(problems) == [code]


def test_an_array_is_the_same_read_in_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"question": "é\n" * i, "answer": i, "more": [None, True, {"x": -1.5e3}]} for i in range(60)]
    path = write(tmp_path, json.dumps(values, indent=1) + "\n")
    monkeypatch.setattr("finetuneflow.data.json_rows.BLOCK_CHARS", 7)
    assert read(path) == (values, [])


def test_invalid_utf8_is_reported_per_row_never_replaced(tmp_path: Path) -> None:
    lines = [b'{"question": "caf\xe9"}', '{"question": "café"}'.encode(), b'{"question": "\xff\xfe"}']
    rows, problems = read(write(tmp_path, b"\n".join(lines)))
    assert rows == [{"question": "café"}] and codes(problems) == ["ROW_INVALID_ENCODING"] * 2
    array = b"[" + b",".join(lines) + b"]"
    assert read(write(tmp_path, array))[0] == rows


def test_mixed_encodings_in_one_file_are_reported_per_row(tmp_path: Path) -> None:
    content = (
        jsonl(GOOD * 30).encode()
        + '{"question": "é"}\n'.encode("utf-16-le")
        + '{"question": "é"}\n'.encode("latin-1")
        + jsonl(GOOD).encode()
    )
    rows, problems = read(write(tmp_path, content))
    assert rows[:150] == GOOD * 30 and rows[-4:] == GOOD[1:]  # the stray half of a UTF-16 line end spoils the line it runs into
    assert problems and set(codes(problems)) <= {"ROW_INVALID_ENCODING", "ROW_BAD_JSON"}


def test_a_line_over_the_limit_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.write(jsonl(GOOD[:2]) + '{"question": "')
        for _ in range(64):
            file.write("x" * 1_000_000)
        file.write('"}\n' + jsonl(GOOD[2:]))
    tracemalloc.start()
    rows, problems = read(path, limits=Limits(row_chars=1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == GOOD and codes(problems) == ["ROW_TOO_LONG"]
    assert peak < 20_000_000


@pytest.mark.parametrize("as_array", [True, False])
def test_memory_stays_flat_however_many_rows(tmp_path: Path, as_array: bool) -> None:
    row = json.dumps({"question": "q" * 200, "answer": "a" * 200})
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[" if as_array else "")
        for i in range(60_000):
            file.write((",\n" if as_array and i else "") + row + ("" if as_array else "\n"))
        file.write("]" if as_array else "")
    tracemalloc.start()
    count = sum(isinstance(item, Row) for item in read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60_000 and path.stat().st_size > 25_000_000
    assert peak < 12_000_000


def test_an_array_element_over_the_limit_is_one_problem(tmp_path: Path) -> None:
    long = {"question": "x" * 3_000_000, "answer": "y"}
    rows, problems = read(write(tmp_path, json.dumps([*GOOD[:2], long, *GOOD[2:]])), limits=Limits(row_chars=100_000))
    assert rows == GOOD and codes(problems) == ["ROW_TOO_LONG"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_cut_archive_keeps_the_rows_before_the_cut(tmp_path: Path, compress: Any) -> None:
    import random

    generator = random.Random(1)
    rows = [{"question": str(generator.random()), "answer": str(generator.random())} for _ in range(20_000)]
    data = compress(jsonl(rows).encode())
    good, problems = read(write(tmp_path, data[: len(data) // 2]))
    assert good == rows[: len(good)] and len(good) > 5_000
    assert problems and set(codes(problems)) <= {"ROW_TRUNCATED", "ROW_BAD_JSON"}


# --- tables ----------------------------------------------------------------------------------------


def test_rows_with_too_many_or_too_few_cells_are_problems(tmp_path: Path) -> None:
    good, problems = read(write(tmp_path, "question,answer\na,b\nc\nd,e,f\ng,h\n", "data.csv"))
    assert good == [{"question": "a", "answer": "b"}, {"question": "g", "answer": "h"}]
    assert codes(problems) == ["ROW_WRONG_CELL_COUNT"] * 2 and [problem.place.line for problem in problems] == [3, 4]


def test_a_hundred_thousand_columns_are_refused(tmp_path: Path) -> None:
    header = ",".join(f"c{i}" for i in range(100_000))
    with pytest.raises(DataError) as caught:
        list(read_rows(write(tmp_path, f"{header}\n{header}\n", "wide.csv")))
    assert caught.value.code == "DATASET_TOO_MANY_COLUMNS"


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(write(tmp_path, "question,answer,answer\na,b,c\n", "data.csv")))
    assert caught.value.code == "DATASET_BAD_HEADER"


def test_an_unclosed_quote_is_bounded_and_reported(tmp_path: Path) -> None:
    body = 'question,answer\na,b\n"c,d\n' + "e,f\n" * 100_000
    good, problems = read(write(tmp_path, body, "data.csv"), limits=Limits(row_chars=50_000))
    assert good[0] == {"question": "a", "answer": "b"}
    assert "ROW_TOO_LONG" in codes(problems)


def test_nul_in_a_cell_is_a_problem(tmp_path: Path) -> None:
    good, problems = read(write(tmp_path, "question,answer\n" + "a,b\n" * 200 + "c,d\0\n", "data.csv"))
    assert len(good) == 200 and codes(problems) == ["ROW_NUL_CHARACTER"]


# --- files that are no datasets --------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"  \n \n", b"\xef\xbb\xbf\n", b"\x0b", gzip.compress(b"", mtime=0)])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(write(tmp_path, content)))
    assert caught.value.code == "DATASET_EMPTY"


@pytest.mark.parametrize("content", [b"question,answer\n", b"[]", b"[ \n ]\n"])
def test_header_only_and_an_empty_array_give_no_rows(tmp_path: Path, content: bytes) -> None:
    assert read(write(tmp_path, content, "data.csv")) == ([], [])


@pytest.mark.parametrize(
    "content",
    [b"%PDF-1.7\n...", b"PK\x03\x04" + b"\0" * 40, b"<!DOCTYPE html><html></html>", b"\n<!-- x -->\n<html>", b"\x80\x04\x95pickle", b"GGUF\x03\0\0\0", b"BZh91AY",
     gzip.compress(gzip.compress(b"[1]", mtime=0), mtime=0), bytes(range(256)) * 40, b"\x89PNG\r\n\x1a\n"],
)  # fmt: skip
def test_other_files_are_refused_with_what_they_are(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(write(tmp_path, content)))
    assert caught.value.code == "DATASET_NOT_A_DATASET" and caught.value.remedy


def test_a_page_made_to_be_slow_is_judged_in_time(tmp_path: Path) -> None:
    started = time.process_time()
    sniff(write(tmp_path, b"<!---->" * 2_000 + b"<p>text", "x.txt"))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("bad", ['{"question": oops}', '{"question": "x}', '{"question" 1}'])
def test_a_large_array_of_bad_rows_is_read_in_time(tmp_path: Path, bad: str) -> None:
    started = time.process_time()
    _, problems = read(write(tmp_path, "[" + ",\n".join([bad] * 5_000) + "]"))
    assert time.process_time() - started < 5 and len(problems) >= 2_500


def test_missing_files_folders_and_unknown_encodings_have_their_own_messages(tmp_path: Path) -> None:
    for path, options, code in [
        (tmp_path / "none.jsonl", {}, "DATASET_NOT_FOUND"),
        (tmp_path, {}, "DATASET_NOT_FOUND"),
        (write(tmp_path, "[]"), {"encoding": "klingon"}, "DATASET_UNREADABLE"),
        (write(tmp_path, b"PAR1 broken", "x.parquet"), {}, "DATASET_UNREADABLE"),
    ]:
        with pytest.raises(DataError) as caught:
            list(read_rows(path, **options))
        assert caught.value.code == code


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_decompression_bomb_is_refused(tmp_path: Path, compress: Any) -> None:
    path = write(tmp_path, compress(jsonl([{"text": "a" * 1000}]).encode() * 20_000))
    limits = Limits(expansion_floor_bytes=4_000_000, expansion_ratio=100)
    with pytest.raises(DataError) as caught:
        list(read_rows(path, limits=limits))
    assert caught.value.code == "DATASET_EXPANDS_TOO_MUCH"


def test_a_parquet_bomb_and_a_wide_parquet_are_refused(tmp_path: Path) -> None:
    bomb = parquet_bytes([{"text": "a" * 100_000}] * 200, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError) as caught:
        list(read_rows(write(tmp_path, bomb), limits=Limits(expansion_floor_bytes=1_000_000)))
    assert caught.value.code == "DATASET_EXPANDS_TOO_MUCH"
    with pytest.raises(DataError) as caught:
        list(read_rows(write(tmp_path, parquet_bytes([{f"c{i}": 1 for i in range(30)}])), limits=Limits(columns=20)))
    assert caught.value.code == "DATASET_TOO_MANY_COLUMNS"


# --- what is shown, and properties -----------------------------------------------------------------


@pytest.mark.parametrize("hostile", ["\x1b[31mred\x1b[0m", "\u202egnp.exe", "a\rb\nc", "\x00", "\ud800", "\u200f", "\x9b31m"])
def test_control_characters_are_escaped_when_shown(hostile: str) -> None:
    shown = visible(f"<b>{hostile}</b>", 200)
    assert shown.isprintable() and shown.startswith("<b>") and shown.encode("utf-8")


def test_excerpts_of_bad_rows_are_escaped(tmp_path: Path) -> None:
    _, [problem] = read(write(tmp_path, jsonl(GOOD) + '{"question": \x1b[2J\u202e}\n'))
    assert problem.found.isprintable()


@given(st.text(max_size=300), st.integers(1, 80))
def test_visible_text_is_printable_and_within_its_limit(text: str, limit: int) -> None:
    shown = visible(text, limit)
    assert len(shown) <= limit and shown.isprintable()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")), inner, max_size=4)
    ),
    max_leaves=12,
)
json_objects = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")), json_values, min_size=1, max_size=5
)
file_settings = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@file_settings
@given(
    st.lists(json_objects, min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.sampled_from(["utf-8", "utf-16"]),
)
def test_json_objects_come_back_equal_from_lines_and_arrays(
    tmp_path: Path, rows: list[Any], ascii_only: bool, indent: int | None, encoding: str
) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    array = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    for text in (lines, array):
        assert read(write(tmp_path, text.encode(encoding))) == (rows, [])


@file_settings
@given(st.binary(min_size=1, max_size=400), st.sampled_from(["x", "x.csv", "x.json"]))
@example(b"[", "x")
@example(b'{"a": 1}\n[', "x")
@example(b'"', "x")
@example(b'a,"\n', "x.csv")
@example(b"\xff\xfe[", "x")
def test_no_bytes_crash_the_reader(tmp_path: Path, data: bytes, name: str) -> None:
    try:
        items = list(read_rows(write(tmp_path, data, name)))
    except DataError as error:
        assert error.code in CODES
        return
    for item in items:
        assert isinstance(item, Problem) or all(
            not (isinstance(value, float) and not math.isfinite(value)) for value in item.fields.values()
        )


@file_settings
@given(
    st.lists(
        st.sampled_from([json.dumps(GOOD[0]), "{", "]", ",", '"', "NaN", "\n", "[", '{"question": ', "\\", "\ufeff", "é"]),
        max_size=30,
    )
)
def test_no_broken_json_crashes_or_hangs_the_reader(tmp_path: Path, pieces: list[str]) -> None:
    for prefix in ("[", ""):
        try:
            list(read_rows(write(tmp_path, prefix + "".join(pieces))))
        except DataError as error:
            assert error.code in CODES
