"""Whole models in bfloat16 decode alike with every kernel that this processor has."""

import pytest
import torch

from hf_lowbit.cache import ReCalKVCache
from hf_lowbit.kernels import dispatch
from hf_lowbit.kernels.cpu import latent as cpu
from tests.cache.latent_models import FAMILIES, compress, dense_model
from tests.tiny import tokens

# what the processor has beside the reference; torch's operations leave norms of keys out
KERNEL = "reference" if cpu.load()[0] is None else "cpu"


def logits(model, kernel, **options):
    """Logits of ten tokens that are fed one by one behind a prompt with padding."""
    ids = tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = ReCalKVCache.from_model(model, **options)
    found = []
    with torch.no_grad(), dispatch.forced(kernel):
        model(ids[:, :9], attention_mask=mask[:, :9], position_ids=places[:, :9], past_key_values=cache)
        for at in range(9, 19):
            out = model(
                ids[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=places[:, at : at + 1],
                past_key_values=cache,
            )
            found.append(out.logits.float())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_kernel_and_reference_agree(family, bits):
    dense = dense_model(family, torch.bfloat16)
    model = compress(dense, grouped=True, rotated=True, factor_dtype=torch.bfloat16)
    right = logits(model, "reference", latent_bits=bits)
    found = logits(model, KERNEL, latent_bits=bits)
    # two layers, each rounded to 8 bits a few times on the way, of random weights that pass errors on
    assert (found - right).norm() < 5e-2 * right.norm()
