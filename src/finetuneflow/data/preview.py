"""What the model will see, for people: every token with its part in the loss, in the terminal and as one HTML file.

Place in the flow: `ftf data preview` shows rows of `tokens.tokenize`, the function that training uses.
No sign rests on colour alone: tokens in the loss are underlined and stand between ▸ and ◂, control tokens are boxed,
answers kept out of the loss are struck with stripes (HTML) or stand between ‹ and › (terminal).
The page holds no script and loads nothing; whatever people wrote is escaped, and characters that cannot be seen or that
turn the text around are written out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from finetuneflow.data.examples import Example, Problem
from finetuneflow.data.forms import Form, Sides, tokenize_prompts, tokenize_sides
from finetuneflow.data.templates import Template
from finetuneflow.data.tokens import MASKED, Policy, Tokens, tokenize

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

Part = Literal["supervised", "context", "masked"]  # in the loss | the prompt | an answer kept out of the loss


@dataclass(frozen=True, slots=True)
class Piece:
    """One or more tokens that make whole characters together (an emoji may take four tokens).

    `text` is what they write; `special` says it is a control token.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    text: str
    part: Part
    special: bool
    position: int


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One training row, or one side of a pair, ready to be shown. `side`: chosen, rejected, good, bad, prompt or nothing.

    `prompt_length`: leading tokens that both sides of a pair share.
    """

    tokens: Tokens
    pieces: tuple[Piece, ...]
    side: str = ""
    prompt_length: int | None = None

    @property
    def title(self) -> str:
        part = f", part {self.tokens.part + 1}" if self.tokens.part else ""
        return (f"{self.side} · " if self.side else "") + f"{self.tokens.place}{part}"  # first: a long path is cut at its end

    @property
    def counts(self) -> str:
        row = self.tokens
        if self.side == "prompt":
            cut = f" · {row.lost_tokens:,} cut off at the beginning" if row.lost_tokens else ""
            return f"{len(row.ids):,} tokens · the model answers itself{cut}"
        words = [f"{len(row.ids):,} tokens", f"{row.supervised:,} in the loss ({row.supervised / max(1, len(row.ids)):.0%})"]
        words.append(f"{row.turn_ends} turn-end{'s' if row.turn_ends != 1 else ''} learned")
        if row.lost_tokens:
            words.append(f"{row.lost_tokens:,} cut off, {row.lost_answer_tokens:,} of them answer")
        if self.prompt_length is not None:
            words.append(f"{self.prompt_length:,} tokens of prompt shared")
        if row.unlocated:
            words.append(f"{row.unlocated} empty or unfound answers left out")
        return " · ".join(words)


@dataclass(frozen=True, slots=True)
class Preview:
    """A few rows of a dataset as the model will see them, with what belongs to all of them."""

    rows: tuple[PreviewRow, ...]
    problems: tuple[Problem, ...]
    template: Template
    policy: Policy
    form: Form = "supervised"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What decided these tokens, as (name, value)."""
        learned = {"assistant": "every assistant turn", "last": "the last assistant turn", "all": "every token"}
        return [
            (
                "Template",
                self.template.name if self.template.origin == "tokenizer" else f"{self.template.name} ({self.template.origin})",
            ),
            ("Digest", self.template.digest[:12]),
            ("End of a turn", f"{self.template.stop or 'none'} = {list(self.template.turn_end)}"),
            ("In the loss", learned[self.policy.supervise] if self.form == "supervised" else _LEARNED[self.form]),
            ("Longest row", f"{self.policy.max_length:,} tokens, else {self.policy.overlong}"),
        ]


_LEARNED: dict[Form, str] = {
    "pair": "the ending of each side",
    "rated": "the last answer",
    "prompt": "nothing: the model answers itself",
}


def preview(
    examples: Iterable[Example],
    template: Template,
    policy: Policy = Policy(),  # noqa: B008 - frozen
    form: Form = "supervised",
) -> Preview:
    """Tokenize the given examples for show, in the form they are trained in."""
    rows: list[PreviewRow] = []
    problems: list[Problem] = []
    for example in examples:
        result = _tokenized(example, template, policy, form)
        if isinstance(result, Problem):
            problems.append(result)
        else:
            rows.extend(result)
    return Preview(tuple(rows), tuple(problems), template, policy, form)


def _tokenized(example: Example, template: Template, policy: Policy, form: Form) -> list[PreviewRow] | Problem:
    if form == "supervised":
        rows = tokenize(example, template, policy)
        return rows if isinstance(rows, Problem) else [_shown(row, template) for row in rows]
    if form == "prompt":
        prompt = next(tokenize_prompts([example], template, policy))
        return prompt if isinstance(prompt, Problem) else [_shown(prompt.row, template, "prompt")]
    sides = next(tokenize_sides([example], template, policy))
    if isinstance(sides, Problem):
        return sides
    names = ("chosen", "rejected") if form == "pair" else ("good" if example.label else "bad",)
    return [_shown(row, template, name, sides) for row, name in zip(sides.rows, names, strict=True)]


def _shown(tokens: Tokens, template: Template, side: str = "", sides: Sides | None = None) -> PreviewRow:
    return PreviewRow(tokens, tuple(_pieces(tokens, template)), side, sides.prompt_length if sides else None)


# Tokens -> pieces --------------------------------------------------------------------------------------------------------


def _pieces(tokens: Tokens, template: Template) -> Iterable[Piece]:
    """Tokens in groups that decode to whole characters, at most four to a group."""
    parts = _parts(tokens)
    control = set(template.encoder.control.values()) | set(template.tokenizer.all_special_ids)
    decode = _Decoder(template.tokenizer)
    position = 0
    while position < len(tokens.ids):
        size = 1
        text = decode(tokens.ids[position : position + 1])
        while "\ufffd" in text and size < 4 and _joins(parts, control, tokens.ids, position + size):
            size += 1
            text = decode(tokens.ids[position : position + size])
        if "\ufffd" in text:
            size, text = 1, decode(tokens.ids[position : position + 1])
        ids = tuple(tokens.ids[position : position + size])
        names = tuple(str(name) for name in template.tokenizer.convert_ids_to_tokens(list(ids)))
        yield Piece(ids, names, text, parts[position], ids[0] in control, position)
        position += size


def _parts(tokens: Tokens) -> list[Part]:
    parts: list[Part] = ["context" if label == MASKED else "supervised" for label in tokens.labels]
    for span in tokens.spans:
        if span.kind == "masked":
            parts[span.start : span.end] = ["masked"] * (span.end - span.start)
    return parts


def _joins(parts: Sequence[Part], control: set[int], ids: Sequence[int], position: int) -> bool:
    """Whether the token at `position` may be shown together with the one before it."""
    return position < len(ids) and parts[position] == parts[position - 1] and ids[position] not in control


class _Decoder:
    """Text of a few tokens in the middle of a text: decoders treat the first token of a text otherwise (its space goes)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer.encode("a", add_special_tokens=False))
        self._before = self._decode([])

    def __call__(self, ids: Sequence[int]) -> str:
        return self._decode(ids)[len(self._before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        together = [*self._anchor, *ids]
        return str(self._tokenizer.decode(together, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def visible(text: str) -> str:
    """Text in which every character can be seen: line ends, tabs, control, invisible and direction characters are written out."""
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if char == "\n":
        return "↵\n"
    if char == "\t":
        return "⇥\t"
    if unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(char):04X}⟩"
    return char


# Terminal ----------------------------------------------------------------------------------------------------------------

_TERMINAL: dict[Part, str] = {"supervised": "bold underline green", "context": "dim", "masked": "italic yellow"}


def to_terminal(shown: Preview) -> Group:
    """A rich renderable. Readable without colours too: ▸answer in the loss◂, ‹answer left out›, ⟦control token⟧."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, value in shown.facts:
        facts.add_row(Text(name, style="bold"), Text(value))
    parts: list[Any] = [facts, *(Text(f"note: {note}", style="cyan") for note in shown.template.notes), _legend(), Text()]
    for row in shown.rows:
        parts.append(
            Panel(_row_text(row), title=Text(row.title), title_align="left", subtitle=Text(row.counts), subtitle_align="left")
        )
    for problem in shown.problems:
        parts.append(
            Text.assemble(
                ("left out ", "bold red"), f"{problem.place}: {problem.code}: {visible(problem.found)} ", (problem.hint, "dim")
            )
        )
    return Group(*parts)


def _legend() -> Text:
    from rich.text import Text

    return Text.assemble(
        "▸", ("in the loss", _TERMINAL["supervised"]), "◂   ", ("context", _TERMINAL["context"]), "   ‹",
        ("answer left out", _TERMINAL["masked"]), "›   ", ("⟦control token⟧", "reverse"),
    )  # fmt: skip


def _row_text(row: PreviewRow) -> Text:
    from rich.text import Text

    signs: dict[Part, tuple[str, str]] = {"supervised": ("▸", "◂"), "context": ("", ""), "masked": ("‹", "›")}
    text = Text(overflow="fold")
    before: Part = "context"
    for piece in row.pieces:
        if piece.part != before:
            text.append(signs[before][1] + signs[piece.part][0])
        shown = visible(piece.text)
        style = _TERMINAL[piece.part]
        if piece.special:
            text.append(f"⟦{shown}⟧", style=f"{style} reverse")
        else:
            text.append(shown, style=style)
        before = piece.part
    text.append(signs[before][1])
    return text


# JSON --------------------------------------------------------------------------------------------------------------------


def to_json(shown: Preview) -> dict[str, Any]:
    """The same for programs: per row ids, labels, and the pieces with their part; the rows left out; what decided the tokens."""
    return {
        "template": {"name": shown.template.name, "origin": shown.template.origin, "digest": shown.template.digest},
        "turn_end": list(shown.template.turn_end),
        "notes": list(shown.template.notes),
        "policy": asdict(shown.policy),
        "form": shown.form,
        "rows": [_row_json(row) for row in shown.rows],
        "problems": [{"place": str(p.place), "code": p.code, "found": p.found, "hint": p.hint} for p in shown.problems],
    }


def _row_json(row: PreviewRow) -> dict[str, Any]:
    return {
        "place": row.title,
        "ids": row.tokens.ids,
        "labels": row.tokens.labels,
        "supervised": row.tokens.supervised,
        **({"side": row.side} if row.side else {}),
        **({"prompt_length": row.prompt_length} if row.prompt_length is not None else {}),
        "lost_tokens": row.tokens.lost_tokens,
        "pieces": [{"ids": list(p.ids), "text": p.text, "part": p.part, "control": p.special} for p in row.pieces],
    }


# HTML --------------------------------------------------------------------------------------------------------------------


def to_html(shown: Preview, *, title: str = "What the model will see") -> str:
    """One page that needs nothing else: no script, no font, no picture from elsewhere; light and dark."""
    rows = "\n".join(_html_row(row, number) for number, row in enumerate(shown.rows))
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(visible(value))}</dd></div>" for name, value in shown.facts)
    notes = "".join(f"<li>{escape(note)}</li>" for note in shown.template.notes)
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        summary=escape(_summary(shown)),
        facts=facts,
        notes=f'<ul class="notes">{notes}</ul>' if notes else "",
        legend=_LEGEND,
        rows=rows,
        problems=_html_problems(shown.problems),
    )


def _summary(shown: Preview) -> str:
    tokens = sum(len(row.tokens.ids) for row in shown.rows)
    supervised = sum(row.tokens.supervised for row in shown.rows)
    share = f"{supervised / tokens:.0%}" if tokens else "0%"
    left_out = f" {len(shown.problems)} left out." if shown.problems else ""
    return f"{len(shown.rows)} rows, {tokens:,} tokens, {supervised:,} of them in the loss ({share}).{left_out}"


def _html_row(row: PreviewRow, number: int) -> str:
    share = row.tokens.supervised / max(1, len(row.tokens.ids))
    runs = "".join(_html_run(part, pieces) for part, pieces in _runs(row.pieces))
    return (
        f'<article aria-labelledby="r{number}"><header><h2 id="r{number}">{escape(row.title)}</h2>'
        f'<meter min="0" max="1" value="{share:.4f}" aria-label="share of tokens in the loss">{share:.0%}</meter>'
        f"<p>{escape(row.counts)}</p></header>"
        f'<div class="text" dir="ltr">{runs}</div>{_html_table(row)}</article>'
    )


def _runs(pieces: Sequence[Piece]) -> Iterable[tuple[Part, list[Piece]]]:
    run: list[Piece] = []
    for piece in pieces:
        if run and run[-1].part != piece.part:
            yield run[-1].part, run
            run = []
        run.append(piece)
    if run:
        yield run[-1].part, run


_SPOKEN: dict[Part, str] = {"supervised": "in the loss: ", "context": "context: ", "masked": "left out of the loss: "}


def _html_run(part: Part, pieces: Sequence[Piece]) -> str:
    tokens = "".join(_html_piece(piece) for piece in pieces)
    spoken = f'<span class="sr">{_SPOKEN[part]}</span>'
    return (
        f'<mark class="run">{spoken}{tokens}</mark>'
        if part == "supervised"
        else f'<span class="run {part}">{spoken}{tokens}</span>'
    )


def _html_piece(piece: Piece) -> str:
    ids = " ".join(str(token_id) for token_id in piece.ids)
    names = " ".join(visible(name).replace("\n", "") for name in piece.names)
    fate = {"supervised": "in the loss", "context": "context", "masked": "left out"}[piece.part]
    where = f"#{piece.position} · {'control · ' if piece.special else ''}{fate}"
    kind = ' class="x"' if piece.special else ""
    return (
        f'<b{kind} data-id="{ids}" data-name="{escape(names)}" data-at="{where}"><i>{escape(visible(piece.text)) or "∅"}</i></b>'
    )


def _html_table(row: PreviewRow) -> str:
    lines = "".join(
        f"<tr><td>{piece.position}</td><td>{' '.join(map(str, piece.ids))}</td><td><code>{escape(visible(piece.text))}</code></td>"
        f"<td>{_SPOKEN[piece.part].rstrip(': ')}{', control token' if piece.special else ''}</td></tr>"
        for piece in row.pieces
    )
    return (
        "<details><summary>Tokens as a table</summary><div class='scroll'><table><thead><tr><th scope='col'>#</th><th scope='col'>id</th>"
        f"<th scope='col'>text</th><th scope='col'>part</th></tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _html_problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return ""
    items = "".join(
        f"<li><strong>{escape(str(p.place))}</strong> <code>{escape(p.code)}</code> {escape(visible(p.found))} <em>{escape(p.hint)}</em></li>"
        for p in problems
    )
    return f'<section class="problems"><h2>Left out</h2><ul>{items}</ul></section>'


_LEGEND = (
    '<ul class="legend" aria-label="Legend">'
    '<li><mark class="run"><b><i>in the loss</i></b></mark> underlined, between ▸ and ◂: the model learns to write it</li>'
    '<li><span class="run context"><b><i>context</i></b></span> plain: the model reads it</li>'
    '<li><span class="run masked"><b><i>left out</i></b></span> striped: an answer that is not trained on</li>'
    '<li><span class="run context"><b class="x"><i>&lt;|control|&gt;</i></b></span> boxed: one control token</li>'
    "</ul>"
)

_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1c1d21;--soft:#5d616b;--line:#e4e1d9;--learn:#0b6b4f;--learn-bg:#dff3ea;
--box:#5b4bb8;--box-bg:#efecff;--stripe:#f0d3a4;--bad:#a12626}
@media (prefers-color-scheme:dark){:root{--paper:#131417;--card:#1b1d21;--ink:#e8e8ea;--soft:#a3a7b2;--line:#2f3238;--learn:#6fe0b5;
--learn-bg:#143a2e;--box:#b9aeff;--box-bg:#2a2650;--stripe:#4d3b1f;--bad:#ff9a9a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.25rem 5rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.015em}
.summary{color:var(--soft);margin:0 0 1.5rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.9rem 1.25rem;margin:0 0 1rem;padding:1rem 1.15rem;background:var(--card);
border:1px solid var(--line);border-radius:.75rem}
dt{font-size:.75rem;color:var(--soft)}dd{margin:0;font-size:.92rem;overflow-wrap:anywhere}
.notes{margin:0 0 1rem;padding-left:1.2rem;color:var(--soft);font-size:.92rem}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;margin:0 0 2rem;padding:0;font-size:.88rem;color:var(--soft)}
article{background:var(--card);border:1px solid var(--line);border-radius:.75rem;margin:0 0 1.5rem;padding:1.1rem 1.25rem 1rem}
article header{display:grid;grid-template-columns:1fr auto;gap:.1rem 1rem;align-items:center;margin-bottom:.9rem}
h2{font-size:1rem;margin:0;overflow-wrap:anywhere}article header p{grid-column:1/-1;margin:0;color:var(--soft);font-size:.88rem}
meter{width:9rem;height:.7rem}
.text{font:.95rem/2.05 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.run{color:inherit;background:none}
b{font-weight:inherit;position:relative;border-radius:.2rem}
b i{font-style:inherit;unicode-bidi:isolate}
.text b:nth-of-type(even){background:color-mix(in srgb,var(--ink) 4%,transparent)}
.context{color:var(--soft)}
mark.run b{background:var(--learn-bg);color:var(--ink);text-decoration:underline solid var(--learn) 2px;text-underline-offset:.28em;padding:.12em 0}
mark.run b:nth-of-type(even){background:color-mix(in srgb,var(--learn-bg) 72%,var(--card))}
mark.run::before,mark.run::after{color:var(--learn);font-weight:700}
mark.run::before{content:"▸"}mark.run::after{content:"◂"}
.masked{color:var(--soft)}
.text .masked b,.legend .masked b{background:repeating-linear-gradient(135deg,var(--stripe) 0 2px,transparent 2px 9px);border-bottom:2px dotted var(--soft)}
b.x{display:inline-block;line-height:1.35;border:1.5px solid var(--box);background:var(--box-bg)!important;color:var(--box)!important;font-weight:600;font-size:.86em;padding:.08em .3em;margin:0 .1em;
border-radius:.35rem}
.text b:hover{outline:2px solid var(--ink);z-index:2}
.text b:hover::after{content:"id " attr(data-id) "\\A" attr(data-name) "\\A" attr(data-at);white-space:pre;position:absolute;left:0;top:calc(100% + .35rem);z-index:3;
padding:.4rem .65rem;background:var(--ink);color:var(--paper);border-radius:.4rem;font:.8rem/1.45 ui-monospace,Menlo,Consolas,monospace;text-decoration:none;
pointer-events:none;box-shadow:0 4px 18px #0004;max-width:20rem;overflow:hidden}
details{margin-top:.9rem;font-size:.88rem}summary{cursor:pointer;color:var(--soft)}
.scroll{max-height:24rem;overflow:auto;margin-top:.5rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.2rem .8rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td:nth-child(-n+2){font-variant-numeric:tabular-nums;color:var(--soft)}td code{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.problems{border-left:3px solid var(--bad);padding-left:1rem}.problems ul{padding-left:1.1rem}.problems em{color:var(--soft);font-style:normal}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
:focus-visible{outline:2px solid var(--learn);outline-offset:2px}
@media print{.text b:hover::after{display:none}body{background:none}}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="summary">{summary}</p>
<dl>{facts}</dl>
{notes}
{legend}
{rows}
{problems}
</main>
</body>
</html>
"""
