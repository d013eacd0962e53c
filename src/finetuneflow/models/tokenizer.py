"""A model's tokenizer, made ready for training: padded on the right, by a token that is not the end token.

If padding and the end of a turn were one token, whatever masks padding would hide the end from
the loss, and the model would never learn to stop. Our labels come from spans and do not depend
on this; other people's code that reads the exported tokenizer may.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetuneflow.errors import ModelError
from finetuneflow.models.screening import corrupt

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
GPT2_END = "<|endoftext|>"
# Tokens made for padding or kept free by their makers, in order of preference.
PADDING_TOKENS = re.compile(
    r"<pad>|<\|pad\|>|\[PAD\]|<\|finetune_right_pad_id\|>|<\|endoftext\|>|<\|vision_pad\|>|<\|fim_pad\|>", re.I
)
RESERVED_TOKENS = re.compile(
    r"<\|?reserved_special_token_\d+\|?>|<unused_?\d+>|<\|reserved_\d+\|>|<\|dummy_\d+\|>|<extra_id_\d+>", re.I
)


def load_tokenizer(folder: Path, *, run_own_code: bool = False) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer of a model folder and what was decided about its padding."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            "MODEL_NO_TOKENIZER",
            f"{folder} holds no tokenizer ({TOKENIZER_FILES[0]} is missing).",
            where=str(folder),
            remedy="Copy the tokenizer files of the same release into the model's folder.",
        )
    try:
        with quiet_transformers():  # of an architecture it does not know it would say much; a tokenizer needs none
            tokenizer = bare_tokenizer(folder) or AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=run_own_code
            )
    except Exception as error:  # the parsers behind it raise anything, bare Exception included
        raise corrupt(folder / "tokenizer.json", f"could not be loaded ({str(error)[:200]})") from error
    tokenizer.padding_side = "right"
    note = ensure_padding_token(tokenizer)
    return tokenizer, (note,) if note else ()


def bare_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a folder that holds its vocabulary and nothing that says what it is, as GPT-2's often lies about; else None."""
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    if any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        return None
    vocabulary, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if whole.is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(whole))
        if GPT2_END in tokenizer.get_vocab():
            tokenizer.eos_token = tokenizer.bos_token = GPT2_END
        return tokenizer
    return GPT2Tokenizer(vocab=str(vocabulary), merges=str(merges)) if vocabulary.is_file() and merges.is_file() else None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No load report, no bar and no guesses: what is wrong is said by our own checks."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def ensure_padding_token(tokenizer: Any) -> str | None:
    """Give the tokenizer a padding token that differs from its end token, without adding one; says what was chosen."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    chosen = padding_candidate(tokenizer)
    if chosen is not None:
        tokenizer.pad_token = chosen
        return f"Padding uses the token {chosen!r}, so that the end token {tokenizer.eos_token!r} stays visible."
    if tokenizer.eos_token is None:
        return "The tokenizer has neither a padding nor an end token: batches are made of one length, and generation ends at its limit."
    tokenizer.pad_token = tokenizer.eos_token
    return f"Padding has to share the end token {tokenizer.eos_token!r}; labels come from spans, so the end is still learned."


def padding_candidate(tokenizer: Any) -> str | None:
    """An existing token fit for padding: one made for it, one held in reserve, or the unknown token."""
    forbidden = {tokenizer.eos_token, tokenizer.bos_token}
    special: dict[str, int] = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for pattern in (PADDING_TOKENS, RESERVED_TOKENS):
        fitting = sorted(
            (index, token) for token, index in special.items() if pattern.fullmatch(token) and token not in forbidden
        )
        if fitting:
            return fitting[0][1]
    unknown: str | None = tokenizer.unk_token
    return unknown if unknown not in forbidden else None
