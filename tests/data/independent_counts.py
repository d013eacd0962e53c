"""Counts of usable and rejected rows of every shared dataset, by plain json and csv alone.

This script imports nothing of the product. It states, file by file, what a person would count: which rows have a
question and an answer that is not empty. `test_shared_datasets.py` holds the product to the table this prints.

    python tests/data/independent_counts.py ../shared/data > tests/data/independent_counts.json
"""

import csv
import gzip
import json
import re
import sys
from pathlib import Path


def load(path):
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    try:
        value = json.loads(text)
        return value if isinstance(value, list) else [value]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def filled(*texts):
    return all(isinstance(text, str) and text.strip() for text in texts)


def pairs(prompt, answer):
    return lambda row: filled(row[prompt], row[answer])


def texts(row):
    return filled(row["text"])


def chat(row):
    turns = row.get("messages") or row["conversations"]
    roles = [turn.get("role") or turn["from"] for turn in turns]
    said = [turn.get("content") or turn.get("value") for turn in turns]
    answers = [s for r, s in zip(roles, said, strict=True) if r in ("assistant", "gpt", "function_call")]
    return bool(answers) and all(answers) and not row.get("images")


def hh(row):
    def last(text):
        return re.split(r"\n\n(?:Human|Assistant):", text)[-1]

    return filled(last(row["chosen"]), last(row["rejected"])) and row["chosen"] != row["rejected"]


def dpo(row):
    return filled(row["chosen"]["value"], row["rejected"]["value"]) and row["chosen"] != row["rejected"]


def tree(row):
    return any(reply["role"] == "assistant" and reply["text"].strip() for reply in row["prompt"]["replies"])


def instances(row):
    return filled(row["instruction"], *[instance["output"] for instance in row["instances"]])


def never(row):
    return False


INSTRUCTION = pairs("instruction", "output")
JSON_FILES = {
    "alpaca/alpaca_data.json.gz": ("instruction+input+output", INSTRUCTION),
    "bfcl/BFCL_v4_simple_python.json": ("question+function", never),
    "bfcl/possible_answer/BFCL_v4_simple_python.json": ("ground_truth", never),
    "codealpaca/code_alpaca_2k.json": ("instruction+input+output", INSTRUCTION),
    "dolly/dolly.jsonl": ("prompt+answer", pairs("prompt", "answer")),
    "gpteacher/roleplay-simple-deduped-roleplay-dataset.json": ("instruction+input+output", INSTRUCTION),
    "gsm8k/train.jsonl": ("question+answer", pairs("question", "answer")),
    "hh_rlhf/harmless-base-test.rows0-499.jsonl.gz": ("hh-rlhf", hh),
    "humaneval/HumanEval.jsonl.gz": ("prompt+canonical_solution", pairs("prompt", "canonical_solution")),
    "llamafactory/alpaca_en_demo.json": ("instruction+input+output", INSTRUCTION),
    "llamafactory/alpaca_zh_demo.json": ("instruction+input+output", INSTRUCTION),
    "llamafactory/c4_demo.jsonl": ("text", texts),
    "llamafactory/dataset_info.json": (None, never),
    "llamafactory/dpo_en_demo.json": ("preference-conversations", dpo),
    "llamafactory/glaive_toolcall_en_demo.json": ("sharegpt", chat),
    "llamafactory/identity.json": ("instruction+input+output", INSTRUCTION),
    "llamafactory/mllm_demo.json": ("messages", chat),
    "llamafactory/v1_sft_demo.jsonl": ("messages", chat),
    "metropole/metropole.jsonl": ("question+answer", pairs("question", "answer")),
    "mlx/lora_test.jsonl": ("text", texts),
    "mlx/lora_train.jsonl": ("text", texts),
    "mlx/lora_valid.jsonl": ("text", texts),
    "mlx/wwdc25_valid.jsonl": ("prompt+completion", pairs("prompt", "completion")),
    "oasst/en_100_tree.rows0-59.jsonl": ("oasst-tree", tree),
    "oasst/prompt_lottery_en_250_text.jsonl": ("string", filled),
    "self_instruct/seed_tasks.jsonl": ("self-instruct", instances),
    "sharegpt/conversation.json": ("sharegpt", chat),
    "sharegpt/dummy_conversation.json": ("sharegpt", chat),
    "sharegpt/platon_finetune_socratic_ai.jsonl": ("sharegpt", chat),
    "vicuna_bench/judge_prompts.jsonl": ("judge-prompts", never),
    "vicuna_bench/question.jsonl": ("turns", never),
    "vicuna_bench/reference_answer_gpt-4.jsonl": ("choices", never),
    "vigogne/dummy_chat.jsonl": ("messages", chat),
    "vigogne/gt_doremiti_instructions.jsonl": ("instruction+input+output", INSTRUCTION),
    "vigogne/seed_tasks_vigogne.jsonl": ("self-instruct", instances),
}


def passages(text):
    """Running text: a passage ends at the first blank line once it has 8,192 characters, or at 16,384 at any line."""
    count, size = 0, 0
    for line in text.splitlines(keepends=True):
        blank = not line.strip()
        if size and ((blank and size >= 8192) or size >= 16384):
            count, size = count + 1, 0
        if size or not blank:
            size += len(line)
    return count + (size > 0)


def text_rows(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "wiki_demo.txt":
        return len([line for line in text.split("\n") if line.strip()])
    return passages(text)


def main(root):
    table = {}
    for name, (shape, usable) in JSON_FILES.items():
        rows = load(root / name)
        good = sum(bool(usable(row)) for row in rows)
        table[name] = {"shape": shape, "rows": len(rows), "usable": good, "rejected": len(rows) - good}
    with (root / "truthfulqa/TruthfulQA.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    good = sum(filled(row["Question"], row["Best Answer"]) for row in rows)
    table["truthfulqa/TruthfulQA.csv"] = {
        "shape": "question+best_answer",
        "rows": len(rows),
        "usable": good,
        "rejected": len(rows) - good,
    }
    for path in sorted([root / "llamafactory/wiki_demo.txt", *root.glob("documents/**/*.txt"), *root.glob("documents/**/*.md")]):
        rows = text_rows(path)
        table[str(path.relative_to(root))] = {"shape": "text", "rows": rows, "usable": rows, "rejected": 0}
    print(json.dumps(table, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
