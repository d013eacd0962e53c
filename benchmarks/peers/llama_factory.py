"""LLaMA-Factory by its own settings file, data format and tokenization, in an environment of its own.

`python_of` makes that environment (once, some minutes, 2.2 GB): it pins an older transformers and TRL than ours. The index's
torchvision and torchaudio are built for CUDA and cannot be loaded beside a CPU build of torch; text needs neither, so both are
taken out again, and an empty module stands where LLaMA-Factory imports torchaudio without asking. The run is
what `llamafactory-cli train file.yaml` starts, with a callback that records the steps (its log holds whole seconds alone).
Settings are its own words, merged into the file; `packed_length` is ours: the `cutoff_len` that packs are made with.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

VERSION, TORCH = "0.9.5", "2.13.0"
SPECIFICATION = [f"llamafactory=={VERSION}", f"torch=={TORCH}", "bitsandbytes>=0.49"]
INSTALLED = "installed.json"  # written when an installation is complete


def folder_of() -> Path:
    return Path(os.environ.get("FTF_BENCH_LLAMAFACTORY") or Path.home() / ".cache" / "finetuneflow" / "peers" / "llamafactory")


def is_installed() -> bool:
    """Whether its environment is there and holds what is asked for."""
    mark = folder_of() / INSTALLED
    return mark.is_file() and json.loads(mark.read_text()) == SPECIFICATION


def python_of() -> Path:
    """The interpreter of LLaMA-Factory's environment, which is made where it is not there."""
    folder = folder_of()
    if not is_installed():
        print(f"installing LLaMA-Factory {VERSION} into {folder} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", *SPECIFICATION], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio"], check=True)
        (folder / INSTALLED).write_text(json.dumps(SPECIFICATION))
    return folder / "bin" / "python"


def run_file(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Its settings for a cell, with the dataset written in its format beside them."""
    from benchmarks.speed_cells import END, SEED, START, cell

    made = cell(job["cell"])
    rows = [json.loads(line) for line in (Path(job["folder"]) / "ordered.jsonl").read_text(encoding="utf-8").splitlines()]
    prompt = lambda text: f"{START}user\n{text}{END}{START}assistant\n"  # noqa: E731
    stage = {"sft": "sft", "pretrain": "pt", "dpo": "dpo"}[made.rows.objective]
    if stage == "sft":
        rows = [{"prompt": prompt(row["instruction"]), "response": row["output"] + END} for row in rows]
        columns = {"prompt": "prompt", "response": "response"}
    elif stage == "pt":
        columns = {"prompt": "text"}
    else:
        rows = [
            {"prompt": prompt(row["prompt"]), "chosen": row["chosen"] + END, "rejected": row["rejected"] + END} for row in rows
        ]
        columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    information = {"rows": {"file_name": "rows.json", "columns": columns, "ranking": stage == "dpo"}}
    (scratch / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (scratch / "dataset_info.json").write_text(json.dumps(information))
    settings = dict(job["settings"])
    packed_length = settings.pop("packed_length", None)
    size = 1 if packed_length or made.rows_name == "long" else made.rows.batch
    return {
        "stage": stage,
        "do_train": True,
        "model_name_or_path": job["base"],
        "finetuning_type": "full" if made.method == "full" else "lora",
        **({"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all"} if made.method != "full" else {}),
        **({"quantization_bit": 4, "quantization_method": "bnb"} if made.method == "qlora" else {}),
        "dataset": "rows",
        "dataset_dir": str(scratch),
        "template": "empty",  # the rows are rendered already
        "packing": False,
        "cutoff_len": packed_length or made.rows.max_length,
        "overwrite_cache": True,
        "output_dir": str(scratch / "output"),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 1 if packed_length else made.rows.batch // size,
        "max_steps": job["steps"],
        "learning_rate": made.learning_rate,
        "lr_scheduler_type": "constant",
        "disable_shuffling": True,
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        "disable_tqdm": True,
        **settings,
    }


def main(job: dict[str, Any]) -> None:
    import torch

    _stand_in_for_torchaudio()
    from llamafactory.train.tuner import run_exp

    from benchmarks.peers.recorder import Recorder

    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        run_exp(args=run_file(job, Path(scratch)), callbacks=[Recorder()])


def _stand_in_for_torchaudio() -> None:
    empty = types.ModuleType("torchaudio")
    empty.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = empty


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
