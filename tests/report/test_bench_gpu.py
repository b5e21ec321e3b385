"""The section for GPUs, on the CPU: what it counts, and what it says where there is no GPU."""

import pytest
import torch

from benchmarks.kernels import gpu


def test_share_of_the_roofline():
    rate = gpu.rates("cpu", 64, 0.01)
    assert all(each > 0 for each in rate)
    case = gpu.measure("cpu", 64, 256, 3, (1e30, 1e6), 0.01)
    took = case["microseconds"]["ours"] * 1e-6
    assert case["share_of_roofline"] == pytest.approx(2 * 3 * 64 * 256 / 1e6 / took, rel=0.01)  # operations decide
    slow = gpu.measure("cpu", 64, 256, 3, (1e6, 1e30), 0.01)
    assert slow["share_of_roofline"] > 1e-3 and slow["microseconds"]["dense bfloat16"] > 0  # bytes decide


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_it_says_so():
    assert gpu.main() == "there is no GPU here; nothing was measured"
