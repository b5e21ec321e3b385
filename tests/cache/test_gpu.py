"""What only an accelerator can show: layers offloaded while others run, and equality with the dense model on it."""

import pytest
import torch

from hf_lowbit.cache import ReCalKVCache, cache_bytes
from tests.cache.features import FEATURES, generated
from tests.cache.latent_models import FAMILIES, compress, dense_model
from tests.tiny import tokens

pytestmark = pytest.mark.gpu
USES = ("generate_by_itself", "padding_on_the_left", "static_cache", "beam_search", "crop", "reset_of_static_cache")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equality_with_the_dense_model(family, use):
    dense = dense_model(family)
    latent = compress(dense, grouped=True, rotated=True).cuda()
    with torch.no_grad():
        ids, right = FEATURES[use](dense.cuda(), tokens(2, 10).cuda())
        found_ids, found = FEATURES[use](latent, tokens(2, 10).cuda())
    assert torch.equal(ids, found_ids)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"latent_bits": 4}, {"latent_bits": 3, "recent_window": 4}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_offloaded_layers(family, options):
    latent = compress(dense_model(family), rotated=True).cuda()
    prompt = tokens(2, 10).cuda()
    plain = ReCalKVCache.from_model(latent, **options)
    moved = ReCalKVCache.from_model(latent, offloading=True, offload_only_non_sliding=False, **options)
    expected = generated(latent, prompt, past_key_values=plain)
    found = generated(latent, prompt, past_key_values=moved)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(torch.stack(found[1]), torch.stack(expected[1]))
    assert moved.layers[0].keys.device.type == "cpu" or moved.layers[1].keys.device.type == "cpu"
    assert cache_bytes(moved)["total"] == cache_bytes(plain)["total"]


def test_offloading_that_generate_is_asked_for():
    latent = compress(dense_model("llama")).cuda()
    prompt = tokens(2, 10).cuda()
    expected = generated(latent, prompt)[0]
    assert torch.equal(generated(latent, prompt, cache_implementation="offloaded")[0], expected)
