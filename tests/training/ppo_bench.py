"""The bench of the PPO tests: a tiny model, prompts made by hand, rewards that are plain functions of the drawn tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset

from finetuneflow.config import RunConfig, build_config
from finetuneflow.data.examples import Message
from finetuneflow.data.templates import resolve_template
from finetuneflow.evaluation.rewards import Drawn, Reward
from finetuneflow.events import Event, EventLog, read_events
from finetuneflow.models.adapters import AdapterSpec, attach_adapter
from finetuneflow.models.load import load_base
from finetuneflow.training import checkpoints
from finetuneflow.training.callbacks import Monitor
from finetuneflow.training.ppo import PpoTrainer, ppo_trainer
from finetuneflow.training.progress import Progress
from finetuneflow.training.setup import Setup
from models.tiny import save_tiny

QUESTIONS = ("What is 3 + 4?", "Quelle est la capitale ?", "Who helps the cat?", "a dog asks Marie", "Say hello.", "12 + 30?")
DEFAULTS: dict[str, Any] = {
    "training.objective": "ppo",
    "training.max_steps": 6,
    "training.batch_size": 2,
    "training.gradient_accumulation": 2,
    "training.eval_batch_size": 4,
    "training.log_steps": 2,
    "training.eval_steps": 3,
    "training.save_steps": 2,
    "training.patience": None,
    "training.learning_rate": 0.01,
    "training.warmup_ratio": 0.0,
    "training.precision": "fp32",
    "training.threads": 1,
    "method.r": 4,
    "method.dropout": 0.2,
    "reinforcement.rollout_size": 8,
    "reinforcement.max_new_tokens": 5,
    "reinforcement.update_epochs": 2,
    "reinforcement.missing_end_penalty": 0.0,
}


def paid(function: Callable[[Sequence[int]], float], name: str = "paid") -> Reward:
    """A reward that looks at the tokens of an answer alone."""

    def scorer(drawn: Drawn) -> list[float]:
        return [function(ids) for ids in drawn.ids]

    return Reward(name, 1.0, scorer)


def even_tokens(ids: Sequence[int]) -> float:
    """Share of tokens with an even id: something a tiny model learns in a few steps."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


@dataclass
class PpoBench:
    """Runs of a tiny model in this process. `spec` shapes its adapter; None: the model is tuned in full."""

    root: Path
    base: Path
    spec: AdapterSpec | None = field(default_factory=lambda: AdapterSpec(r=4, dropout=0.2))
    questions: Sequence[str] = QUESTIONS
    rewards: list[Reward] | None = field(default_factory=lambda: [paid(even_tokens)])
    trainer: Any = None

    def config(self, **settings: Any) -> RunConfig:
        values: dict[str, Any] = {"model": {"base": str(self.base)}, "data": {"train": ["unused"]}}
        if self.spec is None:
            values["method"] = {"kind": "full"}
        named = {key.replace("__", "."): value for key, value in settings.items()}
        for key, value in {**DEFAULTS, **named}.items():
            section, _, name = key.partition(".")
            if section == "method" and self.spec is None:
                continue
            values.setdefault(section, {})[name] = value
        return build_config(values)[0]

    def model(self) -> tuple[Any, Any]:
        """The model as a run loads it, and its tokenizer."""
        loaded = load_base(str(self.base), dtype="fp32", device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = attach_adapter(loaded.model, self.spec or AdapterSpec(kind="full"))
        model.config.use_cache = False
        return model, loaded.tokenizer

    def rows(self, template: Any, questions: Iterable[str]) -> Dataset:
        return Dataset.from_list(
            [
                {
                    "index": index,
                    "input_ids": list(template.prompt_ids([Message("user", question)])),
                    "place": f"prompts.jsonl:{index + 1}",
                    "messages": json.dumps([{"role": "user", "content": question}]),
                    "answer": "",
                }
                for index, question in enumerate(questions)
            ]
        )

    def parts(self, run_dir: Path, config: RunConfig, emit: Any) -> dict[str, Any]:
        """What `ppo_trainer` takes."""
        model, tokenizer = self.model()
        template = resolve_template(tokenizer)
        rows = self.rows(template, self.questions)
        training = config.training
        progress = Progress(on_saving=lambda step: emit("phase", name="saving", step=step))
        return {
            "config": config,
            "training": training,
            "setup": setup_of(config),
            "model": model,
            "tokenizer": tokenizer,
            "template": template,
            "prepared": SimpleNamespace(train=rows, eval=rows.select(range(min(3, len(rows))))),
            "monitor": Monitor(emit, progress, training, run_dir, evaluates=True),
            "run_dir": run_dir,
            "rewards": self.rewards,
        }

    def build(self, name: str = "built", **settings: Any) -> PpoTrainer:
        """A trainer that has not begun; its events go nowhere."""
        run_dir = self.root / name
        run_dir.mkdir(parents=True, exist_ok=True)
        self.trainer = ppo_trainer(**self.parts(run_dir, self.config(**settings), lambda event, **fields: {}))
        self.trainer.progress.begin()
        return self.trainer

    def train(self, name: str = "run", *, sinks: Iterable[Callable[[Event], None]] = (), **settings: Any) -> PpoTrainer:
        """Train in the run directory `name`, from its newest checkpoint if it has one."""
        run_dir = self.root / name
        run_dir.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        with EventLog(run_dir / "events.jsonl", list(sinks)) as log:
            parts = self.parts(run_dir, self.config(**settings), log.emit)
            start = None
            if checkpoints.list_complete(run_dir / "checkpoints"):
                start, _ = checkpoints.find_valid(run_dir / "checkpoints")
                parts["monitor"].progress.load_state(json.loads((start.path / "progress.json").read_text()))
            self.trainer = ppo_trainer(**parts)
            self.trainer.train(resume_from_checkpoint=str(start.path) if start else None)
        return self.trainer

    def events(self, name: str = "run") -> list[Event]:
        return list(read_events(self.root / name / "events.jsonl"))


def setup_of(config: RunConfig, **changes: Any) -> Setup:
    values = {
        "device": "cpu",
        "compute_dtype": "float32",
        "storage_dtype": "float32",
        "optimizer": "adamw_torch",
        "gradient_checkpointing": False,
        "learning_rate": config.training.learning_rate,
        "threads": 1,
        "decisions": (),
    }
    return Setup(**{**values, **changes})


def tiny(path: Path, **shape: Any) -> Path:
    """A base of one layer unless `shape` says otherwise."""
    return save_tiny(path, "llama", **{"hidden": 32, "layers": 1, "vocab": 320, **shape})


def state_of(model: Any) -> dict[str, bytes]:
    """All weights as raw bytes."""
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


# --- toys with a known optimum ------------------------------------------------------------------------------

ARMS = tuple(range(100, 108))
END = 3  # the tiny tokenizer's <|im_end|>


def teach_arms(base: Path, questions: Sequence[str], *, arms: Sequence[int] = ARMS, steps: int = 60) -> Path:
    """Train the base in place until each token of an answer is one of the arms, all about equally likely."""
    loaded = load_base(str(base), dtype="fp32", device="cpu")
    template = resolve_template(loaded.tokenizer)
    prompts = [template.prompt_ids([Message("user", question)]) for question in questions]
    model = loaded.model.train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        for prompt in prompts:
            answer = torch.tensor(arms)[torch.randint(len(arms), (4,), generator=draws)].tolist()
            log_probs = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :].log_softmax(dim=-1)
            (-log_probs[:, list(arms)].mean() / len(prompts)).backward()
        optimizer.step()
    model.save_pretrained(base)
    return base


def arm_probabilities(model: Any, prompt: Sequence[int], *, arms: Sequence[int] = ARMS) -> torch.Tensor:
    """How likely the model finds each arm as its next token, in float64."""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].double().softmax(dim=-1)[list(arms)]
