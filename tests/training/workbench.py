"""The bench of the training tests: tiny runs in this process, and ways to interrupt them.

`Bench.config` is a complete run on a two-layer model that takes about a second; a test names only what it is about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuneflow.config import RunConfig, build_config
from finetuneflow.events import Event, metric_lines, read_events
from finetuneflow.training import run as runs
from finetuneflow.workspace import Workspace

# Settings under which two runs may be compared bit for bit, and nothing but training takes time.
DEFAULTS: dict[str, Any] = {
    "name": "bench",
    "data.max_length": 96,
    "data.eval_fraction": 0.2,
    "training.epochs": 2,
    "training.batch_size": 2,
    "training.gradient_accumulation": 2,
    "training.eval_batch_size": 4,
    "training.learning_rate": 0.005,
    "training.log_steps": 3,
    "training.eval_steps": 4,
    "training.save_steps": 4,
    "training.patience": None,
    "training.threads": 1,
    "training.precision": "fp32",
    "evaluation.samples": 0,
}
# What a log line must say, by the documented schema of the live metrics and the progress shown to people.
LOG_FIELDS = frozenset(
    {"seq", "time", "event", "step", "total_steps", "epoch", "loss", "learning_rate", "grad_norm"}
    | {
        "tokens_seen",
        "tokens_per_second",
        "seconds_per_step",
        "eta_seconds",
        "data_wait_share",
        "memory_bytes",
        "peak_memory_bytes",
    }
)
EXACT_FIELDS = ("step", "total_steps", "epoch", "loss", "learning_rate", "grad_norm", "tokens_seen")
EVAL_FIELDS = ("step", "total_steps", "epoch", "eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_tokens")


class Killed(BaseException):
    """Stands for a process that ends here: nothing of the product catches it for good."""


def sums(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Different little exercises: lengths vary, so that padding and token-wise means matter."""
    extras = ("", " Show your work.", " Answer in one short sentence, please.")
    return [
        {
            "instruction": f"What is {n} plus {3 * n + 1}?{extras[n % 3]}",
            "output": f"It is {4 * n + 1}." + (f" I added {n} and {3 * n + 1}." if n % 4 == 0 else ""),
        }
        for n in range(start, start + count)
    ]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Bench:
    """A workspace with a base model and a data file. `report` draws nothing unless a test asks for it."""

    root: Path
    base: Path
    data: Path
    events: list[Event] = field(default_factory=list)

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root / "ws")

    def config(self, **settings: Any) -> RunConfig:
        """A run file with `section__key=value` settings over the bench's defaults."""
        values: dict[str, Any] = {"model": {"base": str(self.base)}, "data": {"train": [str(self.data)]}}
        named = {key.replace("__", "."): value for key, value in settings.items()}
        for key, value in {**DEFAULTS, **named}.items():
            section, _, name = key.rpartition(".")
            (values.setdefault(section, {}) if section else values)[name] = value
        return build_config(values)[0]

    def train(
        self, config: RunConfig | None = None, *, sinks: Iterable[Callable[[Event], None]] = (), **settings: Any
    ) -> runs.RunResult:
        self.events = []
        return runs.train(config or self.config(**settings), workspace=self.workspace, sinks=[self.events.append, *sinks])

    def resume(
        self, run_dir: Path, *, sinks: Iterable[Callable[[Event], None]] = (), accept_changes: bool = False
    ) -> runs.RunResult:
        self.events = []
        return runs.resume(run_dir, workspace=self.workspace, sinks=[self.events.append, *sinks], accept_changes=accept_changes)

    def newest(self) -> Path:
        return self.workspace.run_dir("latest")

    def interrupted(self, when: Callable[[Event], bool], **settings: Any) -> Path:
        """A run that ends, as if killed, right after the first event that `when` accepts."""
        try:
            self.train(sinks=[dies(when)], **settings)
        except BaseException as error:
            if not caused_by(error, Killed):
                raise
        else:
            raise AssertionError("the run ended before the moment at which it was to be interrupted")
        return self.newest()

    def seen(self, event_name: str, /, **fields: Any) -> list[Event]:
        """Events of the newest attempt with that name and those values."""
        return [e for e in self.events if e["event"] == event_name and all(e.get(k) == v for k, v in fields.items())]


def dies(when: Callable[[Event], bool]) -> Callable[[Event], None]:
    def sink(event: Event) -> None:
        if when(event):
            raise Killed

    return sink


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def at(event_name: str, /, **fields: Any) -> Callable[[Event], bool]:
    """Accepts the event of that name with those values, e.g. `at("log", step=6)`."""
    return lambda event: event["event"] == event_name and all(event.get(key) == value for key, value in fields.items())


def lines(run_dir: Path) -> list[tuple[Any, ...]]:
    """All log and evaluation lines in their exact figures, times left out."""
    path = run_dir / "events.jsonl"
    logs = [tuple(event[key] for key in EXACT_FIELDS) for event in metric_lines(path, "log")]
    return logs + [tuple(event[key] for key in EVAL_FIELDS) for event in metric_lines(path, "eval")]


def weights(run_dir: Path) -> dict[str, bytes]:
    """The result as raw bytes per tensor: equality is bit for bit, also of NaN and of signed zeros."""
    from safetensors.numpy import load_file

    adapter = run_dir / "adapter" / "adapter_model.safetensors"
    tensors = load_file(str(adapter if adapter.exists() else run_dir / "model" / "model.safetensors"))
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def assert_same_result(one: Path, two: Path) -> None:
    assert lines(one) == lines(two)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and first
    assert [name for name in first if first[name] != second[name]] == []


def all_events(run_dir: Path) -> list[Event]:
    return list(read_events(run_dir / "events.jsonl"))
