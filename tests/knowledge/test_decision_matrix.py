"""The documented rule against the document and by hand; the matrix against the page that shows it and against plain arithmetic."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest

from finetuneflow.config import RunConfig, settings
from finetuneflow.knowledge.decision_matrix import (
    BANDS,
    DOCUMENTED_MATRIX,
    MODELS,
    VRAM_TIGHT_ADJUSTMENTS,
    disagreements,
    disagreements_markdown,
    matrix,
    matrix_markdown,
    recommend_method,
    tight_adjustments,
)
from finetuneflow.knowledge.memory import estimate
from finetuneflow.knowledge.resolve import usual_rate
from finetuneflow.knowledge.shapes import shape_from_size
from finetuneflow.knowledge.values import GB, Device, Machine

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
CARDS = (0, 0.5, 4, 5.99, 5.999999, 6, 6.0, 7.9, 8, 11.99, 12, 15.9, 16, 23.9, 23.999, 24, 25.4, 40, 48, 80, 141.0)
SIZES = (0, 0.124, 0.6, 1, 3, 3.1, 6.9, 7, 7.5, 8, 12, 13, 14.2, 30, 34, 65, 70, 405)
BOOLS = (True, False)


# --- the rule -----------------------------------------------------------------------------------------


def test_without_cuda_the_answer_is_the_documented_one_whatever_else_is_said() -> None:
    for card, size, bnb in itertools.product(CARDS, SIZES, BOOLS):
        assert recommend_method(card, size, False, bnb) == {
            "method": None,
            "reason": "No CUDA GPU detected. Cannot fine-tune locally.",
            "can_train": False,
            "suggestions": ["Use a cloud GPU (Colab, RunPod, Lambda)"],
        }


def test_each_branch_has_its_keys_and_texts() -> None:
    assert recommend_method(5.99, 3, True, True) == {
        "method": None,
        "reason": "Only 5.99GB VRAM. Minimum 6GB required for QLoRA with small models.",
        "can_train": False,
        "suggestions": ["Use a GPU with more VRAM", "Try a smaller model (< 3B params)"],
    }
    assert recommend_method(8, 7, True, True) == {
        "method": "qlora",
        "reason": "8GB VRAM. QLoRA 4-bit recommended to fit in memory.",
        "can_train": True,
        "estimated_vram_usage_gb": 5.9,  # 7 x 0.5 x 1.3 x 1.3 = 5.915
        "suggestions": ["Reduce batch_size if OOM", "Reduce max_seq_length"],
    }
    assert recommend_method(8, 13, True, True) == {
        "method": "qlora",
        "reason": "8GB VRAM might be tight for 13B model.",
        "can_train": True,
        "warnings": ["High OOM risk. Reduce batch_size to 1 and max_seq_length to 1024."],
        "estimated_vram_usage_gb": 11.0,  # 10.985
    }
    assert recommend_method(16, 7, True, True) == {
        "method": "qlora",
        "reason": "16GB VRAM. Model too large for LoRA FP16, using QLoRA.",
        "can_train": True,
        "estimated_vram_usage_gb": 5.9,
    }
    assert recommend_method(16, 3, True, True) == {
        "method": "lora",
        "reason": "16GB VRAM. LoRA FP16 fits comfortably.",
        "can_train": True,
        "estimated_vram_usage_gb": 8.3,  # 3 x 2 x 1.2 x 1.15 = 8.28
        "alternative": "qlora (saves ~50% VRAM)",
    }
    assert recommend_method(24, 70, True, True) == {
        "method": "lora",
        "reason": "24GB VRAM. LoRA FP16 recommended for best quality.",
        "can_train": True,
        "estimated_vram_usage_gb": 193.2,
        "alternative": "qlora (if you want to save VRAM for larger batch sizes)",
    }


def test_branches_over_the_whole_grid() -> None:
    """Methods and key sets from closed forms: LoRA takes 2.76 and QLoRA 0.845 GB per billion parameters."""
    for card, size, bnb in itertools.product(CARDS, SIZES, BOOLS):
        answer = recommend_method(card, size, True, bnb)
        if card < 6:
            assert answer["method"] is None and not answer["can_train"] and "estimated_vram_usage_gb" not in answer
            continue
        quantized = card < 12 or (card < 24 and bnb and 2.76 * size > 0.85 * card)
        assert answer["method"] == ("qlora" if quantized else "lora")
        assert answer["can_train"]
        assert answer["estimated_vram_usage_gb"] == pytest.approx((0.845 if quantized else 2.76) * size, abs=0.051)
        assert ("warnings" in answer) == (card < 12 and 0.845 * size > 0.85 * card)
        assert ("suggestions" in answer) == (card < 12 and 0.845 * size <= 0.85 * card)
        assert ("alternative" in answer) == (not quantized)


@pytest.mark.parametrize(
    "below, at", [((5.99, None), (6, "qlora")), ((11.99, "qlora"), (12, "lora")), ((23.99, "qlora"), (24, "lora"))]
)
def test_the_borders_belong_to_the_upper_branch(below: tuple[float, str | None], at: tuple[float, str | None]) -> None:
    size = 7.5 if below[0] > 20 else 3  # 7.5B needs 20.7 GB in 16 bits, more than 85 % of 23.99
    for card, method in (below, at):
        assert recommend_method(card, size, True, True)["method"] == method


def test_the_margin_of_85_percent() -> None:
    """10 GB leave 8.5: 10.05B need 8.49, 10.07B need 8.51. 16 GB leave 13.6: 4.92B need 13.58, 4.94B need 13.63."""
    assert "suggestions" in recommend_method(10, 10.05, True, True)
    assert "warnings" in recommend_method(10, 10.07, True, True)
    assert recommend_method(16, 4.92, True, True)["method"] == "lora"
    assert recommend_method(16, 4.94, True, True)["method"] == "qlora"
    assert recommend_method(16, 4.94, True, False)["method"] == "lora"  # the document's branch without bitsandbytes


@pytest.mark.parametrize("vram, params", [(-1, 7), (math.nan, 7), (24, -7), (24, math.nan)])
def test_nonsense_is_refused(vram: float, params: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        recommend_method(vram, params, True, True)


@pytest.mark.shared_data
def test_the_rule_is_the_document_s(shared_data: Path) -> None:
    """Every answer equals that of the code printed in the reference document; so do matrix and adjustments."""
    text = (shared_data.parent / "reference" / "finetuneflow-ml-defaults.fr.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    documented: dict[str, object] = {}
    for block in blocks:
        if block.startswith(("def recommend_method", "VRAM_TIGHT_ADJUSTMENTS")):
            exec(block, documented)
    rule = documented["recommend_method"]
    assert callable(rule)
    for card, size, cuda, bnb in itertools.product(CARDS, SIZES, BOOLS, BOOLS):
        assert recommend_method(card, size, cuda, bnb) == rule(card, size, cuda, bnb)
    assert documented["VRAM_TIGHT_ADJUSTMENTS"] == VRAM_TIGHT_ADJUSTMENTS
    rows = [line for line in text.splitlines() if re.match(r"\| (<|\d).* GB \|", line)]
    printed = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (row.split("|") for row in rows)}
    names = {"lora": "LoRA ", "qlora": "QLoRA ", None: ""}
    marks = {"comfortable": "✅", "reduced": "⚠️", "impossible": "❌"}
    for band, row in DOCUMENTED_MATRIX.items():
        assert printed[band] == [names[method] + marks[mark] for method, mark in row.values()]
    assert len(printed) == len(DOCUMENTED_MATRIX)


def test_the_adjustments_are_settings_of_ours() -> None:
    known = {key for key, *_ in settings()}
    assert tight_adjustments() == {
        "training.batch_size": 1,
        "training.eval_batch_size": 1,
        "training.gradient_accumulation": 8,
        "data.max_length": 1024,
        "training.gradient_checkpointing": "on",
    }
    assert set(tight_adjustments()) <= known


def test_documented_defaults_are_the_product_s() -> None:
    """ML defaults 1.1 and 1.2; those missing here are in docs/reference-notes.md (precision, optimizer, checkpointing, targets)."""
    training, method, data = RunConfig().training, RunConfig().method, RunConfig().data
    assert (training.epochs, usual_rate("sft", method.kind)[0], training.batch_size, training.eval_batch_size) == (3, 2e-4, 4, 4)
    assert (training.gradient_accumulation, data.max_length, training.warmup_ratio) == (4, 2048, 0.03)
    assert (training.weight_decay, training.scheduler, training.log_steps) == (0.01, "cosine", 10)
    assert (training.eval_steps, training.save_steps, training.keep_checkpoints) == (100, 200, 3)
    assert (training.load_best, training.patience) == (True, 3)
    assert (method.r, method.alpha, method.dropout, method.double_quantization) == (16, 32, 0.05, True)


# --- rule against matrix ------------------------------------------------------------------------------


def test_where_rule_and_matrix_disagree() -> None:
    found = {(d.band, d.model): (d.rule, d.matrix) for d in disagreements()}
    assert len(found) == 12
    assert found["24-48 GB", "70B"] == ("LoRA ✅", "QLoRA ⚠️")  # the rule knows nothing above 24 GB
    assert found["48+ GB", "70B"] == ("LoRA ✅", "QLoRA ✅")
    assert found["6-8 GB", "70B"] == ("QLoRA ⚠️", "❌")
    assert found["16-24 GB", "7-8B"] == ("QLoRA ✅", "LoRA ✅")  # 7 x 2.76 = 19.3 of 13.6
    assert not any(band == "< 6 GB" for band, _ in found)


# --- the matrix ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():  # type: ignore[no-untyped-def]
    return {(cell.band, cell.model): cell for cell in matrix()}


def test_the_matrix_has_every_cell_and_says_why_it_differs(cells) -> None:  # type: ignore[no-untyped-def]
    assert set(cells) == {(band.name, model) for band in BANDS for model in MODELS}
    for cell in cells.values():
        assert bool(cell.why) == cell.differs
        if cell.differs:
            assert re.search(r"\d+\.\d GB", cell.why)
        assert cell.to_dict()["differs"] == cell.differs


def test_no_cell_contradicts_the_size_of_the_weights(cells) -> None:  # type: ignore[no-untyped-def]
    """16 bits are 2 bytes and NF4 at least half a byte per parameter: a method whose weights exceed the card is never named."""
    bytes_each = {"lora": 2.0, "qlora": 0.5}
    for cell in cells.values():
        if cell.method:
            assert shape_from_size(MODELS[cell.model]).num_parameters * bytes_each[cell.method] < cell.card_gb * GB
    assert cells["24-48 GB", "13B"].method == "qlora"
    assert cells["24-48 GB", "13B"].why == "LoRA: weights alone are 26.0 GB."
    assert cells["24-48 GB", "70B"].mark == "impossible"
    assert cells["48+ GB", "70B"].method == "qlora"
    assert all(cells["< 6 GB", model].mark == "impossible" for model in ("7-8B", "13B", "70B"))


def test_cells_agree_with_the_estimate_asked_directly(cells) -> None:  # type: ignore[no-untyped-def]
    for (_, model), cell in cells.items():
        machine = Machine((Device("card", "cuda", round(cell.card_gb * GB), bf16=True),), 64 * GB)
        for method, length, enough, mark in (
            ("lora", 2048, {"fits"}, "comfortable"),
            ("qlora", 2048, {"fits"}, "comfortable"),
            ("lora", 1024, {"fits", "tight"}, "reduced"),
            ("qlora", 1024, {"fits", "tight"}, "reduced"),
        ):
            config = RunConfig.model_validate(
                {
                    "method": {"kind": method},
                    "data": {"max_length": length},
                    "training": {
                        "batch_size": 1,
                        "eval_batch_size": 1,
                        "gradient_accumulation": 16,
                        "gradient_checkpointing": "on",
                    },
                }
            )
            if estimate(shape_from_size(MODELS[model]), config, machine).verdict in enough:
                assert (cell.method, cell.mark) == (method, mark)
                break
        else:
            assert (cell.method, cell.mark) == (None, "impossible")


def test_more_memory_is_never_worse_and_a_larger_model_never_better(cells) -> None:  # type: ignore[no-untyped-def]
    order = {"impossible": 0, "reduced": 1, "comfortable": 2}
    for model in MODELS:
        marks = [order[cells[band.name, model].mark] for band in BANDS]
        assert marks == sorted(marks)
    assert all(order[cells[band.name, "70B"].mark] <= order[cells[band.name, "≤ 3B"].mark] for band in BANDS)


@pytest.mark.parametrize("name, table", [("matrix", matrix_markdown), ("disagreements", disagreements_markdown)])
def test_the_page_shows_what_the_functions_say(name: str, table) -> None:  # type: ignore[no-untyped-def]
    page = PAGE.read_text(encoding="utf-8")
    shown = page.split(f"<!-- {name} -->\n", 1)[1].split(f"\n<!-- /{name} -->", 1)[0]
    assert shown == table(), f"put the output of {table.__name__}() between the marks <!-- {name} --> of docs/planning.md"
