"""Reading: from a dataset file to rows, as a stream, with every bad row kept as a `Problem`.

Place in the flow: **sources.read_rows** -> `examples.to_examples` -> `quality.inspect`.

The format is found from the content, not from the name (the name only settles a draw between a table with one column
and plain text, and whether a list on the first line is a row or the file): JSON Lines, one JSON array, JSON objects one
after the other, CSV/TSV/semicolon/pipe tables, Parquet, plain text and Markdown; each may be compressed with gzip or zstd.
Encodings: UTF-8 with or without a byte-order mark, UTF-16, UTF-32, and cp1252 for tables and plain text. JSON is always
Unicode: a byte that is not is a bad row.

What becomes a row:

- a JSON object: itself; a bare string: `{"string": …}`; a list of role/content objects: `{"messages": …}`;
- a table line: its cells under the header's names, empty cells as null;
- plain text: a file without blank lines whose lines are long (`DOCUMENT_LINE_CHARS` on average) holds one document
  per line; any other text is running text and is cut at blank lines into passages of about `PASSAGE_CHARS`.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TextIO, cast

from finetuneflow.data.conversations import ROLE_KEYS
from finetuneflow.data.examples import Place, Problem, visible
from finetuneflow.data.json_rows import (
    ArrayReader,
    Fault,
    Parsed,
    invalid_text,
    nul_fault,
    numbered_lines,
    strings_in,
    too_long,
    values_by_line,
)
from finetuneflow.data.streams import (
    BLOCK_BYTES,
    PROBE_BYTES,
    Limits,
    eight_bit_encoding,
    is_clean,
    open_bytes,
    open_text,
    wide_encoding,
)
from finetuneflow.errors import DataError
from finetuneflow.knowledge.values import many

Format = Literal["jsonl", "json-array", "json-objects", "csv", "parquet", "text"]
DELIMITERS = (",", "\t", ";", "|")
PASSAGE_CHARS = 8_192  # about 2,048 tokens: one training window at the default length
DOCUMENT_LINE_CHARS = 200
PARQUET_BATCH_ROWS = 256
# Column names that make a table of a file not named .csv or .tsv: prose has commas too.
KNOWN_COLUMNS = frozenset(
    [
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "prompt",
        "completion",
        "response",
        "query",
        "text",
        "content",
        "context",
        "system",
        "messages",
        "conversations",
        "chosen",
        "rejected",
        "label",
        "title",
        "best_answer",
    ]
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file has it: names to values, before any shape is recognised."""

    place: Place
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What a file is: its format, and how its bytes become text. `delimiter` is set for tables only."""

    format: Format
    compression: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    line_documents: bool = field(default=False)


def read_rows(path: str | Path, *, encoding: str | None = None, limits: Limits | None = None) -> Iterator[Row | Problem]:
    """Yield every row of a dataset file, a `Problem` for each that cannot be read. Memory is flat for any file size.

    Raises `DataError` when the file as a whole is no dataset (missing, empty, a PDF, an archive, a decompression bomb).
    """
    path, limits = Path(path), limits or Limits()
    info = sniff(path, encoding=encoding, limits=limits)
    name = str(path)
    if info.format == "parquet":
        yield from _number(name, _parquet_rows(path, info, limits))
        return
    with open_text(path, info.encoding or "utf-8", limits) as (stream, below):
        row = -1
        for row, item in enumerate(_number(name, _text_rows(stream, info, limits, name))):  # noqa: B007 - the last index is used below
            yield item
        if below.damage:
            hint = "The file was cut or damaged after this row; download or compress it again."
            yield Problem(Place(name, row + 1), "ROW_TRUNCATED", f"the compressed data ends early: {visible(below.damage)}", hint)


Entry = tuple[int | None, "dict[str, Any] | Fault"]


def _number(name: str, entries: Iterator[Entry]) -> Iterator[Row | Problem]:
    for row, (line, found) in enumerate(entries):
        place = Place(name, row, line)
        if isinstance(found, Fault):
            yield Problem(place, found.code, found.found, found.hint)
        else:
            yield Row(place, found)


def _text_rows(stream: TextIO, info: SourceInfo, limits: Limits, name: str) -> Iterator[Entry]:
    if info.format == "jsonl":
        return map(_json_entry, values_by_line(stream, limits))
    if info.format == "json-array":
        return map(_json_entry, ArrayReader(stream, limits).values())
    if info.format == "json-objects":
        return map(_json_entry, ArrayReader(stream, limits).documents())
    if info.format == "csv":
        return _table_rows(stream, info.delimiter or ",", limits)
    return _line_documents(stream, limits) if info.line_documents else _passages(stream, limits, name)


# --- what a file is ----------------------------------------------------------------------------


def sniff(path: str | Path, *, encoding: str | None = None, limits: Limits | None = None) -> SourceInfo:
    """Find format, compression, encoding and delimiter from the first bytes. Raises `DataError` for what is no dataset."""
    path, limits = Path(path), limits or Limits()
    with open_bytes(path, limits) as (reader, stream):
        probe = _read_probe(reader)
        compression = stream.compression
        if stream.damage and not probe:
            raise _not_a_dataset(
                path, f"its {compression} data is damaged from the start ({stream.damage})", "Download or compress it again."
            )
    if probe.startswith(b"PAR1"):
        return SourceInfo("parquet", compression)
    _refuse_other_files(path, probe)
    if encoding is not None:
        _check_encoding(encoding, path)
    wide = encoding or wide_encoding(probe)
    if wide is None and len(CONTROL_BYTE.findall(probe)) > max(4, len(probe) // 50):
        raise _not_a_dataset(path, "it holds binary data", "Give JSON, CSV, Parquet or text.")
    text = probe.decode(wide or "utf-8", "replace")
    if not text.replace("\ufeff", "").strip():
        raise DataError(
            "DATASET_EMPTY", f"{path.name} is empty.", where=str(path), remedy="Give a file with at least one example."
        )
    whole = len(probe) < PROBE_BYTES
    kind = _json_format(text, whole, lines_promised=_stem(path.name).endswith((".jsonl", ".ndjson")))
    if kind is not None:
        return SourceInfo(kind, compression, wide or "utf-8")
    chosen = wide or eight_bit_encoding(path, limits)
    text = probe.decode(chosen, "replace")
    delimiter = _delimiter(text, path.name, whole)
    if delimiter is not None:
        return SourceInfo("csv", compression, chosen, delimiter)
    return SourceInfo("text", compression, chosen, line_documents=_is_line_documents(text, whole))


def _read_probe(reader: IO[bytes]) -> bytes:
    parts, size = [], 0
    while size < PROBE_BYTES and (part := reader.read(PROBE_BYTES - size)):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


OTHER_FILES: tuple[tuple[bytes, str, str], ...] = (
    (
        b"%PDF",
        "it is a PDF document",
        "Documents are sources for generated data, not datasets: turn them into examples or plain text first.",
    ),
    (
        b"{\\rtf",
        "it is an RTF document",
        "Documents are sources for generated data, not datasets: turn them into examples or plain text first.",
    ),
    (
        b"PK\x03\x04",
        "it is a ZIP container (Word, OpenDocument, Excel or an archive)",
        "Unpack an archive; turn a document into examples or plain text first: documents are sources for generated data, not datasets.",
    ),
    (b"\xd0\xcf\x11\xe0", "it is an old Office document", "Save it as CSV or text."),
    (b"BZh", "it is compressed with bzip2", "Decompress it, or compress it with gzip or zstd."),
    (b"\xfd7zXZ", "it is compressed with xz", "Decompress it, or compress it with gzip or zstd."),
    (b"\x1f\x8b", "it is compressed twice", "Decompress it once."),
    (b"\x28\xb5\x2f\xfd", "it is compressed twice", "Decompress it once."),
    (b"ARROW1", "it is an Arrow file", "Save it as Parquet or JSON Lines."),
    (b"SQLite format 3", "it is a database", "Export the table as CSV or JSON Lines."),
    (b"\x80\x04", "it is a Python pickle, which is never loaded", "Save the data as JSON Lines or Parquet."),
    (b"\x89PNG", "it is an image", "Give text data."),
    (b"\xff\xd8\xff", "it is an image", "Give text data."),
    (b"GGUF", "it is a model file", "Give a dataset; models are named in the run file."),
)
HTML_START = re.compile(rb"\s*(?>(?:<!--.*?-->\s*)*)<(?:!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL)
TAR_MAGIC_AT = 257
CONTROL_BYTE = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")  # not tab, line ends, form feed, escape


def _refuse_other_files(path: Path, probe: bytes) -> None:
    for magic, what, remedy in OTHER_FILES:
        if probe.startswith(magic):
            raise _not_a_dataset(path, what, remedy)
    if HTML_START.match(probe[:4096].removeprefix(b"\xef\xbb\xbf")):
        raise _not_a_dataset(
            path,
            "it is an HTML page",
            "Documents are sources for generated data, not datasets: turn them into examples or plain text first.",
        )
    if probe[TAR_MAGIC_AT : TAR_MAGIC_AT + 5] == b"ustar":
        raise _not_a_dataset(path, "it is a tar archive", "Unpack it and name the dataset files inside.")


def _not_a_dataset(path: Path, what: str, remedy: str) -> DataError:
    return DataError("DATASET_NOT_A_DATASET", f"{path.name} is not a dataset: {what}.", where=str(path), remedy=remedy)


def _check_encoding(encoding: str, path: Path) -> None:
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise DataError(
            "DATASET_UNREADABLE",
            f"There is no encoding {encoding!r}.",
            where=str(path),
            remedy="For example: utf-8, utf-16, cp1252.",
        ) from error


# --- JSON --------------------------------------------------------------------------------------


def _json_format(text: str, whole: bool, *, lines_promised: bool) -> Format | None:
    """Which JSON layout the beginning of a file shows, or None when it is no JSON. `whole`: the text is the whole file.

    `lines_promised`: its name is that of JSON Lines, so a first line that is a whole list is one bad row and not the file.
    """
    text = text.lstrip("\ufeff \t\r\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not whole and len(lines) > 1:
        lines.pop()
    first, rest = lines[0], lines[1:]
    if text[0] == "[":
        next_rows = (list, dict) if lines_promised else list
        one_list_per_line = rest and isinstance(_parsed(first), list) and isinstance(_parsed(rest[0]), next_rows)
        return "jsonl" if one_list_per_line else "json-array"
    object_lines = sum(line.startswith("{") for line in lines)
    if text[0] == "{":
        if isinstance(_parsed(first), dict) or _ends_inside(first) is False or len(lines) == 1:
            return "jsonl"
        starts_rows = re.findall(r"(?m)^\{.*\S", text)
        return "jsonl" if any(isinstance(_parsed(line.strip()), dict) for line in starts_rows) else "json-objects"
    if (
        text[0] == '"'
        and isinstance(_parsed(first), str)
        and all(line.startswith('"') and isinstance(_parsed(line), str) for line in rest[:20])
    ):
        return "jsonl"
    parsed_objects = sum(line.startswith("{") and isinstance(_parsed(line), dict) for line in lines[:100])
    mostly_objects = object_lines * 2 >= len(lines) and parsed_objects * 2 >= min(len(lines), 100)
    scalars = all(_parsed(line) is not _NOTHING for line in lines[:20])
    return "jsonl" if mostly_objects or (scalars and text[0] not in "[") else None


_NOTHING = object()


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _NOTHING


def _stem(name: str) -> str:
    """A file's name without what its compression adds."""
    return name.lower().removesuffix(".gz").removesuffix(".zst")


def _ends_inside(line: str) -> bool | None:
    """True when a line is the beginning of a JSON value that goes on in the next line, False when it is broken."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line) or (error.msg.startswith("Expecting") and not line[error.pos :].strip())
    except (ValueError, RecursionError):
        return False
    return None


def _json_entry(parsed: Parsed) -> Entry:
    if parsed.fault is not None:
        return parsed.line, parsed.fault
    value = parsed.value
    if isinstance(value, dict):
        return parsed.line, value
    if isinstance(value, str):
        return parsed.line, {"string": value}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if not value[0].keys().isdisjoint(ROLE_KEYS):
            return parsed.line, {"messages": value}
        hint = "One object per line: take the objects of this list out of it."
        return parsed.line, Fault("ROW_NOT_AN_OBJECT", f"a list of {many(len(value), 'object')} without roles", hint)
    names = {list: "a list", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    found = f"{names[type(value)]}: {visible(json.dumps(value, ensure_ascii=False)[:200], 60)}"
    return parsed.line, Fault("ROW_NOT_AN_OBJECT", found, 'Each row must be an object such as {"question": …, "answer": …}.')


# --- tables ------------------------------------------------------------------------------------


def _delimiter(text: str, name: str, whole: bool) -> str | None:
    """The delimiter under which the first rows make a table, or None for plain text."""
    stem = _stem(name)
    named_table = stem.endswith((".csv", ".tsv"))
    best, best_score = None, 0.0
    for delimiter in DELIMITERS:
        score = _table_score(text, delimiter, whole, named_table)
        if score > best_score:
            best, best_score = delimiter, score
    if best is None and named_table:
        return "\t" if stem.endswith(".tsv") else ","
    return best


def _table_score(text: str, delimiter: str, whole: bool, named_table: bool) -> float:
    """0 when the text is no table under this delimiter; else rises with agreement of the rows and number of columns."""
    try:
        rows = [row for row in csv.reader(text.lstrip("\ufeff").splitlines(keepends=True)[:200], delimiter=delimiter) if row]
    except csv.Error:
        return 0.0
    if not whole and len(rows) > 2:
        rows.pop()
    header = [cell.strip() for cell in rows[0]] if rows else []
    if len(header) < 2 or (len(rows) < 2 and not named_table) or any(len(cell) > 64 for cell in header):
        return 0.0
    known = KNOWN_COLUMNS.intersection(column_key(cell) for cell in header)
    if not named_table and not known:
        return 0.0
    agreeing = sum(len(row) == len(header) for row in rows) / len(rows)
    needed = 0.3 if named_table else 0.6
    return agreeing * (1 + 0.01 * min(len(header), 20)) + len(known) if agreeing >= needed else 0.0


def column_key(name: str) -> str:
    """A column name as shapes are matched: `Best Answer` and `best-answer` are `best_answer`."""
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _table_rows(stream: TextIO, delimiter: str, limits: Limits) -> Iterator[Entry]:
    # The module-wide cap of csv is 131,072 characters; ours is enforced per physical line and per cell.
    csv.field_size_limit(limits.row_chars)
    reader = csv.reader(_table_lines(stream, limits), delimiter=delimiter)
    header = _header(reader, stream, limits)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield line, too_long(limits.row_chars)
            continue
        if cells:
            yield line, _table_row(header, cells)


def _table_lines(stream: TextIO, limits: Limits) -> Iterator[str]:
    for _, line in numbered_lines(stream, limits.row_chars):
        # An over-long line becomes a cell that csv refuses, so that the row is reported in its place.
        yield line if line is not None else "x" * (limits.row_chars + 1) + "\n"


def _header(reader: Any, stream: TextIO, limits: Limits) -> list[str]:
    try:
        names = next(row for row in reader if row)
    except (StopIteration, csv.Error) as error:
        raise DataError(
            "DATASET_BAD_HEADER", "The table has no readable header line.", remedy="The first line must name the columns."
        ) from error
    if len(names) > limits.columns:
        raise DataError(
            "DATASET_TOO_MANY_COLUMNS",
            f"The table has {len(names):,} columns; more than {limits.columns:,} is not a dataset of examples.",
            remedy="Keep the columns that hold the prompt and the answer; or the delimiter is not what was detected.",
        )
    header = [name.strip().lstrip("\ufeff") or f"unnamed_{i}" for i, name in enumerate(names)]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            "DATASET_BAD_HEADER",
            f"The column {visible(twice, 60)!r} appears twice in the header.",
            remedy="Give every column its own name.",
        )
    return header


def _table_row(header: list[str], cells: list[str]) -> dict[str, Any] | Fault:
    if len(cells) != len(header):
        hint = "Quote cells that contain the delimiter or line breaks, and write every cell of the row."
        return Fault(
            "ROW_WRONG_CELL_COUNT",
            f"{len(cells)} cells where the header names {len(header)}: {visible(' | '.join(cells), 80)}",
            hint,
        )
    return _checked_strings({name: cell if cell != "" else None for name, cell in zip(header, cells, strict=True)})


def _checked_strings(fields: dict[str, Any]) -> dict[str, Any] | Fault:
    for value in fields.values():
        for text in (value,) if isinstance(value, str) else strings_in(value):
            if not is_clean(text):
                return invalid_text(text)
            if "\0" in text:
                return nul_fault()
    return fields


# --- plain text --------------------------------------------------------------------------------


def _is_line_documents(text: str, whole: bool) -> bool:
    lines = text.rstrip("\n").split("\n")
    if any(not line.strip() for line in lines):
        return False
    return len(text) / len(lines) >= DOCUMENT_LINE_CHARS and (len(lines) > 1 or not whole)


def _line_documents(stream: TextIO, limits: Limits) -> Iterator[Entry]:
    for number, line in numbered_lines(stream, limits.row_chars):
        if line is None:
            yield number, too_long(limits.row_chars)
        elif line.strip():
            yield number, _checked_strings({"text": line.rstrip("\r\n")})


def _passages(stream: TextIO, limits: Limits, document: str) -> Iterator[Entry]:
    """Passages of running text: cut at the first blank line after `PASSAGE_CHARS`, at a line end after twice as many.

    They carry their document as group, so that a split keeps a document on one side.
    """
    lines: list[str] = []
    start, size = 1, 0
    for number, line in numbered_lines(stream, limits.row_chars):
        if line is None:
            yield number, too_long(limits.row_chars)
            continue
        blank = not line.strip()
        if lines and ((blank and size >= PASSAGE_CHARS) or size >= 2 * PASSAGE_CHARS):
            yield start, _passage(lines, document)
            lines, size = [], 0
        if not lines:
            start = number
        if lines or not blank:
            lines.append(line)
            size += len(line)
    if any(line.strip() for line in lines):
        yield start, _passage(lines, document)


def _passage(lines: list[str], document: str) -> dict[str, Any] | Fault:
    return _checked_strings({"text": "".join(lines).replace("\r\n", "\n").rstrip(), "group": document})


# --- Parquet -----------------------------------------------------------------------------------


def _parquet_rows(path: Path, info: SourceInfo, limits: Limits) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _seekable(path, info, limits) as file:
        try:
            table = pq.ParquetFile(file)
            _check_parquet(path, table.metadata, limits)
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for fields in batch.to_pylist():
                    yield None, _parquet_row(fields, limits)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                "DATASET_UNREADABLE",
                f"{path.name} is a damaged Parquet file: {visible(str(error), 200)}.",
                where=str(path),
                remedy="Write or download the file again.",
            ) from error


def _seekable(path: Path, info: SourceInfo, limits: Limits) -> IO[bytes]:
    """Parquet is read from its end: a compressed one is unpacked into a temporary file that vanishes on close."""
    if info.compression is None:
        return path.open("rb")
    file = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    with open_bytes(path, limits) as (reader, _):
        while block := reader.read(BLOCK_BYTES):
            file.write(block)
    file.seek(0)
    return file


def _check_parquet(path: Path, metadata: Any, limits: Limits) -> None:
    if metadata.num_columns > limits.columns:
        raise DataError(
            "DATASET_TOO_MANY_COLUMNS",
            f"The table has {metadata.num_columns:,} columns; more than {limits.columns:,} is not a dataset of examples.",
            where=str(path),
            remedy="Keep the columns that hold the prompt and the answer.",
        )
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    packed = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
    if unpacked > limits.expansion_floor_bytes and unpacked > limits.expansion_ratio * max(1, packed):
        raise DataError(
            "DATASET_EXPANDS_TOO_MUCH",
            f"{path.name} becomes more than {limits.expansion_ratio} times its size when decompressed.",
            where=str(path),
            remedy="Write it again as JSON Lines if you trust where it came from.",
        )


def _parquet_row(fields: dict[str, Any], limits: Limits) -> dict[str, Any] | Fault:
    if sum(len(value) for value in fields.values() if isinstance(value, str | list)) > limits.row_chars:
        return too_long(limits.row_chars)
    return _checked_strings(fields)
