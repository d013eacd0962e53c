"""Sameness: which examples are exact or near duplicates of each other.

Place in the flow: used by `quality` (counts) and `splits` (nothing may straddle).

- Exact: equal content, white space aside. System turns and tool definitions count.
- Near: estimated Jaccard similarity of the word pairs (character pairs where words are not spaced) of at least
  `NEAR_THRESHOLD`, letter case and system turns aside, because a long shared system prompt would make all rows alike.
  MinHash with 128 permutations (standard error about 0.035 at 0.8); candidates by 21 bands of 6: a pair of similarity
  0.8 is found with probability 0.998, one of 0.9 practically always.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from finetuneflow.data.examples import Example, Message, prompt_of

NEAR_THRESHOLD = 0.8
PERMUTATIONS = 128
BANDS, BAND_WIDTH = 21, 6
CHUNK_EXAMPLES = 2_000
UNSPACED_WORD_CHARS = 16  # longer "words" on average mean a script without spaces
SEED = 20_240_501


def exact_key(example: Example) -> int:
    """64 bits that are equal for examples with the same content, white space aside."""
    parts = [
        example.kind,
        str(example.label),
        *turn_parts(example.messages),
        "\x1d",
        *turn_parts(example.chosen),
        "\x1d",
        *turn_parts(example.rejected),
    ]
    if example.text is not None:
        parts.append(_collapsed(example.text))
    if example.tools:
        parts.append(json.dumps(example.tools, sort_keys=True))
    return _hashed(parts)


def prompt_key(example: Example) -> int | None:
    """64 bits that are equal for examples with the same prompt, white space aside; None for a document, which has none."""
    if example.kind == "text":
        return None
    tools = [json.dumps(example.tools, sort_keys=True)] if example.tools else []
    return _hashed([*turn_parts(prompt_of(example)), "\x1d", *tools])


def answer_key(messages: Sequence[Message]) -> int:
    """64 bits that are equal for the same turns, white space aside."""
    return _hashed(turn_parts(messages))


def _hashed(parts: Iterable[str]) -> int:
    digest = hashlib.blake2b("\x1e".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def turn_parts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        yield message.role
        yield _collapsed(message.content)
        for call in message.tool_calls:
            yield f"{call.name}{json.dumps(call.arguments, sort_keys=True)}"


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def compared_text(example: Example) -> str:
    """The text that near duplicates are judged on."""
    if example.text is not None:
        return example.text
    turns = (*example.messages, *example.chosen, *example.rejected)
    texts = [message.content for message in turns if message.role != "system"]
    calls = [json.dumps(call.arguments, ensure_ascii=False) for message in turns for call in message.tool_calls]
    return "\n".join(texts + calls)


def words_of(text: str) -> list[str]:
    """Lower-case words; single characters where the script does not space its words."""
    words = text.lower().split()
    if text.isascii() or len(text) <= UNSPACED_WORD_CHARS * len(words):
        return words
    return [char for char in text.lower() if not char.isspace()]


class Signatures:
    """MinHash signatures, added in any number of steps; 512 bytes per example."""

    def __init__(self) -> None:
        self._blocks: list[Any] = []
        self._pending: list[list[str]] = []
        self.count = 0

    def add(self, example: Example) -> None:
        self._pending.append(words_of(compared_text(example)))
        self.count += 1
        if len(self._pending) >= CHUNK_EXAMPLES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._blocks.append(_signatures(self._pending))
            self._pending = []

    def clusters(self) -> list[int]:
        """For each example the index of the first one of its cluster (itself when it is alone)."""
        import numpy as np

        self._flush()
        if not self._blocks:
            return []
        signatures = np.concatenate(self._blocks)
        union = Union(len(signatures))
        seen: set[tuple[int, int]] = set()
        for first, second in _candidate_pairs(signatures):
            alike = (signatures[first] == signatures[second]).mean(axis=1) >= NEAR_THRESHOLD
            for pair in zip(first[alike].tolist(), second[alike].tolist(), strict=True):
                if pair not in seen:
                    seen.add(pair)
                    union.join(*pair)
        return union.roots()


def _signatures(words: list[list[str]]) -> Any:
    """Signatures of one chunk as an array of shape (examples, PERMUTATIONS)."""
    import numpy as np
    from rensa import RMinHash

    hashes = RMinHash.hash_token_sets(words)
    lengths = np.fromiter((len(row) for row in hashes), dtype=np.int64, count=len(hashes))
    flat = np.fromiter(chain.from_iterable(hashes), dtype=np.uint64, count=int(lengths.sum()))
    pairs, offsets = _word_pairs(flat, lengths)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(pairs, offsets, num_perm=PERMUTATIONS, seed=SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _word_pairs(flat: Any, lengths: Any) -> tuple[Any, Any]:
    """Hashes of neighbouring words, row by row; a row of one word keeps that word."""
    import numpy as np

    multiplier = np.uint64(0x9E3779B97F4A7C15)
    ends = np.cumsum(lengths)
    following = np.roll(flat, -1)
    last = np.zeros(len(flat), dtype=bool)
    last[ends[lengths > 0] - 1] = True
    single = np.zeros(len(flat), dtype=bool)
    single[ends[lengths == 1] - 1] = True
    paired = np.where(single, flat, flat * multiplier + following)
    kept = ~last | single
    counts = np.where(lengths > 1, lengths - 1, lengths)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    return np.ascontiguousarray(paired[kept]), offsets


def _candidate_pairs(signatures: Any) -> Iterator[tuple[Any, Any]]:
    """Per band, index pairs that agree in it: each with its neighbour and with the first of its bucket."""
    import numpy as np

    multiplier = np.uint64(0x9E3779B97F4A7C15)
    for band in range(BANDS):
        columns = signatures[:, band * BAND_WIDTH : (band + 1) * BAND_WIDTH].astype(np.uint64)
        keys = np.zeros(len(signatures), dtype=np.uint64)
        for column in columns.T:
            keys = (keys ^ column) * multiplier
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        positions = np.flatnonzero(same) + 1
        if not len(positions):
            continue
        starts = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
        yield order[positions - 1], order[positions]
        yield order[starts[positions]], order[positions]


class Union:
    """Disjoint sets over 0…n-1; the root of a set is its smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, index: int) -> int:
        parent = self._parent
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self.find(first), self.find(second)))
        self._parent[high] = low

    def roots(self) -> list[int]:
        return [self.find(index) for index in range(len(self._parent))]


def near_clusters(examples: Iterable[Example]) -> list[int]:
    """For each example the index of the first of its exact or near duplicates."""
    signatures = Signatures()
    for example in examples:
        signatures.add(example)
    return signatures.clusters()
