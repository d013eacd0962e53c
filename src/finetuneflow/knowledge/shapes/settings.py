"""Reading a config.json that somebody else wrote: usual keys under all usual names, class defaults, hostile values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetuneflow.errors import ModelError

# Far above every published model (1M-token vocabularies, 16k widths, 200 layers), far below what would overflow or loop for long.
LARGEST = 10_000_000
MOST_LAYERS = 2_000

# transformers' own `attribute_map`s and older names of the same number, most usual first.
ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed", "model_dim", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "attention_heads",
        "decoder_attention_heads",
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "n_kv_heads"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "dff", "hidden_dim"),
    "vocab_size": ("vocab_size", "padded_vocab_size", "n_vocab"),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "n_ctx",
        "max_sequence_length",
    ),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe_top_k", "moe_k", "num_experts_per_token", "experts_per_token"),
    "moe_intermediate_size": ("moe_intermediate_size", "expert_ffn_hidden_size"),
}


def unsupported(message: str, *, name: str, **context: Any) -> ModelError:
    """The one error of this reading: what is wrong with which config, and what a usable one has."""
    return ModelError(
        "MODEL_UNSUPPORTED_ARCH",
        message,
        where=f"config.json of {name}",
        remedy="Use a causal language model of transformers, or give the number of parameters alone, such as 7B.",
        context=context,
    )


class Settings:
    """The numbers of one config: what it says, else what the class of that model type takes by default."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> None:
        self.values, self.defaults, self.name = values, defaults, name

    def raw(self, key: str) -> Any:
        """The value under any name of `key`. What the config says, a null too, goes before a class default."""
        names = ALIASES.get(key, (key,))
        for source in (self.values, self.defaults):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
            if any(name in source for name in names):
                return None
        return None

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        """A whole number between `least` and `most`. Raises where it is something else, or missing without a default."""
        value = self.raw(key)
        if value is None:
            value = default
        if value is None:
            raise unsupported(f"The config has no {key}.", name=self.name, missing=[key])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            shown = repr(value)[:40]
            raise unsupported(f"{key} is {shown}, not a whole number from {least} to {most:,}.", name=self.name, invalid=[key])
        return value

    def uniform(self, key: str, default: int | None = None) -> int:
        """`integer`, also where it is listed once per layer, always the same (HunYuan's mixtures)."""
        value = self.raw(key)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            return Settings({key: value[0]}, {}, self.name).integer(key)
        return self.integer(key, default)

    def optional(self, key: str, *, least: int = 1, most: int = LARGEST) -> int | None:
        """`integer`, or None where the config and its class leave it out."""
        return None if self.raw(key) is None else self.integer(key, least=least, most=most)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise unsupported(f"{key} is {repr(value)[:40]}, not true or false.", name=self.name, invalid=[key])
        return bool(value)

    def word(self, key: str, default: str = "") -> str:
        value = self.raw(key)
        return value if isinstance(value, str) else default

    def listing(self, key: str, length: int | None = None) -> list[Any] | None:
        """A list, of `length` entries where that is given; None where there is none."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            wanted = "a list" if length is None else f"a list of {length} entries"
            raise unsupported(f"{key} is not {wanted}.", name=self.name, invalid=[key])
        return list(value)

    def section(self, key: str) -> Settings:
        """A nested part of the config."""
        value, default = self.values.get(key), self.defaults.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise unsupported(f"{key} is not a group of settings.", name=self.name, invalid=[key])
        return Settings(value or {}, default if isinstance(default, Mapping) else {}, self.name)

    def require(self, *keys: str) -> None:
        """Raise once for all of `keys` that are missing."""
        missing = [key for key in keys if self.raw(key) is None]
        if missing:
            raise unsupported(f"The config has no {', '.join(missing)}.", name=self.name, missing=missing)
