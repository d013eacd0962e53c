"""Reward functions of every make: what can be called is called, and what cannot is one error before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuneflow.config import Reinforcement
from finetuneflow.errors import ConfigError, FineTuneFlowError, TrainingError
from finetuneflow.evaluation.rewards import Reward, load_rewards

FILE = """
import functools, itertools
from math import sqrt

def doubled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)
    return wrapper

def base(completion, weight): return weight * len(completion)
@functools.lru_cache
def cached(completion, answer=None): return len(completion)
@doubled
def wrapped(completion): return len(completion)
class Pay:
    def __call__(self, completion): return len(completion)
pay = Pay()
weighted = functools.partial(base, weight=3)

def endless(completions): return itertools.count()
def leaving(completions):
    yield 1.0
    raise SystemExit(0)
def placed(completion, /): return 1.0
def starred(*completion): return 1.0
def keyed(completion, **rest): return 1.0
unknown = functools.partial(max)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(FILE)
    return tmp_path


def own(folder: Path, name: str) -> Reward:
    (found,) = load_rewards(Reinforcement(reward=[f"own.py:{name}"], reward_folder=str(folder)))
    return found


@pytest.mark.parametrize(("name", "value"), [("cached", 4.0), ("wrapped", 8.0), ("pay", 4.0), ("weighted", 12.0)])
def test_whatever_can_be_called_by_its_parameters_is_a_reward(folder: Path, name: str, value: float) -> None:
    assert own(folder, name).score([[]], ["four"], [None]) == [value]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("placed", "takes (completion, /); a reward function takes `completion`"),
        ("starred", "takes (*completion)"),
        ("keyed", "takes (completion, **rest)"),
        ("base", "takes (completion, weight)"),
        ("unknown", "does not tell what it takes"),
        ("Pay", "does not define"),
        ("sqrt", "does not define"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused_with_what_it_takes(folder: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        own(folder, name)
    assert caught.value.code == "REWARD_INVALID" and words in caught.value.message


@pytest.mark.parametrize(("name", "words"), [("endless", "more than 2 values for 2 answers"), ("leaving", "SystemExit")])
def test_a_generator_that_does_not_end_well_is_an_error(folder: Path, name: str, words: str) -> None:
    with pytest.raises(TrainingError) as caught:
        own(folder, name).score([[]] * 2, ["a", "b"], [None] * 2)
    assert caught.value.code == "REWARD_FAILED" and words in caught.value.message


@pytest.mark.parametrize(
    "settings", [{"reward": ["own.py:pay"], "reward_folder": "~nosuchuser/x"}, {"reward": ["model:~nosuchuser/x"]}]
)
def test_the_home_of_nobody_is_a_folder_that_is_not_there(settings: dict[str, object]) -> None:
    with pytest.raises(FineTuneFlowError):
        load_rewards(Reinforcement(**settings))
