"""Inverse second moments, factorised for column-wise error compensation (GPTQ, BiLLM, ARB-LLM, PBS²P)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def inverse_factor(second_moment: Tensor, damping: float, where: str) -> Tensor:
    """Upper Cholesky factor U of the damped inverse: ``UᵀU = (H + λI)⁻¹``, ``λ = damping · mean(diag H)``.

    Args:
        second_moment: (m, m), H, symmetric and positive semi-definite; any positive multiple of Σ x xᵀ.
        damping: share of the mean diagonal that is added to it, > 0.
        where: name of the layer, for log lines.

    Returns:
        (m, m), float64, upper triangular with a positive diagonal. Columns that never saw an input count as unit
        variance. If the factorisation fails at every damping up to 1, the diagonal approximation
        ``diag(1/sqrt(H_jj))``, which compensates nothing across columns; both cases are logged.

    Source: GPTQ (arXiv 2210.17323), Algorithm 1; BiLLM (arXiv 2402.04291), Algorithm 1.
    Differs: float64 throughout, and a failed factorisation raises the damping tenfold instead of stopping the run.
    """
    moment = second_moment.to(torch.float64)
    diagonal = moment.diagonal()
    moment = moment + torch.diag((diagonal == 0).to(moment.dtype))
    mean = moment.diagonal().mean()
    while damping <= 1.0:
        damped = moment + damping * mean * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return upper
        logger.warning(
            "%s: the second moment is not positive definite at damping %g; trying ten times that", where, damping
        )
        damping *= 10
    logger.warning("%s: no factorisation up to damping 1; errors are not carried from column to column", where)
    return torch.diag(moment.diagonal().rsqrt())


def compensate(error: Tensor, factor: Tensor, start: int, end: int, exact: bool) -> Tensor:
    """Change of the columns after a block that makes up for the block's quantization error.

    Args:
        error: (n, end - start), ``W - Q`` of columns ``start:end``.
        factor: (m, m), U of :func:`inverse_factor`.
        start: first column of the block.
        end: column after the block.
        exact: solve with the whole triangular block of U, the optimal update for a block that is fixed at once; False
            divides by its diagonal only, as the published code does.

    Returns:
        (n, m - end), to be subtracted from columns ``end:``.

    Source: ARB-LLM and BiLLM release code (reference form); optimal-brain-surgeon update of a fixed block (exact
    form).
    """
    block = factor[start:end, start:end]
    if exact:
        scaled = torch.linalg.solve_triangular(block, error, upper=True, left=False)
    else:
        scaled = error / block.diagonal()
    return scaled @ factor[start:end, end:]
