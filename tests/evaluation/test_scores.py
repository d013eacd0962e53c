"""Scores equal the field's own libraries, and hold for French, for empty answers and for other scripts."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.scores import corpus_bleu, exact_match, mean_rouge, normalise, score_answers, token_f1, words

ENGLISH = (
    ["The cat sat on the mat.", "It is 7.", "a long and winding road to the sea", "no, never_ever"],
    ["The cat is on the mat.", "It is 7", "the road to the sea is long", "yes"],
)
FRENCH = (
    ["L'été, à Noël, il fait chaud.", "La capitale est Paris", "où êtes-vous né ?"],
    ["En été il fait très chaud.", "Paris est la capitale.", "Où étiez-vous né ?"],
)


def test_bleu_equals_sacrebleu_and_carries_its_signature() -> None:
    for answers, expected in (ENGLISH, FRENCH):
        score, signature = corpus_bleu(answers, expected)
        assert score == sacrebleu.corpus_bleu(answers, [expected]).score
        assert "tok:13a" in signature and f"version:{sacrebleu.__version__}" in signature


def test_rouge_on_english_equals_rouge_score_with_its_own_tokenizer() -> None:
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds)
    scores = [scorer.score(target, answer) for answer, target in zip(*ENGLISH, strict=True)]
    expected = {kind: sum(s[kind].fmeasure for s in scores) / len(scores) for kind in kinds}
    assert mean_rouge(*ENGLISH) == pytest.approx(expected, abs=1e-12)


def test_rouge_on_french_counts_whole_words_where_the_default_tokenizer_breaks_them() -> None:
    assert mean_rouge(["été"], ["étage"])["rouge1"] == 0.0
    assert RougeScorer(["rouge1"]).score("été", "étè")["rouge1"].fmeasure > 0  # the accents are cut out: "t" equals "t"
    assert mean_rouge(["il a été là"], ["il a été ici"])["rouge1"] == pytest.approx(0.75)


def test_french_words_keep_their_accents_and_elisions_part() -> None:
    assert words("L'été à Noël, œuvre_2 !") == ["l", "été", "à", "noël", "œuvre", "2"]
    assert words("東京は") == ["東", "京", "は"]


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Paris.", "paris", True),
        ("  Le  chat ", "le chat", True),
        ("Où\u0300", "où\u0300", True),
        ("C’est ça !", "c'est ça", True),
        ("e\u0301te\u0301", "été", True),
        ("Paris", "Lyon", False),
        ("", "Paris", False),
        ("3.5", "35", False),
    ],
)
def test_an_exact_match_looks_through_case_blanks_and_final_punctuation_only(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) is same


def test_normalising_twice_changes_nothing_more() -> None:
    for text in (*ENGLISH[0], *FRENCH[0], " ?! ", "A. B."):
        assert normalise(normalise(text)) == normalise(text)


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    # Shared: the, cat. Precision 2/3, recall 2/4.
    assert token_f1("the cat ran", "the cat sat down") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert token_f1("the the", "the") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert (token_f1("", "x"), token_f1("x", ""), token_f1("", "")) == (0.0, 0.0, 1.0)


def test_empty_answers_are_counted_and_score_nothing() -> None:
    scores = score_answers(["", "  "], ["Paris", "Rome"])
    assert (scores.empty_answers, scores.exact_match, scores.token_f1, scores.bleu, scores.rouge1, scores.rouge_l) == (
        2,
        0,
        0,
        0,
        0,
        0,
    )
    half = score_answers(["", "Rome"], ["Paris", "Rome"])
    assert (half.exact_match, half.rouge1, half.token_f1) == (0.5, 0.5, 0.5)


def test_nothing_to_score_is_an_error_not_a_zero() -> None:
    with pytest.raises(EvaluationError):
        score_answers([], [])
    with pytest.raises(ValueError, match="1 answers for 2"):
        score_answers(["a"], ["a", "b"])
