"""A checkpoint in the original's format becomes a model folder, answers, and goes back: `python demonstration.py FOLDER`.

With a checkpoint of one's own: `python demonstration.py FOLDER model_step_757500.pt [TOKENIZER_FOLDER]`. Without one, a
small model with random weights stands in for it.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from finetuneflow.models.mamba_swelu import MambaSWELUConfig, MambaSWELUForCausalLM, register
from finetuneflow.models.mamba_swelu_checkpoint import convert_from_original, convert_to_original, to_original


def stand_in(path: Path) -> Path:
    """A small checkpoint as the original saves it."""
    model = MambaSWELUForCausalLM(MambaSWELUConfig(vocab_size=300, d_model=64, n_layers=2, max_seq_len=128, dense_hidden_dim=128))
    torch.save(to_original(model.state_dict(), model.config, step=1000), path)
    return path


def main(folder: Path, checkpoint: Path | None = None, tokenizer: Path | None = None) -> None:
    folder.mkdir(parents=True)
    report = convert_from_original(checkpoint or stand_in(folder / "model_step_1000.pt"), folder / "model", tokenizer=tokenizer)
    print(f"{report.num_parameters:,} parameters, {report.layout} layout, step {report.step}")
    print(*report.notes, sep="\n")
    register()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=10, do_sample=False, pad_token_id=0).tolist())
    convert_to_original(folder / "model", folder / "back.pt")
    print(f"back in the original's format: {folder / 'back.pt'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
