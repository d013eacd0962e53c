"""How a run stands, told from its directory alone. No torch: listing runs must be instant."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from finetuneflow.config import load_config
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.events import read_events
from finetuneflow.workspace import lock_owner, write_json

STOP_FILE = "stop.json"
ENDINGS = {"complete": "succeeded", "stopped": "stopped", "failed": "failed"}


def request_stop(run_dir: Path, *, save: bool = True) -> None:
    """Ask a running run to stop after its current step, with or without saving a checkpoint first."""
    write_json(run_dir / STOP_FILE, {"save": save})


def forget_stop(run_dir: Path) -> None:
    """Drop a request that nobody answered."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def run_status(run_dir: Path) -> str:
    """`running`, `succeeded`, `stopped`, `failed`, or `interrupted` (its process died without a word)."""
    if lock_owner(run_dir) is not None:
        return "running"
    last = before = ""
    for event in read_events(run_dir / "events.jsonl"):
        if event["event"] == "started":
            last, before = "started", last
        elif event["event"] == "failed" and str(event["code"]).startswith("RESUME_"):
            last = before  # a resume that was refused changed nothing
        elif event["event"] in ENDINGS:
            last = event["event"]
    return ENDINGS.get(last, "interrupted")


def run_summary(run_dir: Path) -> dict[str, Any]:
    """One line of `ftf runs`. A run whose file is damaged is listed as such, never hidden."""
    summary: dict[str, Any] = {
        "run": run_dir.name,
        "path": str(run_dir),
        "status": run_status(run_dir),
        "method": None,
        "base": None,
    }
    try:
        config, _ = load_config(run_dir / "run.yaml")
        summary |= {"method": config.method.kind, "base": config.model.base}
    except FineTuneFlowError:
        summary["status"] = "damaged"
    figures: dict[str, Any] = {
        "step": None,
        "total_steps": None,
        "loss": None,
        "eval_loss": None,
        "started": None,
        "seconds": None,
    }
    first = last = None
    for event in read_events(run_dir / "events.jsonl"):
        first, last = first or event["time"], event["time"]
        for name in ("step", "total_steps", "loss", "eval_loss"):
            if name in event and event["event"] in ("log", "eval"):
                figures[name] = event[name]
    if first and last:
        figures["started"] = first
        figures["seconds"] = (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    return summary | figures
