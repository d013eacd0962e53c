"""A language model of one's own in one file: gated causal convolutions, a few lines longer than needed.

ftf model new gated_conv.py --out base          a folder with random weights
ftf train run.yaml                              pre-trains it; run.yaml names this file in model.module
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput


class GatedConvConfig(PreTrainedConfig):
    model_type = "gated_conv"
    # Prompts of different lengths may share a batch: padding before a text changes nothing (see `value * mask` below).
    masks_padding = True

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    kernel_size: int = 7
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None


class Block(GradientCheckpointingLayer):
    """x + W_out(silu(gate) * conv(value)): the convolution of layer n looks back over steps of 2^(n mod 4) tokens."""

    def __init__(self, config: GatedConvConfig, layer: int) -> None:
        super().__init__()
        width, self.step = config.hidden_size, 2 ** (layer % 4)
        self.reach = (config.kernel_size - 1) * self.step
        self.norm = nn.RMSNorm(width)
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.conv = nn.Conv1d(width, width, config.kernel_size, groups=width, dilation=self.step, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        gate, value = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        value = (value * mask).transpose(1, 2)
        value = self.conv(nn.functional.pad(value, (self.reach, 0))).transpose(1, 2)
        return x + self.out_proj(nn.functional.silu(gate) * value)


class GatedConvForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GatedConvConfig
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 - transformers reads it from the class

    def __init__(self, config: GatedConvConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        x = self.embed_tokens(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for layer in self.layers:
            x = layer(x, mask[..., None].to(x.dtype))
        logits = self.lm_head(self.norm(x))
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """Nothing is cached: each step reads the whole text again."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoConfig.register(GatedConvConfig.model_type, GatedConvConfig)
AutoModelForCausalLM.register(GatedConvConfig, GatedConvForCausalLM)
