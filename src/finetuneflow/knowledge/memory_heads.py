"""What becomes of the last hidden states, in bytes at the worst moment of a forward and backward pass.

chunk_bytes     sft, pretrain: logits chunk by chunk, at the supervised positions (kernels/loss.py)
logit_bytes     the same on the plain path: logits of all positions (training/trainer.py, `plain_loss`)
tile_bytes      preferences, grpo, rloo: log-probabilities in tiles of the vocabulary (TRL's fused head)
answer_bytes    ppo: logits from the first answer token on (training/ppo_actors.py)
"""

from __future__ import annotations

from dataclasses import dataclass

# TRL's fused head works on tiles of so many positions and columns (trl/kernels/chunked_logprob.py, trl/trainer/utils.py).
TILE_POSITIONS, TILE_COLUMNS = 4_096, 32_768
# fp32 copies of a tile alive at once where PyTorch folds it, with the mark of the target (a byte): going forward the
# logits, what is subtracted from, and their exponentials; going back seven (`_forward_tile`, `_backward_tile`).
TILE_FORWARD, TILE_BACKWARD = 3 * 4, 7 * 4 + 1


def logit_bytes(vocab: int, num_tokens: int, supervised: int, *, autocast: bool, training: bool = True) -> int:
    """The highest moment of the loss (training/trainer.py, `plain_loss`).

    Logits of all positions leave the model in fp32 (accelerate casts what autocast returns, both types alive for a moment).
    Of the supervised positions there are a copy and their log-softmax; backwards, the log-softmax with two gradients, then
    the gradient of all positions twice (of the choice of rows, and of dropping the last position).
    """
    full, chosen = 4 * num_tokens * vocab, 4 * supervised * vocab
    forward = max(full + 2 * chosen, full * 3 // 2 if autocast else full)
    return max(forward, 3 * chosen, 2 * full) if training and supervised else forward


CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # kernels/loss.py; a test compares


@dataclass(frozen=True, slots=True)
class Chunks:
    """The fast path's loss over `scored` positions. `compute`: bytes of the type of the products; `weight`: of the stored matrix;
    `trained`: the matrix gets a gradient."""

    vocab: int
    hidden: int
    scored: int
    compute: int
    weight: int
    device: str
    trained: bool


def chunk_bytes(chunks: Chunks, *, training: bool) -> int:
    """A chunk's logits; the hidden states in both types, and their gradient; the matrix in the compute type. Of a trained matrix the
    gradient in fp32, and what a chunk adds to it."""
    matrix, states = chunks.vocab * chunks.hidden, chunks.scored * chunks.hidden
    copies = matrix * chunks.compute if chunks.compute != chunks.weight else 0
    gradient = matrix * (4 + chunks.compute) if chunks.trained and training else 0
    held = states * (chunks.weight + chunks.compute * (2 if training else 1))
    return chunk_logits(chunks, training=training) + held + copies + gradient


def chunk_logits(chunks: Chunks, *, training: bool) -> int:
    """In fp32 a chunk's logits, and those of the chunk before or their own exponentials; in 16 bits the product that they come from,
    and the gradient of the chunk before."""
    rows = min(max(CHUNK_BYTES[chunks.device] // (4 * chunks.vocab) // 16 * 16, 16), chunks.scored)
    cast = chunks.compute if chunks.compute != 4 else 0
    return rows * chunks.vocab * (8 + cast * (2 if training else 1))


@dataclass(frozen=True, slots=True)
class Tiles:
    """A fused head: `scored` positions of `num_tokens` are in the loss. `compute`: bytes of the type it multiplies in."""

    vocab: int
    hidden: int
    num_tokens: int
    scored: int
    compute: int
    cuda: bool

    @property
    def positions(self) -> int:
        """CUDA's kernel takes scored positions alone; elsewhere every position passes, so that tiles keep their shape."""
        return self.scored if self.cuda else self.num_tokens


def tile_bytes(tiles: Tiles, *, training: bool) -> int:
    """A tile of logits, what folding it takes, and going back the fp32 gradient of the hidden states.

    On CUDA the kernel folds in registers, and the buffer has all its columns however small the vocabulary is.
    """
    rows, columns = min(tiles.positions, TILE_POSITIONS), min(tiles.vocab, TILE_COLUMNS)
    gradient = 4 * tiles.positions * tiles.hidden if training else 0
    if tiles.cuda:
        return rows * TILE_COLUMNS * tiles.compute + gradient
    return rows * columns * (tiles.compute + (TILE_BACKWARD if training else TILE_FORWARD)) + gradient


def answer_bytes(vocab: int, num_tokens: int, compute: int, *, training: bool) -> int:
    """Logits of `num_tokens` answer positions with their fp32 copy, over the temperature, and its log-softmax; backwards the
    log-softmax with two gradients, or the gradient in the compute type beside its fp32 form."""
    forward = num_tokens * vocab * (compute + 8)
    return max(forward, num_tokens * vocab * 12) if training else forward


def drawing_copies(vocab: int, hidden: int, sequences: int, compute: int, *, cuda: bool) -> int:
    """Copies of the output layer while prompts pass: the last position of several rows is no contiguous block, so PyTorch multiplies row
    by row, and in 16 bits oneDNN makes a copy of the weight for each. Measured: 0.9 GB for 16 rows of a 28M output layer."""
    return 0 if cuda or compute == 4 or sequences < 2 else sequences * vocab * hidden * compute
