"""Mixing: shares are kept, nothing is there twice unasked, and what came from where is said."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from face import Ftf
from finetuneflow.data.mix import Source, _counts, mix, parse_sources
from finetuneflow.errors import ConfigError, DataError


def sharegpt(root: Path, count: int, name: str = "talks.json") -> Path:
    path = root / name
    turns = [[{"from": "human", "value": f"talk {n}?"}, {"from": "gpt", "value": f"yes {n}"}] for n in range(count)]
    path.write_text(json.dumps([{"conversations": pair} for pair in turns]))
    return path


def questions(root: Path, count: int, name: str = "questions.jsonl", word: str = "question") -> Path:
    path = root / name
    path.write_text("".join(json.dumps({"question": f"{word} {n}?", "answer": f"answer {n}"}) + "\n" for n in range(count)))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_largest_set_that_keeps_the_shares_without_repetition(tmp_path: Path) -> None:
    first, second = sharegpt(tmp_path, 100), questions(tmp_path, 30)
    mixed = mix([Source(first, 0.5), Source(second, 0.5)], tmp_path / "out.jsonl")
    assert mixed.examples == 60 and [source.taken for source in mixed.sources] == [30, 30]
    rows = lines(mixed.out)
    assert Counter(row["shape"] for row in rows) == {"sharegpt": 30, "question+answer": 30}
    assert {row["kind"] for row in rows} == {"chat"} and len({json.dumps(row) for row in rows}) == 60
    assert len({row["shape"] for row in rows[:10]}) == 2  # shuffled, not one behind the other


def test_a_count_is_met_where_the_sources_allow(tmp_path: Path) -> None:
    sources = [Source(sharegpt(tmp_path, 100), 2), Source(questions(tmp_path, 30), 1)]
    assert [s.taken for s in mix(sources, tmp_path / "a.jsonl", count=30).sources] == [20, 10]
    assert [s.taken for s in mix(sources, tmp_path / "b.jsonl", count=900).sources] == [60, 30]
    repeated = mix(sources, tmp_path / "c.jsonl", count=300, repeat=True)
    assert [(s.taken, s.repeated) for s in repeated.sources] == [(200, 100), (100, 70)]
    counts = Counter(row["messages"][0]["content"] for row in lines(repeated.out))
    assert set(counts.values()) <= {2, 3, 4} and len(counts) == 130
    assert [s.taken for s in mix(sources, tmp_path / "d.jsonl", repeat=True).sources] == [100, 50]  # the largest decides


def test_what_two_sources_hold_counts_for_the_first(tmp_path: Path) -> None:
    first, second = questions(tmp_path, 20), questions(tmp_path, 30, "more.jsonl")
    mixed = mix([Source(first, 1), Source(second, 1)], tmp_path / "out.jsonl")
    assert [(s.duplicates, s.usable) for s in mixed.sources] == [(0, 20), (20, 10)] and mixed.examples == 20
    with pytest.raises(DataError, match="in the files before it already"):
        mix([Source(second, 1), Source(first, 1)], tmp_path / "out.jsonl")


def test_nearly_the_same_is_left_out_when_asked(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog and then goes home to sleep until the morning comes again"
    path = tmp_path / "near.jsonl"
    path.write_text("".join(json.dumps({"question": f"{text} {n}", "answer": f"{text} too"}) + "\n" for n in range(5)))
    for near, usable in ((False, 5), (True, 1)):
        [source] = mix([Source(path, 1)], tmp_path / "out.jsonl", near_duplicates=near).sources
        assert source.usable == usable


def test_the_seed_decides(tmp_path: Path) -> None:
    sources = [Source(sharegpt(tmp_path, 50), 1), Source(questions(tmp_path, 10), 1)]
    texts = [mix(sources, tmp_path / f"{n}.jsonl", seed=seed).out.read_text() for n, seed in enumerate((1, 1, 2))]
    assert texts[0] == texts[1] != texts[2]


def test_bad_rows_go_into_the_file_beside_it_and_other_kinds_are_counted(tmp_path: Path) -> None:
    path = questions(tmp_path, 5)
    path.write_text(path.read_text() + '{"colour": "red"}\n{"text": "a document"}\n{not json\n')
    mixed = mix([Source(path, 1)], tmp_path / "out.jsonl")
    [source] = mixed.sources
    assert (source.rows_rejected, source.other_kinds, mixed.examples) == (2, 1, 5)
    assert mixed.problems and [row["code"] for row in lines(mixed.problems)] == ["ROW_UNKNOWN_SHAPE", "ROW_BAD_JSON"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a document"}\n')
    with pytest.raises(DataError, match="no conversation that could be mixed"):
        mix([Source(bad, 1)], tmp_path / "out2.jsonl")


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 500)), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 2000)),
    st.booleans(),
)
def test_counts_keep_the_shares_within_one_example(sources: list[tuple[float, int]], count: int | None, repeat: bool) -> None:
    weights, available = [w for w, _ in sources], [n for _, n in sources]
    sizes = _counts(weights, available, count, repeat=repeat)
    total = sum(sizes)
    assert all(abs(size - total * weight / sum(weights)) < 2 for size, weight in zip(sizes, weights, strict=True))
    if not repeat:
        assert all(size <= there for size, there in zip(sizes, available, strict=True))
    if count is not None:
        assert total <= count and (not repeat or total == count)


def test_sources_are_parsed_with_and_without_weight(tmp_path: Path) -> None:
    odd = questions(tmp_path, 1, "name=with.jsonl")
    assert parse_sources(["a.jsonl=0.5", "b.json", str(odd), f"{odd}=2"]) == [
        Source(Path("a.jsonl"), 0.5),
        Source(Path("b.json"), 1.0),
        Source(odd, 1.0),
        Source(odd, 2.0),
    ]
    for text in ("a.jsonl=0", "a.jsonl=-1", "a.jsonl=many", "=1", "a=nan", "a=inf"):
        with pytest.raises(ConfigError, match="not of the form"):
            parse_sources([text])


@pytest.mark.parametrize("weight", ["1e308", "1e10", "1e-10", "5e-324"])
def test_weights_out_of_all_proportion_are_refused(ftf: Ftf, tmp_path: Path, weight: str) -> None:
    """Their sum would be infinite, or a share zero."""
    files = [f"{sharegpt(tmp_path, 3)}={weight}", f"{questions(tmp_path, 3)}={weight}"]
    answer = ftf("data", "mix", *files, "--out", tmp_path / "out.jsonl", "--json")
    assert answer.json["error_code"] == "CONFIG_INVALID_VALUE" and "is not between" in answer.json["detail"]
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ((1e-9, 1e9), ("--repeat",)),
        ((1.0, 1.0), ("--repeat", "--count", 1_000_000_000)),
        ((1.0, 1.0), ("--repeat", "--count", 10**400)),
    ],
)
def test_a_mix_without_bounds_is_refused_before_it_is_drawn(
    ftf: Ftf, tmp_path: Path, weights: tuple[float, float], options: tuple[object, ...]
) -> None:
    files = [f"{sharegpt(tmp_path, 3)}={weights[0]}", f"{questions(tmp_path, 3)}={weights[1]}"]
    answer = ftf("data", "mix", *files, "--out", tmp_path / "out.jsonl", *options, "--json")
    assert (
        answer.json["error_code"] == "CONFIG_INVALID_VALUE"
        and "10,000,000" in answer.json["detail"]
        and not (tmp_path / "out.jsonl").exists()
    )


def test_the_file_that_limits_a_mix_is_named_with_the_way_out(ftf: Ftf, tmp_path: Path) -> None:
    first, second = sharegpt(tmp_path, 20), questions(tmp_path, 5)
    arguments = ("data", "mix", first, second, "--overwrite", "--out", tmp_path / "out.jsonl")
    told = ftf(*arguments).out
    assert f"{second} is used up, and 15 usable examples" in told and "--repeat" in told and "--count" in told
    assert ftf(*arguments, "--json").json["limited_by"] == str(second)
    assert ftf(*arguments, "--count", 30, "--json").json["limited_by"] == str(second)
    for enough in (("--count", 10), ("--repeat",), ("--repeat", "--count", 60)):
        found = ftf(*arguments, *enough, "--json").json
        assert found["limited_by"] is None, enough


def test_a_mix_without_rejected_rows_leaves_no_file_about_them(tmp_path: Path) -> None:
    path, out = questions(tmp_path, 5), tmp_path / "out.jsonl"
    path.write_text(path.read_text() + "{not json\n")
    assert mix([Source(path, 1)], out).problems == (beside := tmp_path / "out.problems.jsonl") and beside.exists()
    mixed = mix([Source(questions(tmp_path, 5), 1)], out)
    assert mixed.problems is None and not beside.exists() and mixed.to_dict()["problems"] is None


def test_the_verb_mixes_and_says_what_came_from_where(ftf: Ftf, tmp_path: Path) -> None:
    first, second, out = sharegpt(tmp_path, 20), questions(tmp_path, 30), tmp_path / "mixed.jsonl"
    answer = ftf("data", "mix", f"{first}=0.2", f"{second}=0.3", "--out", out, "--json")
    assert answer.code == 0 and answer.json["examples"] == 50
    assert [round(source["got_share"], 3) for source in answer.json["sources"]] == [0.4, 0.6]
    assert ftf("data", "mix", first, "--out", out).code == 10  # never over an existing file unasked
    again = ftf("data", "mix", f"{first}=0.2", f"{second}=0.3", "--out", out, "--overwrite", "--count", 10)
    assert again.code == 0 and "40.0 %" in again.out and "10 examples" in again.out
    assert ftf("data", "check", out, "--json").json[0]["usable"] == 10


def test_the_preview_shows_both_sides_of_a_pair(ftf: Ftf, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "chosen": "So it is.", "rejected": "No idea."}) + "\n")
    shown = ftf("data", "preview", path, "--form", "pair", "--json").json
    assert [row["side"] for row in shown["rows"]] == ["chosen", "rejected"] and shown["form"] == "pair"
    for row, text in zip(shown["rows"], ("So it is.", "No idea."), strict=True):
        assert "".join(p["text"] for p in row["pieces"] if p["part"] == "supervised").strip().startswith(text)
        assert row["ids"][: row["prompt_length"]] == shown["rows"][0]["ids"][: row["prompt_length"]]
    prompts = ftf("data", "preview", path, "--form", "prompt", "--json").json["rows"]
    assert [row["side"] for row in prompts] == ["prompt"] and prompts[0]["supervised"] == 0
    path.write_text(json.dumps({"prompt": "Why? " * 60, "chosen": "So it is. " * 40 + "Right.", "rejected": "No."}) + "\n")
    printed = ftf("data", "preview", path, "--form", "pair").out  # into a pipe: not a terminal
    assert "chosen" in printed and "Right." in printed and printed.count("Why?") == 120
    assert [row["side"] for row in ftf("data", "preview", path, "--form", "rated", "--json").json["rows"]] == ["good", "bad"]
    chats = questions(tmp_path, 2)
    assert ftf("data", "preview", chats, "--form", "pair", "--json").json["error_code"] == "DATASET_NOTHING_USABLE"


def test_pairs_made_of_ratings_can_be_written_and_read_again(ftf: Ftf, tmp_path: Path) -> None:
    path, out = tmp_path / "rated.jsonl", tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Why?", "response": f"answer {n}", "score": n} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ftf("data", "convert", path, "--form", "pair", "--out", out, "--json").json["examples"] == 3
    assert ftf("data", "check", out, "--json").json[0]["kinds"] == {"preference": 3}
