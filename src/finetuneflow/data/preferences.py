"""Preferences out of ratings: which answers make a pair, which are good or bad, and what a set of them invites.

Place in the flow: `examples.to_examples` -> **preferences** -> splitting, then `forms`.

Rated answers to one prompt (siblings in a tree, rows of equal prompt, lists of scored answers) become pairs; for the rated
form each gets a label, and pairs part into a good and a bad answer. The tallies find what teaches the wrong thing: answers
preferred for their length, pairs that contradict each other, far more good answers than bad ones.
"""

from __future__ import annotations

import statistics
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetuneflow.data.examples import Example, Message, Problem, endings_of, prompt_of
from finetuneflow.data.forms import Form, Sides, reference_answer
from finetuneflow.data.similarity import answer_key, exact_key, prompt_key
from finetuneflow.data.spool import Spool
from finetuneflow.knowledge.run_warnings import WARNINGS

if TYPE_CHECKING:
    from finetuneflow.config import Data

# A problem with one of these codes is no fault of the row: it is set aside, and does not count against the threshold.
SET_ASIDE = frozenset({"ROW_NO_PARTNER", "ROW_NO_PREFERENCE"})
LENGTH_RATIO = 1.5  # beyond this (or its inverse), a model can win by length alone
# KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.2: weight_good * n_good / (weight_bad * n_bad) within 1 to 4/3.
KTO_BALANCE = (1.0, 4 / 3)


@dataclass(frozen=True, slots=True)
class Pairing:
    """How ratings become pairs or labels.

    `pairs`: the best answer against each other one (widest gap first), or each answer against the next worse.
    `good_rating`: the rating from which an answer is good; None: the median of all.
    """

    min_rating_gap: float = 0.0
    good_rating: float | None = None
    pairs: Literal["best", "adjacent"] = "best"
    max_pairs_per_prompt: int = 4

    @classmethod
    def of(cls, data: Data) -> Pairing:
        """As a run file's section says."""
        return cls(data.min_rating_gap, data.good_rating, data.rating_pairs, data.max_pairs_per_prompt)


class FormReader:
    """Turns examples into those a form is made from. `facts` tells afterwards what became of ratings."""

    def __init__(self, form: Form, pairing: Pairing = Pairing(), *, folder: Path | None = None) -> None:
        self.facts: dict[str, Any] = {}
        self._form = form
        self._pairing = pairing
        self._halves: set[int] = set()
        self._folder = folder or Path(tempfile.gettempdir())

    def read(self, items: Iterable[Example | Problem]) -> Iterator[Example | Problem]:
        """Examples and problems in order; what ratings make comes last, as all of them must be known first."""
        if self._form not in ("pair", "rated"):
            yield from self._asked_once(items) if self._form == "prompt" else items
            return
        ranked, rated = Spool(self._folder), Spool(self._folder)  # the former are known by their order alone
        for item in items:
            if isinstance(item, Problem) or item.kind != "chat" or item.rating is None:
                yield from self._direct(item)
            elif self._form == "pair" or "ranked_only" in item.notes:
                ranked.append(item)
            else:
                rated.append(item)
        for item in self._paired(ranked):
            yield from self._direct(item)
        yield from self._labelled(rated)

    def _asked_once(self, items: Iterable[Example | Problem]) -> Iterator[Example | Problem]:
        """Pairs and rated answers repeat their prompt: it is asked once for each reference answer. Conversations stay."""
        seen: set[tuple[int | None, str]] = set()
        repeated = 0
        for item in items:
            if isinstance(item, Example) and item.kind in ("preference", "unpaired"):
                key = prompt_key(item), reference_answer(item)
                repeated += key in seen
                if key in seen:
                    continue
                seen.add(key)
            yield item
        if repeated:
            self.facts["repeated_prompts"] = repeated

    def _direct(self, item: Example | Problem) -> Iterator[Example | Problem]:
        if isinstance(item, Problem) or item.kind != "preference" or self._form != "rated":
            yield item
            return
        for half in halves(item):  # the best answer of several pairs is one good answer
            key = exact_key(half)
            if key not in self._halves:
                self._halves.add(key)
                yield half

    def _paired(self, answers: Sequence[Example]) -> Iterator[Example | Problem]:
        groups: dict[int | None, array[int]] = {}
        ratings = array("d")
        for index, answer in enumerate(answers):
            assert answer.rating is not None, "only rated answers are held"
            groups.setdefault(prompt_key(answer), array("q")).append(index)
            ratings.append(answer.rating)
        pairs = 0
        for indices in groups.values():
            made = 0
            for better, worse in self._choose(sorted(indices, key=lambda index: -ratings[index]), ratings):
                pair = _pair(answers[better], answers[worse])
                if pair is not None and made < self._pairing.max_pairs_per_prompt:
                    made += 1
                    yield pair
            pairs += made
            if not made:
                yield from (_without_partner(answers[index]) for index in indices)
        if len(ratings):
            self.facts |= {"rated_answers": len(ratings), "rated_prompts": len(groups), "pairs_of_ratings": pairs}

    def _choose(self, best_first: Sequence[int], ratings: Sequence[float]) -> Iterator[tuple[int, int]]:
        """(better, worse) with enough between them, the most telling first."""
        if self._pairing.pairs == "best":
            candidates: Iterable[tuple[int, int]] = ((best_first[0], other) for other in reversed(best_first[1:]))
        else:
            candidates = pairwise(best_first)
        for better, worse in candidates:
            gap = ratings[better] - ratings[worse]
            if gap > 0 and gap >= self._pairing.min_rating_gap:
                yield better, worse

    def _labelled(self, answers: Sequence[Example]) -> Iterator[Example]:
        if not answers:
            return
        ratings = array("d", (answer.rating or 0.0 for answer in answers))
        threshold = self._pairing.good_rating
        if threshold is None:
            threshold = median_threshold(ratings)
        self.facts |= {"labelled_by_rating": len(ratings), "good_rating": threshold}
        for answer, rating in zip(answers, ratings, strict=True):
            notes = tuple(dict.fromkeys((*answer.notes, "label_of_rating")))
            yield replace(answer, kind="unpaired", label=rating >= threshold, rating=None, notes=notes)


def median_threshold(ratings: Sequence[float]) -> float:
    """The median; where nothing lies below it, the next higher rating, so that both labels occur if ratings differ at all."""
    median = float(statistics.median(ratings))
    if min(ratings) < median:
        return median
    return min((rating for rating in ratings if rating > median), default=median)


def _pair(better: Example, worse: Example) -> Example | None:
    """A preference of two rated answers to one prompt; None where they say the same."""
    [chosen], [rejected] = endings_of(better), endings_of(worse)
    if answer_key(chosen) == answer_key(rejected):
        return None
    notes = tuple(dict.fromkeys((*better.notes, *worse.notes, "pair_of_ratings")))
    return replace(
        better, kind="preference", messages=prompt_of(better), chosen=chosen, rejected=rejected, rating=None, notes=notes
    )


def halves(pair: Example) -> tuple[Example, Example]:
    """The chosen ending as a good answer and the rejected one as a bad answer."""
    notes = tuple(dict.fromkeys((*pair.notes, "half_of_a_pair")))

    def half(ending: tuple[Message, ...], label: bool) -> Example:
        messages = (*pair.messages, *ending)
        return replace(pair, kind="unpaired", messages=messages, chosen=(), rejected=(), label=label, notes=notes)

    return half(pair.chosen, True), half(pair.rejected, False)


def _without_partner(answer: Example) -> Problem:
    return Problem(
        answer.place,
        "ROW_NO_PARTNER",
        f"an answer rated {answer.rating:g}, and none to the same prompt whose rating differs enough",
        "Rate a second answer to the same prompt, or lower data.min_rating_gap.",
        answer.shape,
    )


# --- what a set of preferences invites ----------------------------------------------------------------


class PairTally:
    """Counts over the pairs that are trained on: lengths of both sides before cutting, and pairs that say the opposite of others."""

    def __init__(self) -> None:
        self._pairs = 0
        self._tokens = [0, 0]
        self._chosen_longer = 0
        self._said: set[int] = set()
        self._opposite = 0
        self._prompts: set[int | None] = set()
        self._chosen: Counter[int] = Counter()
        self._rejected: set[int] = set()

    def add(self, example: Example, sides: Sides) -> None:
        chosen, rejected = (row.supervised + row.lost_answer_tokens for row in sides.rows)
        self._pairs += 1
        self._tokens[0] += chosen
        self._tokens[1] += rejected
        self._chosen_longer += chosen > rejected
        prompt, better, worse = prompt_key(example), answer_key(example.chosen), answer_key(example.rejected)
        self._prompts.add(prompt)
        self._opposite += hash((prompt, worse, better)) in self._said
        self._said.add(hash((prompt, better, worse)))
        self._chosen[hash((prompt, better))] += 1
        self._rejected.add(hash((prompt, worse)))

    def to_dict(self) -> dict[str, Any]:
        """For the manifest. Lengths are mean answer tokens per side, cut ones included; `contradictory` pairs turn an earlier one around."""
        pairs = max(self._pairs, 1)
        chosen, rejected = (tokens / pairs for tokens in self._tokens)
        return {
            "pairs": self._pairs,
            "prompts": len(self._prompts),
            "chosen_tokens": chosen,
            "rejected_tokens": rejected,
            "length_ratio": chosen / rejected if rejected else 0.0,
            "chosen_longer_share": self._chosen_longer / pairs,
            "contradictory": self._opposite,
            "chosen_is_elsewhere_rejected": sum(count for key, count in self._chosen.items() if key in self._rejected),
        }


def pair_findings(pairs: dict[str, Any], *, by_token: bool = False) -> Iterator[tuple[str, str, str]]:
    """(code, message, advice) for what the pairs of a manifest would teach besides what is meant. `by_token`: the objective
    compares answers per token, so that their length teaches nothing."""
    ratio = pairs["length_ratio"]
    if pairs["pairs"] and not by_token and not 1 / LENGTH_RATIO <= ratio <= LENGTH_RATIO:
        yield (
            "LENGTH_BIAS",
            f"Chosen answers have {pairs['chosen_tokens']:.0f} tokens on average and rejected ones {pairs['rejected_tokens']:.0f} "
            f"(ratio {ratio:.2f}; the chosen one is longer in {pairs['chosen_longer_share']:.0%} of the pairs): "
            "the model can win by length alone.",
            WARNINGS["LENGTH_BIAS"].advice,
        )
    if pairs["contradictory"]:
        yield (
            "PAIRS_CONTRADICT",
            f"{pairs['contradictory']:,} pairs prefer what another pair of the same prompt rejects.",
            WARNINGS["PAIRS_CONTRADICT"].advice,
        )


def rated_facts(good: int, bad: int) -> dict[str, Any]:
    """For the manifest: how many answers of each label, and KTO weights that balance them by its paper's rule."""
    desirable, undesirable = recommended_weights(good, bad)
    return {"good": good, "bad": bad, "desirable_weight": desirable, "undesirable_weight": undesirable}


def recommended_weights(good: int, bad: int) -> tuple[float, float]:
    """(desirable_weight, undesirable_weight), one of them 1, such that the weighted counts meet `KTO_BALANCE`."""
    low, high = KTO_BALANCE
    if not good or not bad or low <= good / bad <= high:
        return 1.0, 1.0
    if good < bad:
        return _rounded(bad / good), 1.0
    return 1.0, _rounded(good / bad / high)


def _rounded(weight: float) -> float:
    """Upwards at the second place, which stays within the rule's range."""
    return float(-(-weight * 100 // 1) / 100)


def rated_findings(rated: dict[str, Any], weights: tuple[float, float]) -> Iterator[tuple[str, str, str]]:
    """(code, message, advice) where the labels of a manifest, weighted, are out of balance."""
    good, bad = rated["good"], rated["bad"]
    if not good or not bad:
        yield (
            "ONE_LABEL",
            f"All {good + bad:,} answers are rated {'good' if good else 'bad'}: nothing tells the model what to prefer.",
            WARNINGS["ONE_LABEL"].advice,
        )
        return
    low, high = KTO_BALANCE
    balance = weights[0] * good / (weights[1] * bad)
    if not low <= balance <= high + 1e-9:
        yield (
            "LABEL_BALANCE",
            f"{good:,} answers are good and {bad:,} bad; weighted, that is {balance:.2f} to 1, outside the range 1 to 1.33 in which KTO was found to work best.",
            f"Set preference.desirable_weight={rated['desirable_weight']:g} and preference.undesirable_weight={rated['undesirable_weight']:g}.",
        )
