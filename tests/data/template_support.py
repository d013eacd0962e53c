"""Tokenizers for the tests of templates, tokens and preview: small ones trained here, real ones where the data folder is."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetuneflow.data.examples import Example, Message, Place

CORPUS = [
    "What is the capital of France? The capital of France is Paris. Quelle est la capitale de la France ? C'est Paris, bien sûr.",
    "User: Hello, assistant! Assistant: Hello, how can I help you today? <tool_call> <think> [INST] </s> <|im_start|>user",
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9 ### Instruction: ### Response: def f(x): return x + 1",
] * 20

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<think>", "</think>")


@lru_cache(maxsize=1)
def byte_tokenizer() -> Any:
    """GPT-2 style byte-level BPE with ChatML tokens; eos and pad are one; no template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(CHATML_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(list(MARKUP))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )


@lru_cache(maxsize=1)
def piece_tokenizer() -> Any:
    """SentencePiece style BPE with byte fallback that begins every text with <s>; no template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=tokens, show_progress=False, max_token_length=12)
    backend.train_from_iterator(CORPUS, trainer)
    description = json.loads(backend.to_str())
    description["pre_tokenizer"]["split"] = False
    description["added_tokens"] = [token for token in description["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(description))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOYS = {"bytes": byte_tokenizer, "pieces": piece_tokenizer}


@lru_cache(maxsize=1)
def real_tokenizers(folder: Path) -> dict[str, Any]:
    """GPT-2, Llama 2, Mistral v3 and MiniMind from the data folder, each as a fast tokenizer."""
    from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer

    root = folder / "tokenizers"
    found = {"gpt2": GPT2Tokenizer(vocab=str(root / "gpt2" / "vocab.json"), merges=str(root / "gpt2" / "merges.txt"))}
    pieces = {"llama2": "llama2/tokenizer.model", "mistral_v3": "mistral_v3/mistral_instruct_tokenizer_240323.model.v3"}
    for name, path in pieces.items():
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(root / path, Path(scratch) / "tokenizer.model")
            found[name] = LlamaTokenizer.from_pretrained(scratch)
    found["minimind"] = AutoTokenizer.from_pretrained(str(root / "minimind"))
    return found


def chat(*turns: tuple[str, str], **more: Any) -> Example:
    """An example from (role, content) pairs."""
    return Example("chat", Place("test.jsonl", 0, 1), "test", tuple(Message(role, content) for role, content in turns), **more)  # type: ignore[arg-type]


def as_dicts(example: Example) -> list[dict[str, Any]]:
    """The messages as transformers takes them (written here independently of the product)."""
    return [{"role": message.role, "content": message.content} for message in example.messages]
