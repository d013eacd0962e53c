"""Rewards: what an answer is worth, as a number. PPO and the library's GRPO and RLOO all score with these.

    load_rewards(settings)  ->  [Reward]        Reward.score(prompts, completions, answers, ids)  ->  one number per answer
    require_rewards(settings)                   the same mistakes, found before any model is loaded

Three kinds, by how they are written in `reinforcement.reward`:

    name, name:argument      a built-in function, see `BUILT_IN`
    file.py:function         a function of the user, only from `reinforcement.reward_folder`
    model:FOLDER             a reward model (`reward_model.py`)

Loads no torch unless a reward model is used.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from finetuneflow.config import Reinforcement
from finetuneflow.errors import ConfigError, StorageError, TrainingError
from finetuneflow.evaluation.judges import contains_words, search_with_limit
from finetuneflow.evaluation.scores import exact_match, normalise, token_f1, words
from finetuneflow.workspace import safe_join

Prompt = Sequence[Mapping[str, Any]]  # messages: role, content, …


class EndFinder(Protocol):
    """What tells whether token ids end an answer (`inference.Ending`)."""

    def cut(self, ids: Sequence[int]) -> tuple[list[int], str, bool]: ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Answers to score, side by side: `completions` texts, `answers` the reference ones (None where a row has none),
    `ids` the drawn tokens with the end token if there is one, `rows` names of the rows for messages."""

    prompts: Sequence[Prompt]
    completions: Sequence[str]
    answers: Sequence[str | None]
    ids: Sequence[Sequence[int]]
    rows: Sequence[str]


Scorer = Callable[[Drawn], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Reward:
    """A named reward and what it counts. `score` gives the plain numbers; whoever adds rewards up applies `weight`."""

    name: str
    weight: float
    scorer: Scorer

    @property
    def label(self) -> str:
        """The name in figures: of a reward model, its folder's name alone."""
        return f"model:{Path(self.name).name}" if self.name.startswith("model:") else self.name

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        answers: Sequence[str | None],
        ids: Sequence[Sequence[int]] = (),
        *,
        rows: Sequence[str] = (),
    ) -> list[float]:
        """One finite number for each answer, or an error that names the reward and the row."""
        names = list(rows) or [f"answer {number}" for number in range(1, len(completions) + 1)]
        drawn = Drawn(prompts, completions, answers, ids or [()] * len(completions), names)
        return self._checked(self.scorer(drawn), names)

    def _checked(self, values: Any, rows: Sequence[str]) -> list[float]:
        try:
            found = list(islice(values, len(rows) + 1))  # a generator may be endless
        except TypeError:
            found = [values]
        except (Exception, SystemExit) as error:  # a generator runs only now
            raise reward_failed(self.name, f"failed: {type(error).__name__}: {str(error)[:200]}", None) from error
        if len(found) != len(rows):
            count = f"more than {len(rows)}" if len(found) > len(rows) else len(found)
            raise reward_failed(self.name, f"returned {count} values for {len(rows)} answers", None)
        for value, row in zip(found, rows, strict=True):
            if not _is_number(value):
                raise reward_failed(self.name, f"returned {_shown(value)}, which is no finite number", row)
        return [float(value) for value in found]


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except Exception:  # whatever the object of a stranger raises
        return False


def _shown(value: Any) -> str:
    try:
        return repr(str(value)[:80])
    except Exception:  # a number of too many digits, or whatever the object of a stranger raises
        return f"something of type {type(value).__name__}"


def reward_failed(name: str, what: str, row: str | None) -> TrainingError:
    return TrainingError(
        "REWARD_FAILED",
        f"The reward {name!r} {what}.",
        where=f"row {row}" if row else None,
        remedy="Correct the function so that it gives a finite number for every answer, an empty one included; `ftf resume` then goes on "
        "from the last checkpoint.",
        context={"reward": name, "row": row},
    )


# --- built-in rewards -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A reward that needs nobody's code. `make(argument)` gives the scorer; `argument` names what stands after the colon."""

    explanation: str
    make: Callable[[str], Callable[[str, str], float]]
    argument: str | None = None
    needs_answer: bool = False


def length(argument: str) -> Callable[[str, str], float]:
    target = int(argument)
    if target < 1:
        raise ValueError("the number of words must be at least 1")
    return lambda text, answer: max(0.0, 1 - abs(len(words(text)) - target) / target)


NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


def last_number(text: str) -> float | None:
    """The last number of a text; of one with a `####` line, as GSM8K marks its results, the first behind that sign.
    Commas between digits are thousands."""
    marked = text.rpartition("####")[2] if "####" in text else ""
    found = NUMBER.findall(marked)[:1] or NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "")) if found else None


def same_number(text: str, answer: str) -> float:
    found, wanted = last_number(text), last_number(answer)
    return float(found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9))


def no_repetition(text: str, answer: str) -> float:
    """Share of different ones among all sequences of three words; a text too short to repeat one counts 1."""
    spoken = words(text)
    grams = Counter(tuple(spoken[i : i + 3]) for i in range(len(spoken) - 2))
    return len(grams) / grams.total() if grams else 1.0


def matching(argument: str) -> Callable[[str, str], float]:
    re.compile(argument)
    return lambda text, answer: float(search_with_limit(argument, text) is None)


def _plain(function: Callable[[str, str], float]) -> Callable[[str], Callable[[str, str], float]]:
    return lambda argument: function


# name -> what it does; `ends` is scored from the tokens, not from the text.
BUILT_IN: dict[str, BuiltIn] = {
    "length": BuiltIn("1 at WORDS words, falling in a straight line to 0 at none and at twice as many", length, "WORDS"),
    "ends": BuiltIn("1 when the answer ended by itself, 0 when it was cut off", _plain(lambda text, answer: 0.0)),
    "contains_answer": BuiltIn(
        "1 when the expected answer stands in it as whole words",
        _plain(lambda text, answer: float(bool(words(answer)) and contains_words(text, normalise(answer)))),
        needs_answer=True,
    ),
    "exact_answer": BuiltIn(
        "1 when it is the expected answer, whatever the case, blanks and final punctuation",
        _plain(lambda text, answer: float(exact_match(text, answer))),
        needs_answer=True,
    ),
    "number": BuiltIn(
        "1 when its last number is the expected answer's (`####` marks a result)", _plain(same_number), needs_answer=True
    ),
    "similarity": BuiltIn("words shared with the expected answer (token F1, 0 to 1)", _plain(token_f1), needs_answer=True),
    "regex": BuiltIn("1 when the regular expression PATTERN is found in it", matching, "PATTERN"),
    "starts_with": BuiltIn(
        "1 when it starts with TEXT", lambda start: lambda text, answer: float(text.lstrip().startswith(start)), "TEXT"
    ),
    "ends_with": BuiltIn("1 when it ends with TEXT", lambda end: lambda text, answer: float(text.rstrip().endswith(end)), "TEXT"),
    "no_repetition": BuiltIn("share of sequences of three words that stand there only once", _plain(no_repetition)),
}


def _built_in(text: str, ending: EndFinder | None) -> Scorer:
    name, _, argument = text.partition(":")
    chosen = BUILT_IN[name]
    if bool(chosen.argument) != bool(argument):
        wanted = (
            f"is written {name}:{chosen.argument}"
            if chosen.argument
            else f"takes nothing after its name, but {argument!r} is given"
        )
        raise _invalid(text, wanted)
    if name == "ends":
        return _scored_by_end(ending)
    try:
        function = chosen.make(argument)
    except (ValueError, re.error) as error:
        raise _invalid(text, f"cannot use {argument!r}: {error}") from error

    def scorer(drawn: Drawn) -> list[float]:
        for row, answer in zip(drawn.rows, drawn.answers, strict=True):
            if chosen.needs_answer and not (answer or "").strip():
                raise reward_failed(text, "needs an expected answer, and a row has none", row)
        return [function(completion, answer or "") for completion, answer in zip(drawn.completions, drawn.answers, strict=True)]

    return scorer


def _scored_by_end(ending: EndFinder | None) -> Scorer:
    def scorer(drawn: Drawn) -> list[float]:
        if ending is None:
            raise reward_failed("ends", "has nothing that tells it how an answer ends", None)
        return [float(ending.cut(ids)[2]) for ids in drawn.ids]

    return scorer


# --- functions of the user ----------------------------------------------------------------------------


def _own_function(text: str, folder: str | None) -> Scorer:
    """A function of a file in the folder the user named; reading it runs the file."""
    file, _, name = text.rpartition(":")
    if folder is None:
        raise _invalid(text, "is a function of your own, and reinforcement.reward_folder is not set: no code is run unasked")
    root = Path(os.path.expanduser(folder))
    try:
        path = safe_join(root, file).resolve()
    except StorageError as error:
        raise _invalid(text, f"lies outside the reward folder {root}") from error
    if not path.is_file():
        raise _invalid(text, f"names {file}, which is not in the reward folder {root}")
    return _calling(text, _function_of(path, name, text))


def _function_of(path: Path, name: str, text: str) -> Callable[..., Any]:
    module_name = f"ftf_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look up the module they are in
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file that says exit must not end the run as if all were well
        raise _invalid(text, f"failed while {path.name} was read: {type(error).__name__}: {error}", where=str(path)) from error
    own: dict[str, Callable[..., Any]] = {key: value for key, value in vars(module).items() if _belongs_to(value, module_name)}
    if name not in own:
        there = ", ".join(sorted(own)) or "none"
        raise _invalid(text, f"names a function that {path.name} does not define (it defines: {there})", where=str(path))
    return own[name]


def _belongs_to(value: Any, module_name: str) -> bool:
    """Whether it can be called and was made in that module: a function, decorated or not, an object with `__call__`, a `partial`."""
    if inspect.isclass(value) or not callable(value):
        return False
    return isinstance(value, partial) or getattr(value, "__module__", None) == module_name


# A parameter's name says what it gets; the plural asks for all answers at once.
SINGLE = ("completion", "answer", "prompt")
BATCH = ("completions", "answers", "prompts")


def _calling(text: str, function: Callable[..., Any]) -> Scorer:
    """Calls `f(completion, answer=None, prompt=None)` per answer, or `f(completions, answers=None, prompts=None)` once."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise _invalid(text, "does not tell what it takes") from error
    filled = function.keywords if isinstance(function, partial) else {}
    bare = [one.replace(annotation=one.empty, default=one.empty) for one in parameters if one.name not in filled]
    accepted = [one.name for one in bare if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    wanted = next((names for names in (SINGLE, BATCH) if names[0] in accepted and set(accepted) <= set(names)), None)
    if wanted is None or len(accepted) < len(bare):
        raise _invalid(
            text,
            f"takes {inspect.Signature(bare)}; a reward function takes `completion`, and `answer` and `prompt` where it wants them, "
            "by these names (or all three in the plural, for lists)",
        )

    def call(row: str | None, values: tuple[Any, ...]) -> Any:
        try:
            return function(**{name: value for name, value in zip(wanted, values, strict=True) if name in accepted})
        except (Exception, SystemExit) as error:
            raise reward_failed(text, f"failed: {type(error).__name__}: {str(error)[:200]}", row) from error

    def scorer(drawn: Drawn) -> Sequence[Any]:
        if wanted is BATCH:
            values: Sequence[Any] = call(None, (list(drawn.completions), list(drawn.answers), list(drawn.prompts)))
            return values
        together = zip(drawn.rows, drawn.completions, drawn.answers, drawn.prompts, strict=True)
        return [call(row, (completion, answer, prompt)) for row, completion, answer, prompt in together]

    return scorer


# --- loading -------------------------------------------------------------------------------------------


def load_rewards(
    settings: Reinforcement,
    *,
    ending: EndFinder | None = None,
    open_model: Callable[[Path], Scorer] | None = None,
) -> list[Reward]:
    """The rewards that a run file names, ready to score; every mistake in them shows here.

    `ending` is needed by the reward `ends`. `open_model` opens the folder of a reward model; without one it is loaded as a
    model of its own on the CPU.
    """
    if not settings.reward:
        raise _invalid("", "is missing: name at least one in reinforcement.reward", known=True)
    weights = settings.reward_weights or [1.0] * len(settings.reward)
    if len(weights) != len(settings.reward):
        raise ConfigError(
            "CONFIG_CONFLICT",
            f"reinforcement.reward_weights has {len(weights)} values for {len(settings.reward)} rewards.",
            where="reinforcement.reward_weights",
            remedy="Give one weight for each reward, in the same order, or leave the weights out.",
        )
    scorers = [_scorer(text, settings.reward_folder, ending, open_model) for text in settings.reward]
    return [Reward(*parts) for parts in zip(settings.reward, weights, scorers, strict=True)]


def _scorer(text: str, folder: str | None, ending: EndFinder | None, open_model: Callable[[Path], Scorer] | None) -> Scorer:
    kind, _, rest = text.partition(":")
    if kind == "model" and rest:
        from finetuneflow.evaluation.reward_model import load_reward_model

        return (open_model or load_reward_model)(Path(os.path.expanduser(rest)))
    if kind in BUILT_IN:
        return _built_in(text, ending)
    if re.fullmatch(r".+\.py:\w+", text):
        return _own_function(text, folder)
    raise _invalid(text, "does not exist", known=True)


def require_rewards(settings: Reinforcement) -> None:
    """Raise for every mistake that `load_rewards` would find, reward models' weights apart: before a model is loaded.

    A file of functions is run for that, and once more for training, each time as a module of its own: nothing else can tell
    whether it works, and what it keeps at module level begins anew. Of a reward model, only names and headers are read.
    """
    load_rewards(settings, open_model=_look_at_model)


def _look_at_model(folder: Path) -> Scorer:
    """Stands in for opening a reward model where only its being there counts; it scores nothing."""
    from finetuneflow.evaluation.reward_model import reward_run, screened
    from finetuneflow.models.adapters import check_adapter_dir

    is_run = (folder / "run.yaml").is_file()
    if is_run:
        reward_run(folder)
    if is_run and not (folder / "model").is_dir():
        check_adapter_dir(folder / "adapter")
    else:
        screened(folder / "model" if is_run else folder)
    return lambda drawn: ()


def _invalid(text: str, what: str, *, where: str | None = None, known: bool = False) -> ConfigError:
    remedy = "Built-in rewards: " + ", ".join(f"{name}:{b.argument}" if b.argument else name for name, b in BUILT_IN.items())
    return ConfigError(
        "REWARD_INVALID",
        f"The reward {text!r} {what}." if text else f"A reward {what}.",
        where=where or "reinforcement.reward",
        remedy=f"{remedy}; or `file.py:function` from reinforcement.reward_folder, or `model:FOLDER` of a reward run."
        if known
        else "Correct that entry of reinforcement.reward.",
    )


# --- for the library's trainers ---------------------------------------------------------------------------


def as_trl(reward: Reward) -> Callable[..., list[float]]:
    """The reward as TRL's GRPO and RLOO trainers call it: `f(prompts, completions, **columns of the dataset)`.

    Of the columns it takes `answer` (the expected answer) and `place` (the row's name). Weights are the trainer's business.
    """

    def function(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any] = (), **columns: Any
    ) -> list[float]:
        return reward.score(
            [_messages(prompt) for prompt in prompts],
            [_text(completion) for completion in completions],
            columns.get("answer") or [None] * len(completions),
            completion_ids,
            rows=columns.get("place") or (),
        )

    function.__name__ = re.sub(r"\W+", "_", reward.label)  # the trainer names its figures after it
    return function


def _messages(prompt: Any) -> Prompt:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _text(completion: Any) -> str:
    """The text of a completion, which conversational datasets get as a list of one message."""
    return completion if isinstance(completion, str) else "".join(str(message["content"] or "") for message in completion)
