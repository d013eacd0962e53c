"""Examples that do not fit into memory: the first ones are kept there, the rest in a file that is gone when it is closed.

Place in the flow: between `examples.to_examples` and splitting, which has to look at all examples before it can part them.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from finetuneflow.data.examples import Example, Place, to_canonical, to_examples
from finetuneflow.data.sources import Row
from finetuneflow.workspace import translate_os_errors

MEMORY_CHARS = 200_000_000  # characters of text kept in memory; about 1 GB of Python objects


class Spool(Sequence[Example]):
    """An append-only sequence. Beyond `memory_chars` an example costs eight bytes of memory."""

    def __init__(self, folder: Path, examples: Iterable[Example] = (), *, memory_chars: int = MEMORY_CHARS) -> None:
        self._folder = folder
        self._room = memory_chars
        self._kept: list[Example] = []
        self._file: Any = None
        self._offsets = array("q", [0])
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        if self._file is None:
            self._room -= _characters(example)
            if self._room >= 0:
                self._kept.append(example)
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as the spool
        place = example.place
        line = json.dumps([[place.file, place.row, place.line], to_canonical(example)]).encode()
        with translate_os_errors(self._folder, needed_bytes=len(line)):
            self._file.seek(self._offsets[-1])
            self._file.write(line)
        self._offsets.append(self._offsets[-1] + len(line))

    @property
    def on_disk(self) -> int:
        """How many examples lie in the file."""
        return len(self._offsets) - 1

    def __len__(self) -> int:
        return len(self._kept) + self.on_disk

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Selection(self, range(*index.indices(len(self))))
        index = range(len(self))[index]
        return self._kept[index] if index < len(self._kept) else self._read(index - len(self._kept))

    def _read(self, number: int) -> Example:
        start, end = self._offsets[number], self._offsets[number + 1]
        self._file.seek(start)
        place, fields = json.loads(self._file.read(end - start))
        example = next(to_examples([Row(Place(*place), fields)]))
        assert isinstance(example, Example), "what was written as an example reads back as one"
        return example


class Selection(Sequence[Example]):
    """Some examples of a sequence, by index; nothing is copied."""

    def __init__(self, examples: Sequence[Example], indices: Sequence[int]) -> None:
        self._examples = examples
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Selection(self._examples, self._indices[index])
        return self._examples[self._indices[index]]

    def __iter__(self) -> Iterator[Example]:
        return (self._examples[i] for i in self._indices)


class Concatenation(Sequence[Example]):
    """Two sequences of examples, one behind the other; nothing is copied."""

    def __init__(self, first: Sequence[Example], second: Sequence[Example]) -> None:
        self._first = first
        self._second = second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Selection(self, range(*index.indices(len(self))))
        index = range(len(self))[index]
        return self._first[index] if index < len(self._first) else self._second[index - len(self._first)]

    def __iter__(self) -> Iterator[Example]:
        yield from self._first
        yield from self._second


def _characters(example: Example) -> int:
    turns = (*example.messages, *example.chosen, *example.rejected)
    return len(example.text or "") + sum(len(message.content) for message in turns)
