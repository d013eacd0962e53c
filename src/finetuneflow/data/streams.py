"""Bytes to text: decompression, encoding, caps. The lowest step of reading a dataset.

Place in the flow: **streams** -> `sources.read_rows`. Nothing here knows about rows or shapes.
Memory is bounded by the caps in `Limits`, whatever the size of the file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from finetuneflow.errors import DataError

PROBE_BYTES = 256 * 1024
ENCODING_SCAN_BYTES = 64 * 1024 * 1024
BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may ask of this machine before it is refused; the defaults suit every dataset we know.

    - `row_chars`: characters of one row or line; a longer one is a problem, not a crash.
    - `depth`: nesting of one JSON row. - `columns`: columns of a table.
    - `expansion_ratio`: decompressed / compressed size, judged once `expansion_floor_bytes` came out.
    """

    row_chars: int = 64 * 1024 * 1024
    depth: int = 100
    columns: int = 2_000
    expansion_ratio: int = 200
    expansion_floor_bytes: int = 256 * 1024 * 1024


class DecompressedStream(io.RawIOBase):
    """The bytes of a file, decompressed on the way, with a cap on how much a small file may become.

    A cut or damaged archive ends the stream; `damage` then says what was wrong, so that the rows read so far are kept.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self._limits = limits
        self._file = path.open("rb")
        self.compression = compression_of(self._file.read(4))
        self._file.seek(0)
        self._source = _decompressor(self._file, self.compression)
        self._produced_bytes = 0
        self.damage: str | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            data = self._source.read1(len(buffer))  # what is there: a later error must not cost it
        except (EOFError, OSError, zlib.error, _zstd_error()) as error:
            self.damage = str(error) or type(error).__name__
            return 0
        buffer[: len(data)] = data
        self._produced_bytes += len(data)
        self._check_expansion()
        return len(data)

    def _check_expansion(self) -> None:
        if self.compression is None or self._produced_bytes < self._limits.expansion_floor_bytes:
            return
        ratio = self._produced_bytes / max(1, self._file.tell())
        if ratio > self._limits.expansion_ratio:
            raise DataError(
                "DATASET_EXPANDS_TOO_MUCH",
                f"{self._path.name} becomes more than {self._limits.expansion_ratio} times its size when decompressed.",
                where=str(self._path),
                remedy="Decompress the file yourself if you trust where it came from, then pass the decompressed file.",
            )

    def close(self) -> None:
        self._file.close()
        super().close()


def compression_of(magic: bytes) -> str | None:
    """`gzip`, `zstd` or None, by the first four bytes."""
    if magic[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if magic == b"\x28\xb5\x2f\xfd" else None


def _decompressor(file: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    if compression == "gzip":
        return cast(io.BufferedReader, gzip.GzipFile(fileobj=file))
    if compression == "zstd":
        import zstandard

        return cast(io.BufferedReader, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file


def _zstd_error() -> type[Exception]:
    import zstandard

    return cast(type[Exception], zstandard.ZstdError)


@contextmanager
def open_bytes(path: Path, limits: Limits) -> Iterator[tuple[io.BufferedReader, DecompressedStream]]:
    """A buffered reader of the decompressed bytes, and the stream below it (for `damage`)."""
    try:
        stream = DecompressedStream(path, limits)
    except OSError as error:
        raise unreadable(path, error) from error
    with stream:
        yield io.BufferedReader(stream, BLOCK_BYTES), stream


@contextmanager
def open_text(path: Path, encoding: str, limits: Limits) -> Iterator[tuple[TextIO, DecompressedStream]]:
    """The file's text; lines end at `\\n` only and keep it. Bytes that are no text become lone surrogates (`is_clean`)."""
    with open_bytes(path, limits) as (reader, stream):
        yield io.TextIOWrapper(reader, encoding=encoding, errors=MARK_ERRORS, newline="\n"), stream


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that is missing or may not be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(
            "DATASET_NOT_FOUND",
            f"There is no file {path}.",
            where=str(path),
            remedy="Check the path; relative paths start where the command runs.",
        )
    if isinstance(error, IsADirectoryError):
        return DataError(
            "DATASET_NOT_FOUND", f"{path} is a folder, not a file.", where=str(path), remedy="Name the dataset files inside it."
        )
    return DataError(
        "DATASET_UNREADABLE",
        f"{path} cannot be read: {error.strerror}.",
        where=str(path),
        remedy="Check the file's permissions and the disk.",
    )


# --- encodings ---------------------------------------------------------------------------------

MARK_ERRORS = "finetuneflow-mark"


def _mark_bytes(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: an undecodable byte becomes the lone surrogate U+DCxx, which no valid text holds."""
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in bad), error.end


codecs.register_error(MARK_ERRORS, _mark_bytes)

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CP1252_UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
UTF8_SEQUENCE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
HIGH_BYTE = re.compile(rb"[\x80-\xff]")


def is_clean(text: str) -> bool:
    """True when the text holds no lone surrogate, that is: every byte it was read from was valid."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def wide_encoding(probe: bytes) -> str | None:
    """The encoding named by a byte-order mark, or UTF-16 without one (every other byte of Western text is zero)."""
    for mark, encoding in BOMS:
        if probe.startswith(mark):
            return encoding
    sample = probe[:4096]
    if len(sample) < 4:
        return None
    even, odd = sample[0::2].count(0) / len(sample[0::2]), sample[1::2].count(0) / len(sample[1::2])
    if odd > 0.3 and even < 0.05:
        return "utf-16-le"
    return "utf-16-be" if even > 0.3 and odd < 0.05 else None


def eight_bit_encoding(path: Path, limits: Limits) -> str:
    """`utf-8` or `cp1252`, judged on the first block that is not plain ASCII (tables and plain text; JSON is always UTF-8)."""
    scanned = 0
    with open_bytes(path, limits) as (reader, _):
        while scanned < ENCODING_SCAN_BYTES and (block := reader.read(BLOCK_BYTES)):
            if not block.isascii():
                return judge_block(block)
            scanned += len(block)
    return "utf-8"


def judge_block(block: bytes) -> str:
    """cp1252 only when the block cannot be UTF-8 with a few damaged rows: more stray bytes than UTF-8 sequences."""
    sequences = len(UTF8_SEQUENCE.findall(block))
    stray = len(HIGH_BYTE.findall(UTF8_SEQUENCE.sub(b"", block)))
    cut_at_the_end = 3  # a sequence may be cut by the end of the block
    if stray <= min(cut_at_the_end, sequences) or CP1252_UNDEFINED.search(block):
        return "utf-8"
    return "cp1252" if stray > sequences else "utf-8"
