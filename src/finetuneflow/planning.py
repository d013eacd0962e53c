"""Gather what `knowledge` is asked about: this machine, a base model's small files, a sample of the data.

Nothing here loads torch, downloads weights or reads a large file to its end: a plan answers in under a second.
What was sampled or assumed instead of read is written into `notes`.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import platform
import re
import signal
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from finetuneflow.config import Data, Origin, RunConfig, load_config
from finetuneflow.data.examples import Example, Problem, to_examples
from finetuneflow.data.examples import Mapping as Columns
from finetuneflow.data.similarity import exact_key
from finetuneflow.data.sources import Row, read_rows, sniff
from finetuneflow.data.streams import BLOCK_BYTES
from finetuneflow.errors import DataError, FineTuneFlowError, HardwareError, ModelError
from finetuneflow.events import read_events
from finetuneflow.hardware import Cpu, Gpu, Hardware, probe
from finetuneflow.knowledge import facts
from finetuneflow.knowledge.cost import Cost, Efficiency, efficiency_from, estimate_cost, share_reached
from finetuneflow.knowledge.explain import Diagnosis, diagnose
from finetuneflow.knowledge.memory import correction_from
from finetuneflow.knowledge.outcome import compare
from finetuneflow.knowledge.shapes import ModelShape, known_shape, shape_from_config, shape_from_size, size_in_name
from finetuneflow.knowledge.situation import Situation, completed
from finetuneflow.knowledge.values import DataFacts, Device, Machine, ModelFacts
from finetuneflow.models.source import HUB_ID
from finetuneflow.training.status import run_status
from finetuneflow.workspace import Workspace

SAMPLE_SECONDS = 0.15
SAMPLE_ROWS = 100  # of each file are read however long it takes
SIZE_SECONDS = 0.05  # for finding out how large a compressed file is
SPLIT_EXAMPLES = 2_000  # up to here the split is made as the run will make it: a tenth of a second
USABLE_KINDS = frozenset({"chat", "text"})  # what the objectives take; a test compares
SAMPLE_CHARS = 200_000  # as many are put through the tokenizer: less than a tenth of a second
SAMPLE_LENGTHS = 20_000  # examples whose characters are counted
TOKENIZER_BYTES = 12_000_000  # a larger tokenizer.json takes longer to load than a plan may take
HUB_SECONDS = 2.0
TURN_TOKENS = 5  # what a chat template writes around a turn: 4 to 6 in the common ones
CHARS_PER_TOKEN = 4.0  # English prose with vocabularies of 32k to 150k; French and code have fewer
PART_BYTES = 1_000_000
LEARNED_RUNS = 50  # the newest ones

HAND_FORMATS = {
    "### Instruction:": "Alpaca",
    "[INST]": "Llama 2",
    "<|im_start|>": "ChatML",
    "<|start_header_id|>": "Llama 3",
    "\nAssistant:": "User: / Assistant:",
    "USER: ": "Vicuna",
}


@dataclass(frozen=True, slots=True)
class Look:
    """A run about to be started, as far as it is known without loading anything heavy. `notes`: what was assumed."""

    situation: Situation
    base: BaseModel
    learned: Learned
    notes: tuple[str, ...] = ()

    def cost_with(self, data: DataFacts | None = None) -> Cost | None:
        """Time, price, energy and CO2 of the run; None where the size of the data is not known."""
        data = data or self.situation.data
        if data is None or self.situation.machine is None:
            return None
        return estimate_cost(
            self.base.shape,
            self.situation.config,
            self.situation.machine,
            data,
            self.situation.resolved,
            efficiency=self.learned.efficiency,
            country=self.situation.config.training.country,
        )


def look(
    config: RunConfig,
    origins: Mapping[str, Origin] | None = None,
    *,
    workspace: Workspace | None = None,
    gpu: str | None = None,
    count: int = 1,
    model: str | None = None,
    machine: Machine | None = None,
    network: bool = True,
    threads: int | None = None,
) -> Look:
    """Everything that a plan, the linter or a score asks about a run.

    `gpu`, `count`: a machine that is named instead of this one. `model`: a base other than the run file's.
    """
    if machine is None:
        machine = facts.machine_named(gpu, count) if gpu else machine_here(device=config.training.device)
    base = look_at_model(model or config.model.base, revision=config.model.revision, network=network)
    tokenizer = _load_tokenizer(base.folder)
    supervise = "all" if config.training.objective == "pretrain" else config.data.supervise
    data, notes = look_at_data(config.data, tokenizer, supervise=supervise, seed=config.training.seed)
    learned = learn(workspace or Workspace(), machine)
    described = base.facts if tokenizer is None else replace(base.facts, vocabulary_size=tokenizer.get_vocab_size())
    added = None if tokenizer is None else frozenset(token.content for token in tokenizer.get_added_tokens_decoder().values())
    situation = Situation(
        config=config,
        origins=origins,
        machine=machine,
        shape=base.shape,
        model=described,
        data=data,
        cpu_threads=threads or config.training.threads,
        added_tokens=added,
        correction=learned.memory_correction,
    )
    return Look(completed(situation), base, learned, (*base.notes, *notes, *learned.notes))


# --- earlier runs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Learned:
    """What finished runs on the same kind of machine teach: by how much memory and time were predicted wrongly.

    `efficiency`: share of the device's rate that runs reached; None before the first one.
    """

    memory_correction: float = 1.0
    efficiency: Efficiency | None = None
    runs: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.runs:
            return ()
        return (
            f"Corrected by {self.runs} earlier run{'s' if self.runs > 1 else ''} on this machine (memory x {self.memory_correction:.2f}).",
        )


def learn(workspace: Workspace, machine: Machine) -> Learned:
    """Compare `plan.json` with `metrics.json` of the newest finished runs of this workspace on such a device."""
    outcomes = []
    for name in workspace.run_names()[-LEARNED_RUNS:]:
        folder = workspace.runs_dir / name
        plan, metrics = _read_json(folder / "plan.json"), _read_json(folder / "metrics.json")
        if plan and metrics and plan.get("device") == machine.device.name:
            outcomes.append(compare(plan, metrics))
    ratios = [outcome.memory_ratio for outcome in outcomes if outcome.memory_ratio is not None]
    shares = [
        share_reached(o.flops, o.measured_seconds, machine.device, compute_dtype=o.compute_dtype or "bfloat16")
        for o in outcomes
        if o.flops and o.measured_seconds
    ]
    return Learned(correction_from(ratios), efficiency_from([share for share in shares if share]), len(ratios))


# --- failures -----------------------------------------------------------------------------------------


def diagnose_failure(code: str | None, text: str, situation: Situation | None, *, exit_status: int | None = None) -> Diagnosis:
    """`explain.diagnose` with remedies computed for this run, where it is known well enough."""
    if situation is None:
        return diagnose(code, text, exit_status)

    def what_if(settings: dict[str, Any]) -> int:
        changed = situation.memory_with(settings)
        if changed is None:
            raise HardwareError("MEMORY_WONT_FIT", "The memory of these settings is not known.")
        return changed.total_bytes

    predicts = situation.estimate is not None
    return diagnose(
        code,
        text,
        exit_status,
        config=situation.config,
        estimate=situation.estimate,
        machine=situation.machine,
        what_if=what_if if predicts else None,
    )


def diagnose_run(run_dir: Path, exit_status: int | None = None) -> Diagnosis | None:
    """Why a run failed, from its directory; None where it has not. `exit_status`: of its process, where somebody saw it."""
    status = run_status(run_dir)
    failed, started = None, ""
    for event in read_events(run_dir / "events.jsonl"):
        failed = event if event["event"] == "failed" else None if event["event"] in ("started", "complete") else failed
        started = event["time"] if event["event"] == "started" else started
    if failed is None and exit_status is None:
        if status != "interrupted":
            return None
        exit_status = -signal.SIGKILL  # no last word: nothing else ends a process like that
    text = f"{failed.get('message', '')}\n{failed.get('where') or ''}" if failed else ""
    if failed is not None:
        text = f"{_traceback(run_dir / 'traceback.txt', started)}\n{text}"
    situation = None
    with contextlib.suppress(FineTuneFlowError):
        config, origins = load_config(run_dir / "run.yaml")
        workspace = Workspace(run_dir.parent.parent)
        try:
            situation = look(config, origins, workspace=workspace, network=False).situation
        except DataError:  # the files have gone since: lengths are then those of data.max_length
            without = config.model_copy(update={"data": config.data.model_copy(update={"train": [], "eval": []})})
            situation = look(without, origins, workspace=workspace, network=False).situation
    return diagnose_failure(failed.get("code") if failed else None, text, situation, exit_status=exit_status)


def _traceback(path: Path, started: str) -> str:
    """The traceback of the attempt that started then; an older one is of another failure."""
    with contextlib.suppress(OSError, ValueError):
        if path.stat().st_mtime >= datetime.fromisoformat(started).timestamp():
            return path.read_text(encoding="utf-8", errors="replace")
    return ""


# --- machine ------------------------------------------------------------------------------------------


def machine_here(hardware: Hardware | None = None, *, device: str = "auto") -> Machine:
    """This machine as a `Machine`. `device="cpu"` leaves its GPUs out. Never raises."""
    hardware = hardware or probe(ask_torch=False)
    total = hardware.memory.total_bytes
    gpus = () if device == "cpu" else tuple(_gpu_device(gpu, total) for gpu in hardware.gpus)
    usable = tuple(gpu for gpu in gpus if gpu.name == gpus[0].name)
    return Machine(
        devices=usable or (_cpu_device(hardware.cpu, total),),
        host_memory_bytes=total,
        cores=hardware.cpu.cores_granted,
        bitsandbytes=hardware.bitsandbytes is not None or "torch" not in hardware.packages,
    )


def _gpu_device(gpu: Gpu, host_memory_bytes: int) -> Device:
    """A card as found: its memory as the driver tells it, its rates from the table where it is a known one.

    A driver that tells no memory is that of a chip which shares the machine's.
    """
    try:
        known = facts.gpu(gpu.name)
    except FineTuneFlowError:
        return Device(gpu.name, gpu.kind, gpu.memory_total_bytes or host_memory_bytes, bf16=gpu.bf16)
    return replace(
        known,
        name=gpu.name,
        memory_bytes=gpu.memory_total_bytes or known.memory_bytes,
        bf16=known.bf16 if gpu.bf16 is None else gpu.bf16,
    )


def _cpu_device(cpu: Cpu, memory_bytes: int) -> Device:
    return facts.cpu_device(
        name=cpu.model or platform.processor() or "CPU",
        cores=cpu.cores_granted,
        features=cpu.features,
        memory_bytes=memory_bytes,
    )


# --- base model ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the small files of a base model say. `folder` is where they lie, if they lie on this disk."""

    shape: ModelShape
    facts: ModelFacts
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def look_at_model(base: str, *, revision: str | None = None, network: bool = True) -> BaseModel:
    """Shape and facts of a base model named as in a run file, or by its size alone ("7B").

    Looks on this disk, then in the hub's cache, then in the table of known models, then asks the hub for its
    config.json (two seconds at most), then reads the size out of the name; says which it was.
    Raises `ModelError` where nothing of that leads to a shape, `ConfigError` for a size that no model has.
    """
    if (folder := _local_folder(base, revision)) is not None:
        config = _read_json(folder / "config.json")
        if config is None:
            raise ModelError(
                "MODEL_NOT_FOUND",
                f"{base} holds no readable config.json.",
                where=str(folder),
                remedy="Name the folder that holds config.json and model.safetensors.",
            )
        return BaseModel(shape_from_config(config, name=base), _facts_in(folder, base, config), folder)
    if re.fullmatch(r"\d+(\.\d+)?\s*[kKmMbBtT]", base):
        shape = shape_from_size(base)
        return BaseModel(shape, ModelFacts(base), notes=(f"The shape of {base} is a typical one of that size.",))
    if (known := known_shape(base)) is not None:
        return BaseModel(known, ModelFacts(base, model_type=known.model_type, max_position=known.max_position))
    if os.path.isfile(base) or not HUB_ID.fullmatch(base):
        raise ModelError("MODEL_NOT_FOUND", f"There is no folder {base!r:.200}.", remedy="Check the path, or name a hub id.")
    answer = _ask_hub(base, revision) if network else Unanswered("the hub was not asked")
    if isinstance(answer, BaseModel):
        return answer
    if size := size_in_name(base):
        shape = shape_from_size(size)
        note = f"{base} is neither on this disk nor known, and {answer.why}: a typical shape of {size} is assumed."
        described = ModelFacts(base, licence=answer.licence, gated=answer.gated)
        return BaseModel(replace(shape, name=base), described, notes=(note,))
    raise ModelError(
        "MODEL_NOT_FOUND",
        f"Nothing is known about the shape of {base!r}: no folder of that name, not in the cache, and {answer.why}.",
        remedy="Give a folder with a config.json, a hub id that can be reached, or a size such as 7B.",
    )


def _local_folder(base: str, revision: str | None) -> Path | None:
    if base == "starter":
        from finetuneflow.models.starter import starter_path

        return starter_path()
    path = os.path.expanduser(base)
    if base and os.path.isdir(path):
        return Path(path)
    repository = _hub_cache() / f"models--{base.replace('/', '--')}"
    try:
        commit = (repository / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        commit = revision or ""
    folder = repository / "snapshots" / commit
    return folder if commit and os.path.isfile(folder / "config.json") else None


def _hub_cache() -> Path:
    """Where the hub's client keeps models, by the variables it reads."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(cache or os.path.join(home, "hub")))


def _facts_in(folder: Path, name: str, config: dict[str, Any]) -> ModelFacts:
    tokenizer = _read_json(folder / "tokenizer_config.json") or {}
    template = _template_in(tokenizer.get("chat_template"))
    with contextlib.suppress(OSError, ValueError):
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config  # of a model with eyes, the language part
    quantized = config.get("quantization_config")
    positions = text.get("max_position_embeddings") or text.get("n_positions")
    return ModelFacts(
        name=name,
        model_type=_word(config.get("model_type")),
        stored_dtype=_word(config.get("dtype")) or _word(config.get("torch_dtype")),
        quantized_as=_word(quantized.get("quant_method")) if isinstance(quantized, dict) else None,
        chat_template=template,
        pad_token=_token_text(tokenizer.get("pad_token")),
        eos_token=_token_text(tokenizer.get("eos_token")),
        max_position=positions if isinstance(positions, int) and not isinstance(positions, bool) and positions > 0 else None,
        licence=_licence(folder / "README.md"),
        has_own_code="auto_map" in config,
        config=config,
    )


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _template_in(value: Any) -> str | None:
    """A chat template, or the default one of a list of named ones."""
    named = (
        {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        if isinstance(value, list)
        else {}
    )
    return _word(named.get("default")) or _word(value)


def _token_text(value: Any) -> str | None:
    return _word(value.get("content") if isinstance(value, dict) else value)


def _licence(card: Path) -> str | None:
    """`license:` of a model card's front matter."""
    try:
        with card.open(encoding="utf-8") as file:
            head = file.read(20_000)
    except (OSError, ValueError):
        return None
    front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
    found = re.search(r"^license(?:_name)?:\s*[\"']?([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Why the hub gave no config.json, and what its card says all the same."""

    why: str
    licence: str | None = None
    gated: bool | None = None


def _ask_hub(base: str, revision: str | None) -> BaseModel | Unanswered:
    """config.json and card data from the hub, without a token."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Unanswered("the hub was not asked (HF_HUB_OFFLINE)")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        return Unanswered("the hub was not asked (HF_ENDPOINT is no web address)")
    name = urllib.parse.quote(base, safe="/")
    wanted = urllib.parse.quote(revision or "main", safe="", errors="replace")
    config, card = _get_json(f"{endpoint}/{name}/resolve/{wanted}/config.json", f"{endpoint}/api/models/{name}")
    card = card if isinstance(card, dict) else {}
    details = card.get("cardData")
    licence = _word(details.get("license")) if isinstance(details, dict) else None
    gated = bool(card["gated"]) if "gated" in card else None
    if isinstance(config, dict):
        described = replace(_facts_in(Path(os.devnull), base, config), licence=licence, gated=gated)
        return BaseModel(shape_from_config(config, name=base), described, notes=("Its config.json was read from the hub.",))
    why = "it is gated: its config.json cannot be read without consent" if gated else "the hub gave no config.json"
    return Unanswered(why, licence, gated)


def _get_json(*urls: str) -> list[Any]:
    """What these addresses answer within `HUB_SECONDS`, None for each that gives no JSON.

    Each is asked in a thread of its own: looking up a name and a server that drips know no time limit.
    """
    answers: list[Any] = [None] * len(urls)

    def ask(index: int) -> None:
        try:
            with _opener().open(urls[index], timeout=HUB_SECONDS) as answer:
                answers[index] = json.loads(answer.read(PART_BYTES))
        except (OSError, ValueError, RecursionError, http.client.HTTPException):
            return

    threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(len(urls))]
    deadline = time.monotonic() + HUB_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(answers)


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to a web address that is no less safe than the one asked."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_WebRedirects)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# --- data ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Part:
    """What was read of one file. `share`: of its bytes or rows."""

    examples: list[Example] = field(default_factory=list)
    rejected: int = 0
    unsuited: Counter[str] = field(default_factory=Counter)
    share: float = 1.0

    def in_all(self, count: int) -> int:
        """A number of the part, for the whole file."""
        return round(count / self.share)


@dataclass(frozen=True, slots=True)
class _Sample:
    """What was read of some files."""

    parts: tuple[_Part, ...]
    limit: int | None

    @property
    def examples(self) -> list[Example]:
        return [example for part in self.parts for example in part.examples]

    @property
    def estimated_examples(self) -> int:
        total = sum(part.in_all(len(part.examples)) for part in self.parts)
        return total if self.limit is None else min(total, self.limit)

    @property
    def is_whole(self) -> bool:
        return all(part.share == 1 for part in self.parts)

    def spread(self, most: int) -> list[Example]:
        """At most so many examples, evenly over each file (files are often sorted), from each by its size."""
        sizes = [part.in_all(len(part.examples)) for part in self.parts]
        share = min(most / max(sum(sizes), 1), *(part.share for part in self.parts))
        chosen: list[Example] = []
        for part, size in zip(self.parts, sizes, strict=True):
            count = min(len(part.examples), max(1, round(size * share)))
            chosen += [part.examples[index * len(part.examples) // count] for index in range(count)]
        return chosen


def look_at_data(
    data: Data, tokenizer: Any = None, *, supervise: str | None = None, seed: int = 42
) -> tuple[DataFacts | None, tuple[str, ...]]:
    """Figures of a run's training data from a sample, and notes on what was assumed; None where no file is named.

    `tokenizer`: of the `tokenizers` library; without one, lengths come from characters. `supervise`: what enters the
    loss, where it is not what `data` says. `seed`: of the split. Only examples of `USABLE_KINDS` count.
    Raises `DataError` for a file that is missing or is no dataset, and for data that cannot be split.
    """
    if not data.train:
        return None, ()
    train = _sample(data.train, data, SAMPLE_SECONDS)
    held_out = _sample(data.eval, data, SAMPLE_SECONDS / 3) if data.eval else None
    examples = train.examples
    unsuited: Counter[str] = sum((part.unsuited for part in train.parts), Counter())
    rejected = sum(part.in_all(part.rejected) for part in train.parts)
    kinds = " and ".join(f"{count:,} {kind}" for kind, count in sorted(unsuited.items()))
    if not examples:
        raise DataError(
            "DATASET_NOTHING_USABLE",
            f"No example can be used in what was read of {', '.join(data.train)} ({rejected:,} rows rejected"
            + (f", {kinds} examples are for other objectives)." if kinds else ")."),
            remedy=f"See why: ftf data check {data.train[0]}",
        )
    num_train, num_eval = _divided(train, held_out, data, seed)
    lengths, supervised = _lengths(train, tokenizer, supervise or data.supervise)
    notes: tuple[str, ...] = ()
    if tokenizer is None:
        notes = (f"Tokens are estimated from characters ({CHARS_PER_TOKEN:g} per token); `ftf data check --model` counts them.",)
    if not train.is_whole:
        share = len(examples) / max(sum(part.in_all(len(part.examples)) for part in train.parts), 1)
        notes = (*notes, f"{len(examples):,} examples were read, {_percent(share)} of the files; the number of all is estimated.")
    if kinds:
        notes = (*notes, f"{kinds} examples are for other objectives and are left out.")
    keys = {exact_key(example) for example in examples}
    shown = train.spread(SAMPLE_LENGTHS)
    return (
        DataFacts(
            examples=num_train,
            eval_examples=num_eval,
            mean_tokens=sum(lengths) / len(lengths),
            length_percentiles=_percentiles(lengths),
            supervised_share=supervised,
            counted=tokenizer is not None,
            kinds=tuple(sorted({example.kind for example in examples})),
            turns_mean=sum(len(example.messages) for example in shown) / len(shown),
            duplicate_share=1 - len(keys) / len(examples),
            eval_overlap=sum(exact_key(example) in keys for example in held_out.examples) if held_out else None,
            rejected=rejected,
            hand_formatted=_hand_format(train.spread(200)),
        ),
        notes,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def _divided(train: _Sample, held_out: _Sample | None, data: Data, seed: int) -> tuple[int, int]:
    """Examples that train and that are held out, as `data.prepare` divides them."""
    total = train.estimated_examples
    if held_out is not None:
        return total, held_out.estimated_examples
    fraction = min(data.eval_fraction, data.eval_limit / total)
    if fraction <= 0 or total < 2:
        return total, 0
    if train.is_whole and total <= SPLIT_EXAMPLES:
        from finetuneflow.data.splits import split

        parts = split(train.examples, eval_fraction=fraction, seed=seed)
        return len(parts.train_indices), len(parts.eval_indices)
    num_eval = max(1, round(total * fraction))
    return total - num_eval, num_eval


def _sample(names: Sequence[str], data: Data, seconds: float) -> _Sample:
    """Read for `seconds`, an equal time for each file; no further than `data.limit` goes."""
    for name in names:
        if not os.path.isfile(name):
            raise DataError(
                "DATASET_NOT_FOUND",
                f"There is no file {name!r}.",
                where="data.train / data.eval",
                remedy="Check the spelling; the path counts from the folder the command runs in.",
            )
    found = _Sample((), data.limit)
    for name in names:
        left = None if data.limit is None else data.limit - found.estimated_examples
        if left is not None and left <= 0:
            break
        found = _Sample((*found.parts, _sample_file(Path(name), data, left, seconds / len(names))), data.limit)
    return found


def _sample_file(path: Path, data: Data, limit: int | None, seconds: float) -> _Part:
    """The usable examples among the first rows of a file."""
    part, reading = _Part(), _Reading(path, data.encoding, time.monotonic() + seconds)
    mapping = Columns(**data.mapping) if data.mapping else None
    for item in to_examples(reading.rows(), mapping, tree_paths=data.tree_paths):
        if isinstance(item, Problem):
            part.rejected += 1
        elif item.kind in USABLE_KINDS:
            part.examples.append(item)
        else:
            part.unsuited[item.kind] += 1
        if limit is not None and len(part.examples) >= limit:
            return part  # the run reads no further either
    part.share = reading.share()
    return part


@dataclass(slots=True)
class _Reading:
    """The rows of a file until a moment, and then what share of the file that was."""

    path: Path
    encoding: str | None
    deadline: float
    count: int = 0
    first: Row | Problem | None = None
    next: Row | Problem | None = None  # the first row that was not given out
    on_first_line: list[Any] = field(default_factory=list)

    def rows(self) -> Iterator[Row | Problem]:
        for row in read_rows(self.path, encoding=self.encoding):
            if self.count >= SAMPLE_ROWS and time.monotonic() > self.deadline:
                self.next = row
                return
            self.first = self.first or row
            if isinstance(row, Row) and row.place.line == self.first.place.line:
                self.on_first_line.append(row.fields)
            self.count += 1
            yield row

    def share(self) -> float:
        if self.next is None or self.first is None:
            return 1.0
        source = sniff(self.path, encoding=self.encoding)
        if source.format == "parquet":
            return self.count / max(_parquet_rows(self.path, source.compression), self.count)
        line, first_line = self.next.place.line or 1, self.first.place.line or 1
        before, whole, escaped, compact = _plain_bytes(self.path, source.compression, line)
        if line == first_line:  # a list on one line: as long as its rows when they are written again
            style: dict[str, Any] = {"ensure_ascii": escaped, "separators": (",", ":") if compact else (", ", ": ")}
            texts = (json.dumps(fields, default=str, **style) for fields in self.on_first_line)
            before = sum(len(text.encode("utf-8", "replace")) + (1 if compact else 2) for text in texts)
        return min(1.0, max(before, 1) / max(whole, 1))


def _parquet_rows(path: Path, compression: str | None) -> int:
    """Rows of a Parquet file by its own footer; 0 where the file itself is compressed."""
    import pyarrow.parquet as pq

    return 0 if compression else int(pq.ParquetFile(path).metadata.num_rows)


def _plain_bytes(path: Path, compression: str | None, line: int) -> tuple[int, float, bool, bool]:
    """(bytes before a line, bytes of the whole file, whether its beginning escapes letters, and is without spaces).

    A compressed file is unpacked for `SIZE_SECONDS`; what is left is taken to pack as well as what was unpacked.
    """
    size, deadline = path.stat().st_size, time.monotonic() + SIZE_SECONDS
    before, read, lines, found = 0, 0, 1, line <= 1
    escaped = compact = False
    with path.open("rb") as file, contextlib.suppress(EOFError, OSError, zlib.error):
        source = _unpacked(file, compression)
        while block := source.read(BLOCK_BYTES):
            if read == 0:
                escaped, compact = b"\\u" in block, block.count(b'": ') * 2 < block.count(b'":')
            if not found and lines + (ends := block.count(b"\n")) < line:
                lines += ends
            elif not found:
                at = 0
                for _ in range(line - lines):
                    at = block.index(b"\n", at) + 1
                before, found = read + at, True
            read += len(block)
            if found and (compression is None or time.monotonic() > deadline):
                rest = size - file.tell()
                return before, size if compression is None else read * size / max(size - rest, 1), escaped, compact
    return before if found else read, float(read), escaped, compact


def _unpacked(file: IO[bytes], compression: str | None) -> IO[bytes]:
    if compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if compression == "zstd":
        import zstandard

        return cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file


def _load_tokenizer(folder: Path | None) -> Any:
    """The `tokenizers` object of a model folder, or None where there is none that loads at once."""
    path = folder / "tokenizer.json" if folder else None
    if path is None or not path.is_file() or path.stat().st_size > TOKENIZER_BYTES:
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises a bare Exception; loading the model will say what is wrong
        return None


def _lengths(sample: _Sample, tokenizer: Any, supervise: str) -> tuple[list[int], float]:
    """Tokens of each example of a part of the sample, and the share of them in the loss; estimated without a tokenizer."""
    chosen = [_pieces(example, supervise) for example in sample.spread(SAMPLE_LENGTHS)]
    if tokenizer is not None:
        chars = sum(len(text) for pieces in chosen for text, _ in pieces)
        step = max(1, -(-chars // SAMPLE_CHARS), len(chosen) // 1_000)
        chosen = chosen[::step]
    texts = [text for pieces in chosen for text, _ in pieces]
    numbers = iter(_token_numbers(texts, tokenizer))
    lengths, supervised = [], 0
    for pieces in chosen:
        around = 1 if len(pieces) == 1 else TURN_TOKENS
        length = 0
        for _, own in pieces:
            number = next(numbers)
            length += number + around
            supervised += (number + (around if supervise == "all" else 1)) if own else 0
        lengths.append(length)
    return lengths, min(1.0, supervised / max(sum(lengths), 1))


def _token_numbers(texts: list[str], tokenizer: Any) -> list[int]:
    """Tokens of each text; of a very long one, as many as its beginning promises."""
    if tokenizer is None:
        return [round(len(text) / CHARS_PER_TOKEN) for text in texts]
    encoded = tokenizer.encode_batch([text[:SAMPLE_CHARS] for text in texts], add_special_tokens=False)
    return [round(len(encoding.ids) * max(1.0, len(text) / SAMPLE_CHARS)) for text, encoding in zip(texts, encoded, strict=True)]


def _pieces(example: Example, supervise: str) -> list[tuple[str, bool]]:
    """The texts of an example, each with whether it enters the loss."""
    if example.text is not None:
        return [(example.text, True)]
    last = max((index for index, message in enumerate(example.messages) if message.role == "assistant"), default=-1)
    pieces = [(json.dumps(example.tools, ensure_ascii=False), supervise == "all")] if example.tools else []
    for index, message in enumerate(example.messages):
        answer = message.role == "assistant" and message.weight > 0 and (supervise == "assistant" or index == last)
        calls = "".join(f"{call.name}{json.dumps(call.arguments, ensure_ascii=False)}" for call in message.tool_calls)
        pieces.append((message.content + calls, supervise == "all" or answer))
    return pieces


def _percentiles(lengths: list[int]) -> tuple[int, ...]:
    ordered = sorted(lengths)
    return tuple(ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))] for p in range(101))


def _hand_format(examples: list[Example]) -> str | None:
    """The name of a chat format that most rows hold as plain text, as if a template had been applied by hand."""
    seen: dict[str, int] = {}
    for example in examples:
        text = example.text or "".join(message.content for message in example.messages[:2])
        for mark, name in HAND_FORMATS.items():
            seen[name] = seen.get(name, 0) + (mark in text)
    name, hits = max(seen.items(), key=lambda item: item[1], default=("", 0))
    return name if hits > len(examples) / 2 else None
