"""Memory that the scripts for language models need on a GPU, by count.

Two moments compete: the update, with gradients and activations, and the sampling, with the cache of keys and
values. Sizes are in bytes; a GB is 10^9 bytes.
"""

from typing import NamedTuple

CARDS = (16, 24, 48, 80)  # GB
CONTEXT = 1.0  # GB that CUDA and its libraries take
SPARE = 1.1  # for what the allocator cannot use

# Qwen2.5, as in the config.json of each model.
MODELS = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "tied": True, "kv": 128},
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "tied": True,
        "kv": 256,
    },
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "tied": True, "kv": 256},
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "tied": False,
        "kv": 512,
    },
}


class Shape(NamedTuple):
    """Sizes of a decoder; queries are as wide as the residual stream."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    tied: bool  # embedding and head are one matrix
    kv: int  # width of the keys, and of the values, of all heads
    vocabulary: int = 151_936

    @property
    def layer_sides(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one layer."""
        h, inner = self.hidden_size, self.intermediate_size
        return [(h, h), (h, self.kv), (h, self.kv), (h, h), (h, inner), (h, inner), (inner, h)]

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden_size

    @property
    def matrices(self) -> int:
        """Weights of all linear layers, the head included."""
        return self.embedding + self.num_hidden_layers * sum(a * b for a, b in self.layer_sides)

    @property
    def weights(self) -> int:
        """All weights but norms and biases, which are less than a thousandth."""
        return self.matrices + (0 if self.tied else self.embedding)

    def adapters(self, rank: int) -> int:
        return self.num_hidden_layers * sum(rank * (a + b) for a, b in self.layer_sides)


class Need(NamedTuple):
    """Bytes at the two moments that count."""

    update: float
    sampling: float

    @property
    def total(self) -> float:
        """GB with what CUDA takes and what the allocator cannot use."""
        return SPARE * max(self) / 1e9 + CONTEXT


def states(shape: Shape, lora_rank: int, reference: bool) -> tuple[float, float]:
    """Bytes of weights, moments and copies, and those of the gradients.

    What learns has 4 bytes of weight, 8 of moments and 4 of gradient, and autocast keeps a copy in bfloat16
    of what it multiplies. What is frozen has 2 bytes. With LoRA the reference is the model without adapters.
    """
    if lora_rank:
        learned = shape.adapters(lora_rank)
        return 2 * shape.weights + (4 + 8 + 2) * learned, 4 * learned
    held = (4 + 8) * shape.weights + 2 * shape.matrices + (2 * shape.weights if reference else 0)
    return held, 4 * shape.weights


def activations(shape: Shape, tokens: int, lora_rank: int, checkpointing: bool) -> float:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass.

    Of a layer: its two inputs in float32, a copy in bfloat16 for each linear layer that reads them, queries
    and keys before and after rotation, values, attention, and four vectors of the MLP, in bfloat16. An
    adapter reads copies of its own. With checkpointing only the input of each layer stays, and one layer at
    a time is computed again. The head keeps what 2^25 logits need.
    """
    h, kv, inner = shape.hidden_size, shape.kv, shape.intermediate_size
    layer = 2 * 4 * h + 2 * (5 * h) + 2 * (4 * h + 3 * kv) + 2 * 4 * inner
    if lora_rank:
        layer += 2 * (6 * h + inner) + 2 * sum(b for _, b in shape.layer_sides)
    kept = 4 * h * shape.num_hidden_layers + layer if checkpointing else layer * shape.num_hidden_layers
    return kept * tokens + 4 * 4 * min(2**25, tokens * shape.vocabulary) + 2 * shape.embedding


def sampling(shape: Shape, tokens: int, row_length: int) -> float:
    """Bytes of the cache, which has 8 slots for each token of a micro-batch, and of the logits of a step.

    Rows that have ended leave the cache when a quarter of it is free, so that there are two for a moment.
    """
    cache = 8 * tokens * shape.num_hidden_layers * 2 * shape.kv * 2
    return 1.75 * cache + 4 * 4 * (8 * tokens // row_length) * shape.vocabulary


def needed(
    shape: Shape,
    lora_rank: int = 0,
    reference: bool = False,
    samples: bool = True,
    tokens: int = 8192,
    row_length: int = 1024,
    checkpointing: bool = True,
) -> Need:
    """What a run needs: GRPO `samples` in each step, and with --beta it has a `reference` in each step."""
    held, gradients = states(shape, lora_rank, reference)
    update = held + gradients + activations(shape, tokens, lora_rank, checkpointing)
    return Need(update, held + sampling(shape, tokens, row_length) if samples else held)


def table(tokens: int = 8192, lora_rank: int = 16) -> str:
    """A table in Markdown: GB, and the smallest card that they fit on."""
    kinds = {"GRPO": {}, "GRPO with `--beta`": {"reference": True}, "DPO": {"samples": False}}
    lines = [f"| Model | Weights | {' | '.join(kinds)} |", f"|---|---|{'---|' * len(kinds)}"]
    for name, sizes in MODELS.items():
        for rank in (0, lora_rank):
            cells = [needed(Shape(**sizes), rank, tokens=tokens, **kind).total for kind in kinds.values()]
            # Logits computed at a time may take a twentieth of the card; `activations` has 0.5 GB of them.
            cards = [next((f"{card} GB" for card in CARDS if x - 0.5 <= 0.95 * card), "none") for x in cells]
            row = [f"{x:.0f} GB: {card}" for x, card in zip(cells, cards)]
            lines.append(f"| {name} | {f'LoRA, rank {rank}' if rank else 'all'} | {' | '.join(row)} |")
    return "\n".join(lines)
