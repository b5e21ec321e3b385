"""At full rank a latent model is the dense one: same tokens, logits within 1e-4, for every use of a cache."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import multihead
from hf_lowbit.cache import ReCalKVCache, cache_bytes
from hf_lowbit.cache.layers import LatentLayer
from tests.cache.features import FEATURES, NEW, generated, padded
from tests.cache.latent_models import FAMILIES, compress, dense_model
from tests.tiny import tokens

# float32; measured differences are below 4e-5 for logits of up to 10 (tiny models) and 76 (the real one)
TOLERANCE = 1e-4
# One more product of factors rounds once more. Dense logits of the real model differ by 7e-5 between two of torch's
# implementations of attention, and by as much from float64.
TOLERANCE_OF_ROTATED = 2e-4
# every family by default, the rest of the uses for two families that have everything special between them
COMMON = ("generate_by_itself", "static_cache", "padding_on_the_left", "beam_search", "prompt_lookup", "crop")
THOROUGH = ("llama", "gemma3")
MATRIX = [
    pytest.param(family, use, marks=[] if use in COMMON or family in THOROUGH else [pytest.mark.slow])
    for family in FAMILIES
    for use in FEATURES
]


@functools.cache
def pair(family):
    dense = dense_model(family)
    return dense, compress(dense, grouped=True, rotated=True)


def real_model(path):
    """A real model and a prompt of real text."""
    text = [
        "The lighthouse keeper climbed the stairs every evening to light",
        "Metals that do not rust: gold, silver,",
    ]
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = torch.tensor([tokenizer(line)["input_ids"][:9] for line in text])
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), prompt


@pytest.fixture(scope="module")
def whole_pair(smollm2_path):
    """All thirty layers of a real model, and its latent twin."""
    dense, prompt = real_model(smollm2_path)
    return dense, compress(dense), prompt


@pytest.fixture(scope="module")
def real_pair(smollm2_path):
    """The first four layers of a real model with 2000 of its words, its latent twin, and a prompt of real text."""
    dense, prompt = real_model(smollm2_path)
    dense.model.layers = dense.model.layers[:4]
    dense.config.num_hidden_layers = 4
    words = torch.cat([prompt.flatten(), torch.arange(2000)]).unique()
    dense.model.embed_tokens.weight = torch.nn.Parameter(dense.model.embed_tokens.weight[words])
    dense.lm_head.weight = dense.model.embed_tokens.weight
    dense.config.vocab_size = len(words)
    return dense, compress(dense), torch.searchsorted(words, prompt)


@pytest.fixture(scope="module")
def multihead_pair():
    """The model of bytes in which every query head has keys and values of its own, and its latent twin."""
    path = multihead.folder()
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = ["The lighthouse", "Metals that do"]
    prompt = torch.tensor([tokenizer(line)["input_ids"][:12] for line in text])
    assert dense.config.num_key_value_heads == dense.config.num_attention_heads
    return dense, compress(dense, grouped=True), prompt


def assert_same(use, dense, latent, prompt, tolerance=TOLERANCE):
    with torch.no_grad():
        ids, numbers = use(dense, prompt)
        found_ids, found = use(latent, prompt)
    assert torch.equal(ids, found_ids)
    assert len(numbers) == len(found)
    for right, ours in zip(numbers, found, strict=True):
        torch.testing.assert_close(ours, right, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("family", "use"), MATRIX)
def test_every_family_in_every_use(family, use):
    assert_same(FEATURES[use], *pair(family), tokens(2, 10))


@pytest.mark.parametrize("use", FEATURES)
def test_real_weights_in_every_use(real_pair, use):
    assert_same(FEATURES[use], *real_pair)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("use", FEATURES)
def test_a_whole_real_model_in_every_use(whole_pair, use):
    assert_same(FEATURES[use], *whole_pair)


@pytest.mark.slow  # trains for minutes where the model is not there yet
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("use", FEATURES)
def test_trained_weights_without_shared_heads_in_every_use(multihead_pair, use):
    """As many key heads as query heads (no GQA), all four layers, keys in two groups of four heads."""
    assert_same(FEATURES[use], *multihead_pair)


@pytest.mark.parametrize("use", ["generate_by_itself", "beam_search"])
def test_real_weights_with_rotated_latents(real_pair, use):
    dense, _, prompt = real_pair
    assert_same(FEATURES[use], dense, compress(dense, rotated=True), prompt, TOLERANCE_OF_ROTATED)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_assistant_of_the_other_kind(family):
    dense, latent = pair(family)
    prompt = tokens(1, 10)
    expected = generated(dense, prompt)[0]
    assert torch.equal(generated(latent, prompt, assistant_model=copy.deepcopy(dense))[0], expected)
    assert torch.equal(generated(dense, prompt, assistant_model=copy.deepcopy(latent))[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_generate_holds_latents_of_every_layer(family):
    latent = pair(family)[1]
    found = latent.generate(tokens(2, 10), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    cache = found.past_key_values
    assert len(cache.layers) == 2
    assert all(isinstance(layer, LatentLayer) for layer in cache.layers)
    assert cache_bytes(cache)["dense"] == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"max_cache_len": 48}], ids=["growing", "static"])
@pytest.mark.parametrize("at_once", [True, False])
def test_our_own_cache(family, options, at_once):
    dense, latent = pair(family)
    prompt, mask = padded(tokens(2, 10))
    expected = generated(dense, prompt, attention_mask=mask)
    cache = ReCalKVCache.from_model(latent, **options) if at_once else ReCalKVCache(latent.config, **options)
    assert at_once == all(isinstance(layer, LatentLayer) for layer in cache.layers)
    found = generated(latent, prompt, attention_mask=mask, past_key_values=cache)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(torch.stack(found[1]), torch.stack(expected[1]), atol=TOLERANCE, rtol=0)
    assert cache.is_compileable == bool(options)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt"])
def test_one_group_of_plain_factors(family):
    dense = pair(family)[0]
    assert_same(FEATURES["padding_on_the_left"], dense, compress(dense), tokens(2, 10))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_half_precision_follows_the_dense_model(family):
    """Factors and latents in bfloat16: the difference is of the size that rounding makes anywhere in such a model."""
    dense = dense_model(family, torch.bfloat16)
    latent = compress(dense, factor_dtype=torch.bfloat16)
    exact = dense_model(family)
    prompt = tokens(2, 10)
    with torch.no_grad():
        right = exact.to(torch.float32)(prompt).logits
        rounding = (dense(prompt).logits - right).abs().mean()
        ours = (FEATURES["prefill_and_single_steps"](latent, prompt)[1][-1] - right[:, -1:]).abs().mean()
    assert ours < 3 * rounding


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
def test_gradients_of_training_are_those_of_the_dense_model(family):
    dense, latent = (copy.deepcopy(model).train() for model in pair(family))
    prompt = tokens(2, 10)
    norms = []
    for model in (dense, latent):
        embeddings = model.get_input_embeddings()(prompt).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=prompt).loss.backward()
        norms.append(embeddings.grad)
    torch.testing.assert_close(norms[1], norms[0], atol=1e-5, rtol=1e-3)


def test_a_single_token_with_gradients_goes_the_way_that_has_them():
    latent = pair("llama")[1]
    cache = latent(tokens(1, 6)).past_key_values
    embeddings = latent.get_input_embeddings()(tokens(1, 7)[:, -1:]).detach().requires_grad_()
    latent(inputs_embeds=embeddings, past_key_values=cache).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
