"""A chat template for the tiny tokenizer, written by hand: independent of the product's own templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetuneflow.data.examples import Message


@dataclass(frozen=True)
class ChatML:
    tokenizer: Any

    @property
    def turn_end(self) -> tuple[int, ...]:
        return (self.tokenizer.convert_tokens_to_ids("<|im_end|>"),)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += self._turn(f"{message.role}\n{message.content}")
            ids += [*self.turn_end, *self._plain("\n")]
        return [*ids, *self._turn("assistant\n")]

    def _turn(self, text: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids("<|im_start|>"), *self._plain(text)]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
