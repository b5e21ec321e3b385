"""Running statistics of a layer's inputs; one implementation for every method."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_lowbit.errors import CalibrationError


class LinearStats:
    """Second moment of what a linear layer receives.

    Sums are kept, not means, so that statistics of several processes add up. A batch is summed in float32, batches in
    float64, which holds such sums almost always exactly: so the result does not depend on which process saw which
    batch, and neither does what is decided by comparing its entries.

    Attributes:
        name: full name of the layer, for messages.
        total: (in_features, in_features), float64, Σ x xᵀ over all tokens.
        tokens: number of tokens seen.
        sequences: number of sequences seen.
        low: least input seen, where a sample is kept.
        high: largest input seen, where a sample is kept.
        kept: the sample, (rows, in_features) of each batch.
    """

    def __init__(self, name: str, in_features: int, device: torch.device | str = "cpu", keep: int = 0) -> None:
        """Start with nothing seen; of every batch ``keep`` rows, evenly spaced, go into a sample."""
        self.name = name
        self.keep = keep
        self.low, self.high = float("inf"), float("-inf")
        self.kept: list[Tensor] = []
        self.total = torch.zeros((in_features, in_features), dtype=torch.float64, device=device)
        self.tokens = 0
        self.sequences = 0

    def update(self, inputs: Tensor, sequences: int | None = None) -> None:
        """Add a batch of inputs.

        Args:
            inputs: (..., in_features), floating.
            sequences: how many sequences they come from; by default the leading dimension. Some models flatten it.

        Raises:
            CalibrationError: the inputs hold NaN or infinity; layer and sample are named.
        """
        sequences = inputs.shape[0] if sequences is None else sequences
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if rows.numel() and not bool(torch.isfinite(rows.abs().max())):  # max hands on both NaN and infinity
            bad = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
            sample = self.sequences + bad * sequences // rows.shape[0]
            raise CalibrationError(f"{self.name}: inputs hold NaN or infinity in calibration sample {sample}")
        if self.keep and len(rows):
            chosen = torch.linspace(0, len(rows) - 1, min(self.keep, len(rows)), dtype=torch.float64).long()
            self.kept.append(rows[chosen.to(rows.device)].cpu())
            self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        self.total += rows.T @ rows
        self.tokens += rows.shape[0]
        self.sequences += sequences

    def copied(self, name: str) -> LinearStats:
        """Return a copy of its own for another layer."""
        found = LinearStats(name, len(self.total), self.total.device, self.keep)
        found.low, found.high, found.kept = self.low, self.high, list(self.kept)
        found.total, found.tokens, found.sequences = self.total.clone(), self.tokens, self.sequences
        return found

    @property
    def sample(self) -> Tensor | None:
        """Rows kept of the inputs, (rows, in_features), float32; None if none were."""
        return torch.cat(self.kept) if self.kept else None

    def second_moment(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``H = (2 / sequences) Σ x xᵀ``, (in_features, in_features), by default in float32.

        Raises:
            CalibrationError: nothing was seen, or the inputs are too large for the dtype.

        Source: GPTQ's accumulation, as BiLLM and ARB-LLM use it; the factor 2/N is a scale without effect.
        """
        if not self.sequences:
            raise CalibrationError(f"{self.name}: received no calibration input; it may be unused in the forward pass")
        moment = (self.total * (2.0 / self.sequences)).to(dtype)
        if not bool(torch.isfinite(moment).all()):
            raise CalibrationError(f"{self.name}: inputs are too large, their second moment overflows {dtype}")
        return moment


@dataclasses.dataclass
class PairedStats:
    """Inputs of a layer in two models, for methods that compare them (``LowBitConfig.streams``).

    Attributes:
        dense: in the dense model, if that was asked for.
        compressed: in the model whose blocks before this one are compressed, if that was asked for.
        cross: (in_features, in_features), float64, Σ x x'ᵀ of dense and compressed inputs over the same tokens, if
            both were and their products, too.
        stacked: (in_features, in_features), float64, second moment of averages of the compressed inputs over samples,
            if that was asked for (``LowBitConfig.stack_into``).
        gradients: (out_features, out_features), float64, second moment of the gradients of the dense model's loss with
            respect to the outputs, if that was asked for.
    """

    dense: LinearStats | None = None
    compressed: LinearStats | None = None
    cross: Tensor | None = None
    stacked: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def seen(self) -> LinearStats:
        """The inputs that the layer will meet: those of the compressed model, or else of the dense one."""
        found = self.compressed or self.dense
        if found is None:
            raise CalibrationError("no inputs were gathered")
        return found

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return self.seen.tokens

    def second_moment(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return that of :attr:`seen`, see :meth:`LinearStats.second_moment`."""
        return self.seen.second_moment(dtype)
