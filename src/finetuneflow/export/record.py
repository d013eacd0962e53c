"""A finished run as a value: everything that report, card, plot and package tell, read once from the run directory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetuneflow.config import RunConfig, load_config
from finetuneflow.errors import ExportError
from finetuneflow.events import metric_lines

METHOD_NAMES = {
    "lora": "LoRA",
    "qlora": "QLoRA (4-bit NF4)",
    "dora": "DoRA",
    "ia3": "IA3",
    "prefix": "Prefix tuning",
    "full": "Full fine-tuning",
}
OBJECTIVE_NAMES = {
    "sft": "Supervised fine-tuning on conversations",
    "pretrain": "Continued pre-training on text",
    "dpo": "Direct preference optimisation (DPO)",
    "kto": "Preference optimisation from single ratings (KTO)",
    "orpo": "Odds-ratio preference optimisation (ORPO)",
    "cpo": "Contrastive preference optimisation (CPO)",
    "simpo": "Simple preference optimisation (SimPO)",
    "reward": "Reward model from preference pairs",
    "grpo": "Group relative policy optimisation (GRPO)",
    "rloo": "REINFORCE leave-one-out (RLOO)",
    "ppo": "Proximal policy optimisation (PPO)",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out prompt with the answer it should have had and the one the tuned model gave."""

    instruction: str
    expected: str
    output: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What the run directory says. Missing files leave empty parts: a report tells what is known."""

    run_dir: Path
    config: RunConfig
    metrics: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    log_lines: list[dict[str, Any]] = field(default_factory=list)
    eval_lines: list[dict[str, Any]] = field(default_factory=list)
    samples: tuple[Sample, ...] = ()
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    @property
    def method(self) -> str:
        """The method in words, with its variant: what really ran, not what most runs use."""
        named = METHOD_NAMES[self.config.method.kind]
        return f"{named}, rank-stabilised" if self.config.method.rslora and self.is_low_rank else named

    @property
    def is_low_rank(self) -> bool:
        return self.config.method.kind in ("lora", "qlora", "dora")

    @property
    def weights_kind(self) -> Literal["adapter", "model"]:
        return "adapter" if self.config.method.is_adapter else "model"

    @property
    def weights_dir(self) -> Path:
        return self.run_dir / self.weights_kind

    @property
    def best_step(self) -> int | None:
        """The step whose weights were kept: as recorded, else that of the lowest evaluation loss."""
        if isinstance(step := self.metrics.get("best_step"), int):
            return step
        measured = [line for line in self.eval_lines if isinstance(line.get("eval_loss"), int | float)]
        return min(measured, key=lambda line: line["eval_loss"])["step"] if measured else None

    @property
    def device(self) -> str:
        """The accelerator by name, or the processor with its threads."""
        hardware = self.environment.get("hardware", self.environment)
        setup = self.environment.get("setup", self.environment)
        gpus = [gpu.get("name", "GPU") for gpu in hardware.get("gpus") or [] if isinstance(gpu, dict)]
        if gpus and setup.get("device") != "cpu":
            return gpus[0] if len(gpus) == 1 else f"{len(gpus)} x {gpus[0]}"
        cpu = hardware.get("cpu") or {}
        threads = setup.get("threads")
        model = (cpu.get("model") if isinstance(cpu, dict) else None) or "model not recorded"
        return f"none; CPU: {model}" + (f", {threads} thread(s)" if threads else "")


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory; raises `EXPORT_NO_RUN` where there is no run."""
    if not (run_dir / "run.yaml").is_file():
        raise ExportError(
            "EXPORT_NO_RUN",
            f"{run_dir} is no run directory: it holds no run.yaml.",
            remedy="`ftf runs` lists the runs there are.",
        )
    metrics = _read_object(run_dir / "metrics.json")
    return RunRecord(
        run_dir=run_dir,
        config=load_config(run_dir / "run.yaml")[0],
        metrics=metrics,
        environment=_read_object(run_dir / "environment.json"),
        data=_read_object(run_dir / "data/manifest.json"),
        log_lines=metric_lines(run_dir / "events.jsonl", "log"),
        eval_lines=metric_lines(run_dir / "events.jsonl", "eval"),
        samples=tuple(_samples_in(metrics) or _evaluated_samples(run_dir / "evals")),
        plan=_read_object(run_dir / "plan.json"),
    )


def require_weights(record: RunRecord) -> Path:
    """The folder with the trained weights, or an error that says why there is none yet."""
    if not any(record.weights_dir.glob("*.safetensors")):
        raise ExportError(
            "EXPORT_NO_WEIGHTS",
            f"The run {record.name} has no finished weights ({record.weights_kind}/ holds no .safetensors file).",
            where=str(record.weights_dir),
            remedy=f"If it was interrupted, end it first: `ftf resume {record.name}`.",
        )
    return record.weights_dir


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            "EXPORT_RUN_DAMAGED",
            f"{path.name} of this run cannot be read: {error}.",
            where=str(path),
            remedy="Restore the file from a copy.",
        ) from error
    return value if isinstance(value, dict) else {}


def _evaluated_samples(evals_dir: Path) -> list[Sample]:
    """Samples of the newest evaluation that has any: for a run that made none when it ended."""
    paths = sorted(evals_dir.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    return next((found for path in paths if (found := _samples_in(_read_object(path)))), [])


def _samples_in(content: dict[str, Any]) -> list[Sample]:
    rows = content.get("inference_samples") or content.get("samples") or []
    return [sample for row in rows if isinstance(row, dict) and (sample := _sample(row))]


def _sample(row: dict[str, Any]) -> Sample | None:
    instruction = row.get("instruction") or row.get("prompt")
    output = row.get("model_output", row.get("output"))
    if not isinstance(instruction, str) or not isinstance(output, str):
        return None
    extra = row.get("input")
    question = f"{instruction}\n{extra}" if isinstance(extra, str) and extra else instruction
    return Sample(question, str(row.get("expected_output", row.get("expected", ""))), output)
