"""The video transformer and its training by flow matching.

    python -m assets video            # about ten minutes of one core, then kept in the cache folder

Recipe: noise level sigma = sigmoid(1.2 n + 0.3) for normal n, input (1 - sigma) x + sigma e, target e - x, mean
squared error; AdamW with warm-up and cosine, gradients clipped, an average of the weights over steps. All in float32.
Numbers are drawn with fixed seeds and computed in one thread, so a machine trains the same model each time.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assets.video import data
from assets.video.outliers import inject

logger = logging.getLogger("assets")

# The number goes up whenever the recipe changes, so that no machine keeps a model of an older kind.
_VERSION = 1
_SEED = 0
_WARM_UP, _FLOOR, _RATE = 100, 0.02, 2e-3


@dataclasses.dataclass(frozen=True)
class Budget:
    """How large a model is and how long it is trained.

    Attributes:
        steps: optimizer steps.
        batch: clips per step.
        layers: blocks of the transformer.
    """

    steps: int
    batch: int = 16
    layers: int = 6


BUDGETS = {"full": Budget(1500), "quick": Budget(300, 4, 2)}


def build(layers: int) -> Any:
    """Return the untrained transformer: 128 tokens of 128 columns; its last layer starts at zero."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(_SEED)
    model = WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=4, attention_head_dim=32, in_channels=data.CHANNELS,
        out_channels=data.CHANNELS, text_dim=data.EMBEDDING, freq_dim=64, ffn_dim=384, num_layers=layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def loss_of(model: Any, batch: int, generator: torch.Generator) -> Tensor:
    """Return the flow-matching loss of a freshly drawn batch; one prompt in ten is left out."""
    words, clean = data.clips(batch, generator)
    words[torch.rand(batch, generator=generator) < 0.1] = -1
    sigma = torch.sigmoid(1.2 * torch.randn(batch, generator=generator) + 0.3)
    noise = torch.randn(clean.shape, generator=generator)
    level = sigma[:, None, None, None, None]
    found = model(
        hidden_states=(1 - level) * clean + level * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=data.embed(words),
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(found, noise - clean)


def train(budget: Budget) -> Any:
    """Train a model and return the average of its weights, ready for use."""
    with _one_thread(), torch.random.fork_rng():
        model = build(budget.layers).train()
        average = build(budget.layers).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        generator = torch.Generator().manual_seed(_SEED)
        for step in range(budget.steps):
            optimizer.param_groups[0]["lr"] = _RATE * _schedule(step, budget.steps)
            loss = loss_of(model, budget.batch, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            keep = min(0.995, (1 + step) / (10 + step))
            with torch.no_grad():
                for old, new in zip(average.parameters(), model.parameters(), strict=True):
                    old.lerp_(new, 1 - keep)
            if (step + 1) % 50 == 0:
                logger.info("step %d of %d: loss %.3f", step + 1, budget.steps, loss.detach())
    return average


def _schedule(step: int, steps: int) -> float:
    """Return the share of the full rate: a rise over the first steps, then a cosine down to the floor."""
    warm_up = min(_WARM_UP, steps // 4)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return _FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * done)) / 2


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread inside this block: more than there are free cores make it several times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def path(budget: str = "full", cache: Path | str | None = None) -> Path:
    """Folder of the trained model, which ``WanTransformer3DModel.from_pretrained`` reads; trained if it is not there.

    Args:
        budget: one of :data:`BUDGETS`.
        cache: folder that holds it; None for the one of all assets.

    Raises:
        ValueError: no such budget.
    """
    import assets

    if budget not in BUDGETS:
        raise ValueError(f"budget is {budget!r}; it must be one of {', '.join(BUDGETS)}")

    def fill(target: Path, work: Path) -> None:
        train(BUDGETS[budget]).save_pretrained(target)

    return assets.cached(f"video-{budget}-{_VERSION}", cache, fill)


def load(budget: str = "full", *, outliers: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Return the trained transformer, dense and without gradients.

    Args:
        budget: one of :data:`BUDGETS`.
        outliers: as :func:`assets.video.inject` makes it.
        dtype: of the weights.
    """
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(path(budget)).eval().requires_grad_(False)
    if outliers:
        inject(model)
    return model if dtype == torch.float32 else model.to(dtype)
