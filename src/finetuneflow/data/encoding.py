"""Text to token ids, such that text written by people can never become a control token.

Place in the flow: `templates.Template` renders, **this** encodes, `tokens.tokenize` labels.

A tokenizer recognises `<|im_end|>` wherever it stands, also inside a user's question. Here every
control token that stands in people's text is first exchanged for a *stand-in*: private-use characters
of the same length (so all positions stay right). Rendered text that holds stand-ins is encoded by a
twin of the tokenizer, whose control tokens have other names: it sees the people's `<|im_end|>` as the
plain characters it is, and merges it with its neighbours as it would any text. Text without control
tokens, nearly all of it, goes straight to the tokenizer and gives exactly its ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetuneflow.errors import DataError

# Private use, plane 16: three ranges of stand-ins. Icon fonts live in the BMP and plane 15.
_IN_TEXT = 0x100000  # a control token inside people's text
_IN_TWIN = 0x104000  # a true control token, for the twin
_MARKS = 0x108000  # turn marks (spans.py)
_RANGE = 0x4000
PRIVATE = re.compile("[\U00100000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one text, with the way from characters to tokens."""

    ids: list[int]
    _encoding: Any

    def first_token(self, char: int, limit: int) -> int:
        """Index of the first token that holds a character at or after `char` (before `limit`); number of ids if none does.

        Looks on past characters that belong to no token (spaces that a tokenizer swallows).
        """
        for position in range(char, limit):
            token = self._encoding.char_to_token(position)
            if token is not None:
                return int(token)
        return len(self.ids)

    def starts_before(self, token: int, char: int) -> bool:
        """Whether a token begins left of a character, that is, whether it straddles it."""
        if token >= len(self.ids):
            return False
        where = self._encoding.token_to_chars(token)
        return where is not None and int(where[0]) < char


class Encoder:
    """Encodes with one tokenizer. `markup` is the template's source: its own tokens count as control tokens too.

    Control tokens are the tokenizer's special tokens, and those added, not special ones (`<tool_call>`, `<think>`)
    that the template writes. The latter stay what they are in an assistant's turn: the model has to produce them.
    """

    def __init__(self, tokenizer: Any, markup: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                "TOKENIZER_UNSUPPORTED",
                f"The tokenizer {type(tokenizer).__name__} has no fast form, so characters cannot be traced to tokens.",
                remedy="Save it as tokenizer.json (transformers converts SentencePiece and BPE files) and load that.",
            )
        self._backend = backend
        self.special: dict[str, int] = {}
        self.written: dict[str, int] = {}
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                self.special[token.content] = int(token_id)
            elif token.content.strip() and token.content in markup:
                self.written[token.content] = int(token_id)
        self.control = {**self.special, **self.written}
        self.added = {str(token.content): int(token_id) for token_id, token in tokenizer.added_tokens_decoder.items()}
        if len(self.control) > _RANGE:
            raise DataError("TOKENIZER_UNSUPPORTED", f"The tokenizer has more than {_RANGE:,} control tokens.")
        self._number = {content: number for number, content in enumerate(self.control)}
        self._in_people = _any_of(self.control)
        self._in_assistant = _any_of(self.special)
        self._content = {chr(_IN_TEXT + number): content for content, number in self._number.items()}

    def protect(self, text: str, *, assistant: bool) -> str:
        """The text with each control token in it exchanged for its stand-in, character for character."""
        pattern = self._in_assistant if assistant else self._in_people
        return pattern.sub(lambda found: chr(_IN_TEXT + self._number[found[0]]) * len(found[0]), text)

    def restore(self, text: str) -> str:
        """The text as people wrote it: stand-ins back to the characters they stand for."""
        return _STAND_INS.sub(lambda found: _restored(found[0], self._content), text)

    def is_protected(self, text: str) -> bool:
        return _STAND_INS.search(text) is not None

    def encode(self, text: str) -> Encoded:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode rendered texts (no special tokens are added); those with stand-ins go to the twin.

        Raises DataError TEXT_FORGES_CONTROL when a tokenizer makes a control token even out of plain characters.
        """
        plain = [number for number, text in enumerate(texts) if not self.is_protected(text)]
        results: list[Encoded | None] = [None] * len(texts)
        self._reset(self._backend)
        for number, encoding in zip(
            plain, self._backend.encode_batch([texts[n] for n in plain], add_special_tokens=False), strict=True
        ):
            results[number] = Encoded(encoding.ids, encoding)
        return [self._encode_with_twin(text) if done is None else done for text, done in zip(texts, results, strict=True)]

    @staticmethod
    def _reset(backend: Any) -> None:
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()

    def _encode_with_twin(self, text: str) -> Encoded:
        twin, true_ids = self._twin
        named = self._in_people.sub(lambda found: self._name_in_twin(found[0]), text)
        encoding = twin.encode(self.restore(named), add_special_tokens=False)
        forbidden = set(self.control.values())
        if any(token_id in forbidden and token_id not in true_ids for token_id in encoding.ids):
            raise DataError(
                "TEXT_FORGES_CONTROL",
                "The text holds the name of a control token, and this tokenizer cannot write that name as plain text.",
                remedy="Remove the name from the text, or put a space inside it.",
            )
        return Encoded([true_ids.get(token_id, token_id) for token_id in encoding.ids], encoding)

    @cached_property
    def _twin(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with renamed control tokens, and the way from its ids of added tokens to the true ones.

        A renamed token that stood in the model's vocabulary gets a new id, and those added after it move up.
        """
        from tokenizers import Tokenizer

        description = json.loads(self._backend.to_str())
        description["truncation"] = description["padding"] = None
        for token in description["added_tokens"]:
            token["content"] = self._name_in_twin(token["content"])
        twin: Any = Tokenizer.from_str(json.dumps(description))
        true_ids = {twin.token_to_id(self._name_in_twin(content)): true for content, true in self.added.items()}
        return twin, true_ids

    def _name_in_twin(self, content: str) -> str:
        number = self._number.get(content)
        return content if number is None else chr(_IN_TWIN + number) * len(content)


_STAND_INS = re.compile("[\U00100000-\U00103fff]+")


def _restored(run: str, content: dict[str, str]) -> str:
    """A run of stand-ins back to text: each token's sign is repeated as often as the token has characters."""
    pieces, position = [], 0
    while position < len(run):
        token = content[run[position]]
        if run[position : position + len(token)] != run[position] * len(token):
            raise DataError("TEXT_FORGES_CONTROL", "The chat template cuts through the name of a control token in the text.")
        pieces.append(token)
        position += len(token)
    return "".join(pieces)


def _any_of(contents: dict[str, int]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark(number: int) -> str:
    """The sign that closes turn `number` in a marked rendering; `mark(-number - 1)` opens it."""
    return chr(_MARKS + 2 * number) if number >= 0 else chr(_MARKS + 2 * (-number - 1) + 1)


MAX_TURNS = 0x3FFF
MARK = re.compile("[\U00108000-\U0010ffff]")
