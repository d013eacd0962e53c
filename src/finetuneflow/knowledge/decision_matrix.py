"""The documented rule, its matrix, and what the estimate says instead.

`recommend_method` and `DOCUMENTED_MATRIX` are kept as the reference document has them (ML defaults, 2.1 to 2.3), where users
look for them. They disagree with each other (`disagreements`) and with arithmetic; what the product recommends comes from
`memory.estimate`, and `matrix` shows cell by cell where that differs and why.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from finetuneflow.config import RunConfig
from finetuneflow.knowledge.memory import Estimate, Verdict, estimate
from finetuneflow.knowledge.shapes import shape_from_size
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.values import GB, Device, Machine

Mark = Literal["comfortable", "reduced", "impossible"]
MARKS: dict[Mark, str] = {"comfortable": "✅", "reduced": "⚠️", "impossible": "❌"}

# ML defaults, 2.3, under the names used there; `tight_adjustments` has ours.
VRAM_TIGHT_ADJUSTMENTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "max_seq_length": 1024,
    "gradient_checkpointing": True,
}


def tight_adjustments() -> dict[str, Any]:
    """`VRAM_TIGHT_ADJUSTMENTS` as settings of a run file."""
    documented = VRAM_TIGHT_ADJUSTMENTS
    return {
        "training.batch_size": documented["per_device_train_batch_size"],
        "training.eval_batch_size": documented["per_device_eval_batch_size"],
        "training.gradient_accumulation": documented["gradient_accumulation_steps"],
        "data.max_length": documented["max_seq_length"],
        "training.gradient_checkpointing": "on" if documented["gradient_checkpointing"] else "off",
    }


def recommend_method(vram_gb: float, model_params_b: float, cuda_available: bool, bnb_available: bool) -> dict[str, Any]:
    """The documented rule (ML defaults, 2.1): same branches, keys, texts and rounding. A plan does not use it.

    `vram_gb` in GB, `model_params_b` in billions. Raises `ValueError` for a negative number or NaN.
    """
    if not (vram_gb >= 0 and model_params_b >= 0):
        raise ValueError("vram_gb and model_params_b must be numbers of at least 0")
    if not cuda_available:
        return {
            "method": None,
            "reason": "No CUDA GPU detected. Cannot fine-tune locally.",
            "can_train": False,
            "suggestions": ["Use a cloud GPU (Colab, RunPod, Lambda)"],
        }
    if vram_gb < 6:
        return {
            "method": None,
            "reason": f"Only {vram_gb}GB VRAM. Minimum 6GB required for QLoRA with small models.",
            "can_train": False,
            "suggestions": ["Use a GPU with more VRAM", "Try a smaller model (< 3B params)"],
        }
    # Bytes per parameter and overhead of weights, then of optimizer and gradients. The order of the factors is the document's.
    vram_lora = model_params_b * 2 * 1.2 * 1.15
    vram_qlora = model_params_b * 0.5 * 1.3 * 1.3
    if vram_gb < 12:
        return _documented_below_12(vram_gb, model_params_b, vram_qlora)
    if vram_gb < 24:
        if bnb_available and vram_lora > vram_gb * 0.85:
            return {
                "method": "qlora",
                "reason": f"{vram_gb}GB VRAM. Model too large for LoRA FP16, using QLoRA.",
                "can_train": True,
                "estimated_vram_usage_gb": round(vram_qlora, 1),
            }
        return {
            "method": "lora",
            "reason": f"{vram_gb}GB VRAM. LoRA FP16 fits comfortably.",
            "can_train": True,
            "estimated_vram_usage_gb": round(vram_lora, 1),
            "alternative": "qlora (saves ~50% VRAM)",
        }
    return {
        "method": "lora",
        "reason": f"{vram_gb}GB VRAM. LoRA FP16 recommended for best quality.",
        "can_train": True,
        "estimated_vram_usage_gb": round(vram_lora, 1),
        "alternative": "qlora (if you want to save VRAM for larger batch sizes)",
    }


def _documented_below_12(vram_gb: float, model_params_b: float, vram_qlora: float) -> dict[str, Any]:
    if vram_qlora <= vram_gb * 0.85:
        return {
            "method": "qlora",
            "reason": f"{vram_gb}GB VRAM. QLoRA 4-bit recommended to fit in memory.",
            "can_train": True,
            "estimated_vram_usage_gb": round(vram_qlora, 1),
            "suggestions": ["Reduce batch_size if OOM", "Reduce max_seq_length"],
        }
    return {
        "method": "qlora",
        "reason": f"{vram_gb}GB VRAM might be tight for {model_params_b}B model.",
        "can_train": True,
        "warnings": ["High OOM risk. Reduce batch_size to 1 and max_seq_length to 1024."],
        "estimated_vram_usage_gb": round(vram_qlora, 1),
    }


# --- the documented matrix ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Band:
    """A row of the matrix. `card_gb`: the card it is judged by, its lower edge in GB (10^9 bytes)."""

    name: str
    card_gb: float


# "< 6 GB" has no lower edge: 4 GB stands for it, the smallest cards on sale.
BANDS = (
    Band("< 6 GB", 4),
    Band("6-8 GB", 6),
    Band("8-12 GB", 8),
    Band("12-16 GB", 12),
    Band("16-24 GB", 16),
    Band("24-48 GB", 24),
    Band("48+ GB", 48),
)
# Column -> the size that stands for it. A cell of "7-8B" must hold for both, so it is judged by 8B.
MODELS = {"≤ 3B": "3B", "7-8B": "8B", "13B": "13B", "70B": "70B"}
# What the documented rule is asked for: the number the column's name starts with.
_RULE_PARAMS_B = {"≤ 3B": 3.0, "7-8B": 7.0, "13B": 13.0, "70B": 70.0}

_NO: tuple[None, Mark] = (None, "impossible")
_Q_OK: tuple[str, Mark] = ("qlora", "comfortable")
_Q_LESS: tuple[str, Mark] = ("qlora", "reduced")
_L_OK: tuple[str, Mark] = ("lora", "comfortable")
DOCUMENTED_MATRIX: dict[str, dict[str, tuple[str | None, Mark]]] = {
    band: dict(zip(MODELS, row, strict=True))
    for band, row in {
        "< 6 GB": (_NO, _NO, _NO, _NO),
        "6-8 GB": (_Q_LESS, _Q_LESS, _NO, _NO),
        "8-12 GB": (_Q_OK, _Q_LESS, _NO, _NO),
        "12-16 GB": (_L_OK, _Q_OK, _Q_LESS, _NO),
        "16-24 GB": (_L_OK, _L_OK, _Q_OK, _NO),
        "24-48 GB": (_L_OK, _L_OK, _L_OK, _Q_LESS),
        "48+ GB": (_L_OK, _L_OK, _L_OK, _Q_OK),
    }.items()
}
_NAMES = {"lora": "LoRA", "qlora": "QLoRA"}


def cell_text(method: str | None, mark: Mark) -> str:
    """A cell as the document writes it."""
    return f"{_NAMES[method]} {MARKS[mark]}" if method else MARKS[mark]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A cell in which the documented rule and the documented matrix say different things."""

    band: str
    model: str
    rule: str
    matrix: str


def disagreements() -> tuple[Disagreement, ...]:
    """Where `recommend_method`, asked for the lower edge of a band with bitsandbytes, contradicts `DOCUMENTED_MATRIX`."""
    found = []
    for band in BANDS:
        for model, params_b in _RULE_PARAMS_B.items():
            rule = _rule_cell(recommend_method(band.card_gb, params_b, True, True))
            documented = DOCUMENTED_MATRIX[band.name][model]
            if rule != documented:
                found.append(Disagreement(band.name, model, cell_text(*rule), cell_text(*documented)))
    return tuple(found)


def _rule_cell(answer: dict[str, Any]) -> tuple[str | None, Mark]:
    """An answer of the rule in the matrix's terms: its warning names the very reductions of ⚠️."""
    if not answer["can_train"]:
        return _NO
    return answer["method"], "reduced" if "warnings" in answer else "comfortable"


# --- the matrix from the estimate ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: what the estimate says, what the document says, and in one line why they differ.

    `needed_gb`: peak memory of the method at the settings of its mark; of QLoRA with reductions where nothing fits.
    """

    band: str
    card_gb: float
    model: str
    method: str | None
    mark: Mark
    needed_gb: float
    documented_method: str | None
    documented_mark: Mark
    why: str = ""

    @property
    def differs(self) -> bool:
        return (self.method, self.mark) != (self.documented_method, self.documented_mark)

    @property
    def text(self) -> str:
        return cell_text(self.method, self.mark)

    @property
    def documented_text(self) -> str:
        return cell_text(self.documented_method, self.documented_mark)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"differs": self.differs}


def matrix() -> tuple[Cell, ...]:
    """The decision matrix from the estimate, row by row.

    Comfortable: the documented 2,048 tokens and effective batch of 16 fill at most 85 % of the usable memory, with a
    micro-batch of 1, checkpointing and paged 8-bit AdamW; a smaller micro-batch costs time and nothing else. Reduced: the run
    fits with `VRAM_TIGHT_ADJUSTMENTS`, which cut examples at 1,024 tokens. LoRA is named before QLoRA, comfortable before
    reduced. Each card is the lower edge of its band.
    """
    return tuple(_cell(band, model, shape_from_size(size)) for band in BANDS for model, size in MODELS.items())


def _config(method: str, mark: Mark) -> RunConfig:
    values: dict[str, dict[str, Any]] = {"method": {"kind": method}, "training": {"optimizer": "paged_adamw_8bit"}, "data": {}}
    reductions = tight_adjustments()
    if mark == "comfortable":
        reductions |= {"training.gradient_accumulation": 16, "data.max_length": 2048}
    for key, value in reductions.items():
        section, name = key.split(".")
        values[section][name] = value
    return RunConfig.model_validate(values)


def _card(gb: float) -> Machine:
    return Machine((Device(f"{gb:g} GB card", "cuda", round(gb * GB), bf16=True),), host_memory_bytes=64 * GB, observed=False)


def _cell(band: Band, model: str, shape: ModelShape) -> Cell:
    machine = _card(band.card_gb)
    marks: tuple[Mark, ...] = ("comfortable", "reduced")
    needs: dict[tuple[str, Mark], Estimate] = {
        (method, mark): estimate(shape, _config(method, mark), machine) for mark in marks for method in ("lora", "qlora")
    }
    found = next((key for key, need in needs.items() if need.verdict in _ENOUGH[key[1]]), None)
    method, mark = found if found else _NO
    documented_method, documented_mark = DOCUMENTED_MATRIX[band.name][model]
    cell = Cell(
        band=band.name,
        card_gb=band.card_gb,
        model=model,
        method=method,
        mark=mark,  # type: ignore[arg-type]
        needed_gb=round(needs[found or ("qlora", "reduced")].total_bytes / GB, 1),
        documented_method=documented_method,
        documented_mark=documented_mark,
    )
    if not cell.differs:
        return cell
    judged = (documented_method, documented_mark) if documented_method else found
    assert judged is not None  # a documented ❌ that differs was found possible
    why = _why(cell, judged, needs[judged]) + _smaller(model, judged, machine, needs[judged])
    return replace(cell, why=why)


_SETTINGS_OF: dict[str, str] = {"comfortable": "micro-batch 1, 2,048 tokens", "reduced": "micro-batch 1, 1,024 tokens"}
_ENOUGH: dict[str, tuple[Verdict, ...]] = {"comfortable": ("fits",), "reduced": ("fits", "tight")}


def _why(cell: Cell, judged: tuple[str, Mark], need: Estimate) -> str:
    """One line of arithmetic on the document's claim, or on what makes a documented ❌ possible."""
    method, mark = judged
    weights = sum(need.breakdown.get(part, 0) for part in ("weights", "embeddings", "quantization_constants")) / GB
    if weights > cell.card_gb:
        return f"{_NAMES[method]}: weights alone are {weights:.1f} GB."
    line = f"{_NAMES[method]} needs {need.total_bytes / GB:.1f} GB at {_SETTINGS_OF[mark]}"
    if need.verdict not in _ENOUGH[mark]:
        if need.verdict == "tight":
            return f"{line}, more than 85 % of the {need.usable_bytes / GB:.1f} GB usable."
        largest = sorted(need.breakdown.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name.replace('_', ' ')} {size / GB:.1f}" for name, size in largest)
        return f"{line}: {parts}."
    if (cell.method, cell.mark) != judged:
        return f"{cell.text} already: {cell.needed_gb:.1f} GB at {_SETTINGS_OF[cell.mark]}."
    return f"{line}."


def _smaller(model: str, judged: tuple[str, Mark], machine: Machine, need: Estimate) -> str:
    """Whether the smaller model of the column would bear the document out."""
    method, mark = judged
    if model != "7-8B" or need.verdict in _ENOUGH[mark]:
        return ""
    smaller = estimate(shape_from_size("7B"), _config(method, mark), machine)
    if smaller.verdict not in _ENOUGH[mark]:
        return ""
    return f" A 7B model with a vocabulary of 32,000 needs {smaller.total_bytes / GB:.1f} GB."


def matrix_markdown() -> str:
    """The matrix as the table of docs/planning.md, with a numbered reason for each cell that differs."""
    cells = {(cell.band, cell.model): cell for cell in matrix()}
    lines = [f"| card | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]
    reasons: list[str] = []
    for band in BANDS:
        row = []
        for model in MODELS:
            cell = cells[band.name, model]
            if not cell.differs:
                row.append(cell.text)
                continue
            reasons.append(f"{len(reasons) + 1}. {band.name}, {model}: {cell.why}")
            row.append(f"**{cell.text}** (document: {cell.documented_text}) [{len(reasons)}]")
        lines.append(f"| {band.name} ({band.card_gb:g} GB) | {' | '.join(row)} |")
    return "\n".join([*lines, "", *reasons])


def disagreements_markdown() -> str:
    """`disagreements` as the table of docs/planning.md."""
    rows = [f"| {d.band} | {d.model} | {d.rule} | {d.matrix} |" for d in disagreements()]
    return "\n".join(["| card | model | documented rule | documented matrix |", "|---|---|---|---|", *rows])
