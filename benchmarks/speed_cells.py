"""What `benchmarks.speed` trains on: shapes with random weights, real rows, one tokenizer, and the operations they take.

`prepare` leaves a folder that every contender reads: `base/` (model and tokenizer), `rows.jsonl` (what a user of ours
would have) and `tokens.json` (the same rows as tokens and labels, in the order of our sampler). The tokens are those of our
data room, so that contenders that take finished tokens train on exactly what ours trains on.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 42
VOCABULARY = 49_152
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
# No line break behind a turn: every boundary of a turn is a control token, so that prompt and answer tokenized apart (as
# LLaMA-Factory does) give the tokens of the whole.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int  # input and output embeddings are tied

    @property
    def layer_weights(self) -> int:
        """Weights of all matrix products but the vocabulary's."""
        kv = self.hidden // self.heads * self.kv_heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.ffn)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary


@dataclass(frozen=True, slots=True)
class Rows:
    """`batch` rows make an optimizer step; no row is longer than `max_length`. `words`: (prompt, answer) of synthetic rows."""

    objective: str
    batch: int
    max_length: int
    files: tuple[str, ...]
    words: tuple[int, int]


SHAPES = {
    "135m": Shape(hidden=576, layers=30, heads=9, kv_heads=3, ffn=1_536, vocabulary=49_152),
    "0.5b": Shape(hidden=896, layers=24, heads=14, kv_heads=2, ffn=4_864, vocabulary=151_936),
}
ROWS = {
    "short": Rows("sft", 8, 256, ("metropole/metropole.jsonl",), (12, 14)),
    "alpaca": Rows("sft", 8, 512, ("alpaca/alpaca_data.json.gz",), (20, 60)),
    "long": Rows("pretrain", 2, 2_048, ("llamafactory/wiki_demo.txt",), (0, 1_500)),
    "pairs": Rows("dpo", 2, 512, ("llamafactory/dpo_en_demo.json",), (30, 120)),
}
METHODS = ("lora", "qlora", "full")
CELLS = (
    *(f"{method}-{shape}-{rows}" for method in METHODS for shape in SHAPES for rows in ("short", "alpaca", "long")),
    "lora-135m-pairs",
)
# Random weights bear larger steps than pretrained ones, and only a loss that moves shows that the same is learned.
RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-4, "dpo": 1e-4}


@dataclass(frozen=True, slots=True)
class Cell:
    name: str
    method: str
    shape_name: str
    rows_name: str

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def rows(self) -> Rows:
        return ROWS[self.rows_name]

    @property
    def learning_rate(self) -> float:
        return RATES["dpo" if self.rows.objective == "dpo" else self.method]


def cell(name: str) -> Cell:
    if name not in CELLS:
        raise SystemExit(f"there is no cell {name!r}; there are: {', '.join(CELLS)}")
    return Cell(name, *name.split("-"))


def training_flops(cell: Cell, tokens: int, supervised: int) -> float:
    """Operations that training on these tokens cannot do without: 2 per weight and token forward, 2 for the gradient of the
    input, 2 more for that of the weight where it is trained (full), and 2 for DPO's forward pass of the reference.

    The vocabulary's matrix counts at supervised positions alone. Adapters, attention scores and whatever a contender
    computes twice (checkpointing) or for nothing (padding, unsupervised logits) are not counted.
    """
    passes = 6 if cell.method == "full" else 4
    passes += 2 if cell.rows.objective == "dpo" else 0
    return float(passes) * (cell.shape.layer_weights * tokens + cell.shape.head_weights * supervised)


# --- rows -------------------------------------------------------------------------------------------


def data_folder() -> Path:
    """Where the real rows lie."""
    return Path(os.environ.get("FTF_BENCH_DATA") or Path(__file__).parents[2] / "shared" / "data")


def work_folder() -> Path:
    """Where tokenizer, random weights and prepared rows are kept between runs."""
    return Path(os.environ.get("FTF_BENCH_WORK") or Path.home() / ".cache" / "finetuneflow" / "speed")


def read_rows(kind: str) -> tuple[Iterator[dict[str, str]], bool]:
    """(rows, whether they are real). Supervised rows are `instruction` and `output`, long ones `text`, pairs `prompt`,
    `chosen` and `rejected`."""
    paths = [data_folder() / name for name in ROWS[kind].files]
    if not all(path.is_file() for path in paths):
        return _synthetic(kind), False
    readers: dict[str, Callable[[Path], Iterator[dict[str, str]]]] = {
        "short": _metropole,
        "alpaca": _alpaca,
        "long": _articles,
        "pairs": _pairs,
    }
    return (row for path in paths for row in readers[kind](path)), True


def _metropole(path: Path) -> Iterator[dict[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"instruction": row["question"].strip(), "output": row["answer"].strip()}


def _alpaca(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in json.load(file):
            yield {"instruction": f"{row['instruction']}\n\n{row['input']}".strip(), "output": row["output"].strip()}


def _articles(path: Path) -> Iterator[dict[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield {"text": line.strip()}


def _pairs(path: Path) -> Iterator[dict[str, str]]:
    for row in json.loads(path.read_text(encoding="utf-8")):
        if len(row["conversations"]) == 1:
            prompt, sides = row["conversations"][0]["value"], (row["chosen"]["value"], row["rejected"]["value"])
            yield {"prompt": prompt.strip(), "chosen": sides[0].strip(), "rejected": sides[1].strip()}


def _synthetic(kind: str) -> Iterator[dict[str, str]]:
    """Rows of about the lengths of the real ones, made of invented words."""
    rng = random.Random(SEED)
    syllables = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "ou", "an")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(5_000)]
    text = lambda mean: " ".join(rng.choices(words, k=max(2, round(mean * rng.lognormvariate(-0.18, 0.6)))))  # noqa: E731
    prompt, answer = ROWS[kind].words
    for _ in range(2_000 if kind != "long" else 100):
        if kind == "long":
            yield {"text": text(answer)}
        elif kind == "pairs":
            yield {"prompt": text(prompt), "chosen": text(answer), "rejected": text(answer)}
        else:
            yield {"instruction": text(prompt), "output": text(answer)}


def _chosen_rows(cell: Cell, count: int, tokenizer: Any) -> tuple[list[dict[str, str]], bool]:
    """`count` rows that fit, drawn with a fixed seed."""
    rows, real = read_rows(cell.rows_name)
    if cell.rows_name == "long":
        fitting = [piece for row in rows for piece in _cut(row["text"], cell.rows.max_length, tokenizer)]
    else:
        sides = ("chosen", "rejected") if cell.rows.objective == "dpo" else ("output",)
        room = cell.rows.max_length - 16  # for what the template writes
        size = lambda text: len(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
        candidates = [row for row in rows if all(row.values())]
        random.Random(SEED).shuffle(candidates)
        fitting = []
        for row in candidates:
            prompt = size(row.get("instruction") or row["prompt"])
            if all(prompt + size(row[side]) <= room for side in sides):
                fitting.append(row)
            if len(fitting) == count:
                break
    if len(fitting) < count:
        raise SystemExit(f"{cell.name}: {len(fitting)} rows fit, {count} are needed; fewer --steps will do")
    return fitting[:count], real


def _cut(text: str, length: int, tokenizer: Any) -> list[dict[str, str]]:
    """Pieces of full length; one token of room is left for the end token, and a few for a cut within a character."""
    ids, piece = tokenizer.encode(text, add_special_tokens=False), length - 8
    return [{"text": tokenizer.decode(ids[i : i + piece])} for i in range(0, len(ids) - piece + 1, piece)]


# --- model and tokenizer ------------------------------------------------------------------------------


def _corpus(kinds: Iterable[str]) -> Iterator[str]:
    for kind in kinds:
        for row in read_rows(kind)[0]:
            yield from row.values()


def _tokenizer_folder() -> Path:
    """A byte-level BPE trained on the rows of all cells, made once for each set of data files that are there."""
    real = [kind for kind in ROWS if read_rows(kind)[1]]
    folder = work_folder() / f"tokenizer-{'-'.join(real) or 'synthetic'}"
    if not (folder / "tokenizer_config.json").is_file():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_corpus(ROWS), trainer)
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            eos_token=END,
            extra_special_tokens=[START],
            clean_up_tokenization_spaces=False,
        )
        wrapped.chat_template = TEMPLATE
        wrapped.save_pretrained(folder)
    return folder


def _base_folder(shape_name: str) -> Path:
    """A Llama of that shape with random bf16 weights, and the tokenizer."""
    source = _tokenizer_folder()
    folder = work_folder() / f"base-{shape_name}-{source.name}"
    if not (folder / "tokenizer_config.json").is_file():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer, shape = AutoTokenizer.from_pretrained(source), SHAPES[shape_name]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            tie_word_embeddings=True,
            max_position_embeddings=4_096,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


# --- a cell's folder --------------------------------------------------------------------------------


def run_settings(cell: Cell, base: Path, rows: Path, steps: int, threads: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """The run file of our engine for a cell. What is not named here is its default; `overrides` is by section."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"base": str(base)},
        "data": {"train": str(rows), "max_length": cell.rows.max_length, "eval_fraction": 0},
        "method": {"kind": cell.method, "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
        if cell.method != "full"
        else {"kind": "full"},
        "training": {
            "objective": cell.rows.objective,
            "max_steps": steps,
            "batch_size": 1 if cell.rows_name == "long" else cell.rows.batch,
            "gradient_accumulation": cell.rows.batch if cell.rows_name == "long" else 1,
            "learning_rate": cell.learning_rate,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "log_steps": 1,
            "threads": threads,
            "seed": SEED,
            "memory_check": "warn",
        },
        "evaluation": {"samples": 0},
    }
    for section, values in overrides.items():
        settings.setdefault(section, {}).update(values)
    return {"name": f"speed-{cell.name}", **settings}


def prepare(cell: Cell, folder: Path, steps: int) -> dict[str, Any]:
    """Fill `folder` and say what is in it: tokens and supervised tokens of each step."""
    from transformers import AutoTokenizer

    from finetuneflow.config import build_config
    from finetuneflow.data.batches import EpochSampler
    from finetuneflow.training.objectives import load_materials
    from finetuneflow.workspace import Workspace

    base = _base_folder(cell.shape_name)
    rows, real = _chosen_rows(cell, steps * cell.rows.batch, AutoTokenizer.from_pretrained(base))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    config, _ = build_config(run_settings(cell, base, path, steps, 1, {}))
    with tempfile.TemporaryDirectory() as scratch:
        train = load_materials(config, Workspace(Path(scratch)), lambda name, /, **fields: {}).prepared.train
        tokens = [
            {name: row[name] for name in row if name.endswith(("ids", "labels", "prompt_length"))} for row in train.to_list()
        ]
    if len(tokens) != len(rows):
        raise SystemExit(f"{cell.name}: of {len(rows)} rows {len(tokens)} were kept")
    order = list(EpochSampler(len(tokens), seed=SEED))
    (folder / "tokens.json").write_text(json.dumps([tokens[index] for index in order]))
    (folder / "ordered.jsonl").write_text(
        "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in order), encoding="utf-8"
    )
    counts = [count(tokens[index]) for index in order]
    batch = cell.rows.batch
    per_step = [counts[i : i + batch] for i in range(0, len(counts), batch)]
    lengths = sorted(tokens for tokens, _ in counts)
    return {
        "base": str(base),
        "real_rows": real,
        "row_tokens": {"median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "tokens": [sum(tokens for tokens, _ in step) for step in per_step],
        "supervised": [sum(supervised for _, supervised in step) for step in per_step],
    }


def count(row: dict[str, Any]) -> tuple[int, int]:
    """(tokens, those of them that a loss is computed for) of a row, of both sides where it is a pair."""
    sides = ("chosen_", "rejected_") if "chosen_ids" in row else ("input_",)
    labels = [row[f"{side}labels" if side != "input_" else "labels"][1:] for side in sides]
    return sum(len(row[f"{side}ids"]) for side in sides), sum(label != -100 for side in labels for label in side)


if __name__ == "__main__":
    name, target, number = sys.argv[1:4]
    print(json.dumps(prepare(cell(name), Path(target), int(number))))
