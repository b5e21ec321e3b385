"""Two factors in one launch on a real GPU, against float64 on the same device."""

import pytest
import torch

pytest.importorskip("triton.language")

from hf_lowbit.kernels import dispatch
from hf_lowbit.kernels.low_rank import low_rank_linear
from hf_lowbit.kernels.triton import low_rank

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1), (40, 7, 72), (130, 64, 130), (576, 115, 576), (1536, 167, 576), (4096, 819, 4096)]
# The middle and the result are rounded to the dtype, each by at most half of its eps; sums are float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape, dtype):
    n, r, m = shape
    up, down = (torch.randn(s, device="cuda").to(dtype) for s in ((n, r), (r, m)))
    bias = torch.randn(n, device="cuda")
    for tokens in (0, 1, 5, 17, low_rank.MOST_TOKENS, 3 * low_rank.MOST_TOKENS):
        x = torch.randn(tokens, m, device="cuda").to(dtype)
        want = x.double() @ down.double().T @ up.double().T + bias.to(dtype).double()
        with dispatch.forced("triton"):
            got = [low_rank_linear(x, up, down, bias), low_rank.run(x, up, down, bias)]
        for out in got:
            assert out.dtype == dtype
            assert out.shape == (tokens, n)
            assert not tokens or float((out.double() - want).norm() / want.norm()) < TOLERANCE[dtype]
