"""Outlier channels that leave the function of a model as it is.

Large video transformers have channels with activations tens of times larger than the rest; a model trained for minutes
has none. They are put in where two linear maps meet: one side is multiplied by a factor, the other one divided by it.
What a model computes changes by rounding only, while weights and activations become as hard to quantize as real ones.
"""

from typing import Any

import torch

FACTOR, COUNT = 20.0, 3
_SEED = 7


@torch.no_grad()
def inject(model: Any, factor: float = FACTOR, count: int = COUNT, seed: int = _SEED) -> Any:
    """Give a ``WanTransformer3DModel`` outlier channels, in place.

    In each block the inputs of self-attention and of the feed-forward part (through shift and scale of their norms,
    which add table and time embedding), the input of cross-attention (through its own norm) and those of both output
    projections (through rows of the value projections) get them.

    Args:
        model: with ``cross_attn_norm=True``.
        factor: how much larger the channels become.
        count: of channels in each place.
        seed: which channels.

    Returns:
        The model.

    Raises:
        ValueError: the model has no norm before cross-attention.
    """
    generator = torch.Generator().manual_seed(seed)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    if not model.config.cross_attn_norm:
        raise ValueError("the model has no affine norm before cross-attention (cross_attn_norm=False)")

    def draw() -> Any:
        return torch.randperm(width, generator=generator)[:count]

    normed = draw()
    embedding = model.condition_embedder.time_proj
    # chunks of the table and of the embedding: shift, scale, gate of attention; the same of the feed-forward part
    rows = torch.cat([chunk * width + normed for chunk in (0, 1, 3, 4)])
    embedding.weight[rows] *= factor
    embedding.bias[rows] *= factor
    for block in model.blocks:
        table = block.scale_shift_table
        for shift, scale in ((0, 1), (3, 4)):
            table[0, shift, normed] *= factor
            table[0, scale, normed] = factor * (1 + table[0, scale, normed]) - 1
        inputs = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.ffn.net[0].proj)
        for linear in inputs:
            linear.weight[:, normed] /= factor
        crossed = draw()
        block.norm2.weight[crossed] *= factor
        block.norm2.bias[crossed] *= factor
        block.attn2.to_q.weight[:, crossed] /= factor
        for attention in (block.attn1, block.attn2):
            passed = draw()
            attention.to_v.weight[passed] *= factor
            attention.to_v.bias[passed] *= factor
            attention.to_out[0].weight[:, passed] /= factor
    return model
