"""Scores of answers against expected answers: exact match, token F1, BLEU, ROUGE.

Pure functions on text; BLEU and ROUGE are computed by the field's own libraries (sacrebleu, rouge-score).
BLEU is on the scale 0 to 100, everything else 0 to 1.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetuneflow.errors import EvaluationError, missing_extra

FINAL_PUNCTUATION = " \t\n.!?;:,…。！？"
# A word is a run of letters and digits of any script; Chinese and Japanese signs count one by one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True, slots=True)
class TextScores:
    """Scores of one set of answers. `bleu` 0 to 100, the others 0 to 1; ROUGE values are mean F-measures."""

    answers: int
    empty_answers: int
    exact_match: float
    token_f1: float
    bleu: float
    bleu_signature: str
    rouge1: float
    rouge2: float
    rouge_l: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_answers(answers: Sequence[str], expected: Sequence[str]) -> TextScores:
    """All scores of `answers` against `expected`, pair by pair. An empty answer counts as a wrong one."""
    require_pairs(answers, expected)
    bleu, signature = corpus_bleu(answers, expected)
    rouge = mean_rouge(answers, expected)
    return TextScores(
        answers=len(answers),
        empty_answers=sum(not answer.strip() for answer in answers),
        exact_match=sum(map(exact_match, answers, expected)) / len(answers),
        token_f1=sum(map(token_f1, answers, expected)) / len(answers),
        bleu=bleu,
        bleu_signature=signature,
        rouge1=rouge["rouge1"],
        rouge2=rouge["rouge2"],
        rouge_l=rouge["rougeL"],
    )


def require_pairs(answers: Sequence[str], expected: Sequence[str]) -> None:
    if len(answers) != len(expected):
        raise ValueError(f"{len(answers)} answers for {len(expected)} expected ones")
    if not answers:
        raise EvaluationError(
            "EVALUATION_NO_DATA", "There is no answer to score.", remedy="Give evaluation data with at least one expected answer."
        )


def normalise(text: str) -> str:
    """Text without what a reader would not call a difference: case, blanks, final punctuation, form of apostrophes."""
    folded = unicodedata.normalize("NFC", text).casefold().replace("’", "'")
    return " ".join(folded.split()).strip(FINAL_PUNCTUATION)


def words(text: str) -> list[str]:
    """Lower-case words of any script, punctuation left out."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


def exact_match(answer: str, expected: str) -> bool:
    """Whether both are the same once normalised."""
    return normalise(answer) == normalise(expected)


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over words as a bag, as in SQuAD but without dropping articles."""
    found, wanted = Counter(words(answer)), Counter(words(expected))
    if not found or not wanted:
        return float(found == wanted)
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total())


def corpus_bleu(answers: Sequence[str], expected: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU (0 to 100) with sacrebleu's defaults, and the signature that makes it comparable."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise missing_extra("sacrebleu", "train") from error
    metric = BLEU()
    score = metric.corpus_score(list(answers), [list(expected)])
    return float(score.score), str(metric.get_signature())


class UnicodeWords:
    """Tokenizer for rouge-score. Its own keeps only a-z and 0-9: "été" would become "t". On plain English both agree."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def mean_rouge(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L over the pairs."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_extra("rouge-score", "train") from error
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, tokenizer=UnicodeWords())
    per_pair = [scorer.score(target, answer) for target, answer in zip(expected, answers, strict=True)]
    return {kind: float(sum(scores[kind].fmeasure for scores in per_pair) / len(per_pair)) for kind in kinds}
