"""Tiny generators and an independent greedy loop to hold them against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetuneflow.data.examples import Example, Message, Place
from finetuneflow.data.templates import resolve_template
from finetuneflow.inference import Generator
from models.tiny import tiny_model, tiny_tokenizer

QUESTIONS = (
    "Hi",
    "What is 3 + 4? " * 5,
    "Quelle est la capitale ?",
    "the teacher helps the little girl. " * 12,
    "x",
    "été à Noël, 12 fois",
)
PROMPTS = [(Message("user", text),) for text in QUESTIONS]


def tiny_generator(architecture: str = "llama", *, scale: float = 4.0, seed: int = 0) -> Generator:
    """A generator on random weights, made larger so that its answers depend on every token and position of the prompt."""
    model = tiny_model(architecture, seed=seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(scale)
    tokenizer = tiny_tokenizer()
    return Generator(model, tokenizer, resolve_template(tokenizer), name=architecture)


def naive_greedy(model: Any, prompt: Sequence[int], steps: int) -> list[int]:
    """Greedy decoding of one prompt without cache, padding or batch: the plainest that can be written."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def chat(question: str, answer: str, row: int = 0) -> Example:
    return Example("chat", Place("made.jsonl", row), "messages", (Message("user", question), Message("assistant", answer)))
