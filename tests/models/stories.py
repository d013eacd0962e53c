"""Reads the llama2.c formats (checkpoint and tokenizer) and writes them as a Hugging Face Llama.

The 260K-parameter story model is the one really trained foreign model the suite has.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    text: bytes
    score: float


def read_pieces(path: Path) -> list[Piece]:
    """The tokenizer file: int32 longest length, then (float32 score, int32 length, bytes) for each token."""
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(Piece(data[at + 8 : at + 8 + length], score))
        at += 8 + length
    return pieces


def read_checkpoint(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The legacy checkpoint: seven int32 of shape, then fp32 weights, all layers of one kind together."""
    from transformers import LlamaConfig

    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data)
    values = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    kv = dim // heads * kv_heads
    shapes = [("embed", (vocab, dim)), ("attention_norm", (layers, dim)), ("q", (layers, dim, dim)), ("k", (layers, kv, dim))]
    shapes += [("v", (layers, kv, dim)), ("o", (layers, dim, dim)), ("ffn_norm", (layers, dim)), ("gate", (layers, hidden, dim))]
    shapes += [("down", (layers, dim, hidden)), ("up", (layers, hidden, dim)), ("norm", (dim,))]
    sizes = [torch.Size(shape).numel() for _, shape in shapes]
    parts = values[: sum(sizes)].split(sizes)
    raw = {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return config, hf_weights(raw, heads=heads, kv_heads=kv_heads)


def hf_weights(raw: dict[str, torch.Tensor], *, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    state = {"model.embed_tokens.weight": raw["embed"], "lm_head.weight": raw["embed"], "model.norm.weight": raw["norm"]}
    names = {
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
        "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    for kind, name in names.items():
        for layer, weight in enumerate(raw[kind]):
            rotated = {"q": heads, "k": kv_heads}.get(kind)
            state[f"model.layers.{layer}.{name}.weight"] = halves_from_pairs(weight, rotated) if rotated else weight
    return {name: tensor.clone() for name, tensor in state.items()}


def halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder a head's rows: llama2.c rotates neighbours (0,1), (2,3), …; Hugging Face the two halves (0, n/2), (1, n/2+1), …"""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def tokenizer_of(pieces: list[Piece]) -> Any:
    """The same tokenizer for the Hugging Face libraries: scores become an order of merges, bytes a fall-back."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = [
        p.text.decode().strip("\n").replace(" ", "▁") if i < 3 else p.text.decode().replace(" ", "▁")
        for i, p in enumerate(pieces)
    ]
    vocab = {name: index for index, name in enumerate(names)}
    merges = []
    for name in sorted(vocab, key=lambda n: -pieces[vocab[n]].score):
        splits = [(name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in vocab and name[i:] in vocab]
        merges += [] if vocab[name] < 259 else sorted(splits, key=lambda s: (vocab[s[0]], vocab[s[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def greedy_encode(pieces: list[Piece], text: str) -> list[int]:
    """llama2.c's own algorithm: characters first, then again and again the neighbouring pair with the best score."""
    ids = {piece.text: index for index, piece in enumerate(pieces) if index >= 259}
    tokens: list[int] = []
    for character in " " + text:
        known = ids.get(character.encode())
        tokens += [known] if known is not None else [byte + 3 for byte in character.encode()]
    while True:
        pairs = [
            (pieces[m].score, -at, m) for at in range(len(tokens) - 1) if (m := _merged(pieces, ids, tokens, at)) is not None
        ]
        if not pairs:
            return tokens
        _, at, merged = max(pairs)
        tokens[-at : -at + 2] = [merged]


def _merged(pieces: list[Piece], ids: dict[bytes, int], tokens: list[int], at: int) -> int | None:
    return ids.get(pieces[tokens[at]].text + pieces[tokens[at + 1]].text)


def save_stories(weights: Path, target: Path) -> Path:
    """Convert the folder with `stories260K.bin` and `tok512.bin` into a model folder."""
    from transformers import LlamaForCausalLM

    config, state = read_checkpoint(weights / "stories260K.bin")
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.save_pretrained(target)
    tokenizer_of(read_pieces(weights / "tok512.bin")).save_pretrained(target)
    return target
