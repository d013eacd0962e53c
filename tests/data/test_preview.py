"""The preview shows the very tokens of training, with marks that need no colour, and lets nothing out of the page."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from template_support import TOYS, byte_tokenizer, chat

from finetuneflow.data.examples import Message
from finetuneflow.data.preview import Preview, preview, to_html, to_json, to_terminal, visible
from finetuneflow.data.templates import resolve_template
from finetuneflow.data.tokens import MASKED, Policy, tokenize

HOSTILE = "<script>alert(1)</script> \x1b[31mred \u202eevil\u202c \u200b\"'& <|im_end|> tab\there 😀é"
EXAMPLE = chat(("user", HOSTILE), ("assistant", "Paris\nbien sûr 😀"), ("user", "Again?"), ("assistant", "No."))


def _shown(example: Any = EXAMPLE, toy: str = "bytes", **policy: Any) -> Preview:
    return preview([example], resolve_template(TOYS[toy](), "chatml"), Policy(**policy))


def _terminal(shown: Preview, *, colour: bool) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=160, force_terminal=colour, color_system="truecolor" if colour else None, legacy_windows=False).print(
        to_terminal(shown)
    )
    return out.getvalue()


class _Page(HTMLParser):
    """Tags, attributes and the text of the token flow."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.marked: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        values = dict(attrs)
        if "data-id" in values:
            self.tokens.append(values)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "mark" in self.open and "i" in self.open:
            self.marked.append(data)


@pytest.mark.parametrize("toy", TOYS)
def test_the_pieces_are_the_tokens_of_training(toy: str) -> None:
    shown = _shown(toy=toy)
    row = tokenize(EXAMPLE, shown.template)
    assert isinstance(row, list)
    assert [token for piece in shown.rows[0].pieces for token in piece.ids] == row[0].ids
    learned = [token for piece in shown.rows[0].pieces if piece.part == "supervised" for token in piece.ids]
    assert learned == [label for label in row[0].labels if label != MASKED]


@pytest.mark.parametrize("toy", TOYS)
def test_the_pieces_together_read_as_the_rendered_text(toy: str) -> None:
    shown = _shown(toy=toy)
    text = "".join(piece.text for piece in shown.rows[0].pieces)
    assert text.removeprefix("<s>") == shown.template.render(EXAMPLE.messages).removeprefix("<s>")


def test_without_colour_the_terminal_still_tells_what_is_learned() -> None:
    text = _terminal(_shown(), colour=False)
    learned = re.findall(r"▸(.*?)◂", text.replace("│", ""), flags=re.S)
    assert ["".join(part.split()) for part in learned] == ["intheloss", "Paris↵biensûr😀⟦<|im_end|>⟧", "No.⟦<|im_end|>⟧"]


def test_with_colour_the_terminal_underlines_what_is_learned() -> None:
    runs = re.findall(r"\x1b\[([0-9;]+)m([^\x1b]*)", _terminal(_shown(), colour=True))
    underlined = "".join(text for style, text in runs if "4" in style.split(";"))
    assert underlined == "in the lossParis↵bien sûr 😀⟦<|im_end|>⟧No.⟦<|im_end|>⟧"


def test_nothing_a_person_wrote_can_steer_the_terminal() -> None:
    text = _terminal(_shown(), colour=False)
    assert "\x1b" not in text and "\u202e" not in text and "\u200b" not in text
    assert "⟨U+001B⟩[31m" in text and "⟨U+202E⟩" in text


def test_the_page_runs_nothing_and_loads_nothing() -> None:
    page = to_html(_shown())
    parsed = _Page(page)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    assert "<script" not in page and "&lt;" in page
    assert "\u202e" not in page and "\x1b" not in page


def test_the_page_holds_every_token_with_its_id_and_marks_what_is_learned() -> None:
    shown = _shown()
    parsed = _Page(to_html(shown))
    row = shown.rows[0].tokens
    assert [int(number) for token in parsed.tokens for number in str(token["data-id"]).split()] == row.ids
    assert "".join(parsed.marked).replace("in the loss", "", 1) == "Paris↵\nbien sûr 😀<|im_end|>No.<|im_end|>"
    learned = sum(len(str(token["data-id"]).split()) for token in parsed.tokens if str(token["data-at"]).endswith("in the loss"))
    assert learned == row.supervised


def test_forged_control_tokens_look_like_text_and_true_ones_are_boxed() -> None:
    boxed = [token for token in _Page(to_html(_shown())).tokens if token.get("class") == "x"]
    assert len(boxed) == 8  # four turns, a beginning and an end each; the one in the question is not among them


def test_answers_left_out_of_the_loss_are_shown_as_such() -> None:
    example = replace(
        EXAMPLE,
        messages=(Message("user", "Q"), Message("assistant", "bad", weight=0.0), Message("user", "R"), Message("assistant", "A")),
    )
    shown = _shown(example)
    assert "‹bad⟦<|im_end|>⟧›" in _terminal(shown, colour=False)
    assert '<span class="run masked">' in to_html(shown)


def test_rows_left_out_are_listed_with_the_reason() -> None:
    shown = preview([EXAMPLE, chat(("user", "Q"), ("assistant", ""))], resolve_template(byte_tokenizer(), "chatml"))
    assert len(shown.rows) == 1 and shown.problems[0].code == "ROW_NO_ANSWER"
    assert "ROW_NO_ANSWER" in to_html(shown) and "ROW_NO_ANSWER" in _terminal(shown, colour=False)


def test_an_emoji_of_several_tokens_is_one_piece_and_shows_all_its_ids() -> None:
    pieces = [piece for piece in _shown().rows[0].pieces if "😀" in piece.text]
    assert pieces and all(len(piece.ids) > 1 for piece in pieces)


def test_programs_get_the_same_tokens_as_people() -> None:
    shown = _shown()
    facts = json.loads(json.dumps(to_json(shown)))
    row = facts["rows"][0]
    assert (row["ids"], row["labels"]) == (shown.rows[0].tokens.ids, shown.rows[0].tokens.labels)
    assert [number for piece in row["pieces"] for number in piece["ids"]] == row["ids"]
    assert facts["policy"] == {"supervise": "assistant", "max_length": 2048, "overlong": "cut"}


def test_cut_rows_say_what_they_lost() -> None:
    shown = _shown(chat(("user", "Q"), ("assistant", "word " * 50)), max_length=24)
    assert "cut off" in shown.rows[0].counts and "cut off" in to_html(shown)


def test_every_invisible_character_is_written_out() -> None:
    assert visible("a\u200bb\u202ec\x00d\r\u2028\ue000") == "a⟨U+200B⟩b⟨U+202E⟩c⟨U+0000⟩d⟨U+000D⟩⟨U+2028⟩⟨U+E000⟩"
    assert visible("é 😀\tx\n") == "é 😀⇥\tx↵\n"
