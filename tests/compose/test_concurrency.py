"""Sixteen threads on one model: the tokens of each request are those that it has alone, and memory does not grow.

The slow part does the same on the real model: ``pytest -m slow tests/compose/test_concurrency.py`` (some minutes).
"""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowbit
from hf_lowbit import ARBConfig, ReCalKVConfig, packed_modules
from hf_lowbit.calibration.data import load_texts
from tests.compose.mixed import DATA, FITS, QUIET, everything
from tests.compose.serving import (
    PAD,
    THREADS,
    Cancelled,
    Held,
    answer,
    fused,
    growth,
    held,
    one_by_one,
    requests,
    together,
    watched,
)
from tests.tiny import VOCABULARY, tiny_model, tokens

CONFIGS = {
    "packed": lambda: ARBConfig(calibration=tokens(8), **DATA, **FITS, run=QUIET),
    "latents": lambda: ReCalKVConfig(calibration=tokens(8), **DATA, rank_multiple=4, run=QUIET),
    "codes": lambda: ReCalKVConfig(calibration=None, rank_multiple=4, latent_bits=4, run=QUIET),
    "recipe": everything,  # every way to hold weights, and latents of 4 bits
}
KINDS = ("packed", "latents", "recipe")


@pytest.fixture(scope="module")
def models():
    """A tiny model for each config, in the dtype that the compiled kernels are for."""
    found = {}
    for name in KINDS:
        found[name] = tiny_model(num_hidden_layers=3 if name == "recipe" else 2, dtype=torch.bfloat16)
        hf_lowbit.quantize(found[name], CONFIGS[name]())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_threads_get_the_tokens_of_one(models, kind):
    asked = requests(36, VOCABULARY, tokens=5)
    expected = one_by_one(models[kind], asked)
    assert {request.ends for request in asked} == {None, "stop", "raise", "inside"}
    assert all(
        (found is None) == (request.ends in ("raise", "inside"))
        for found, request in zip(expected, asked, strict=True)
    )
    assert together(models[kind], asked) == expected


def test_a_first_call_may_come_from_all_threads_at_once():
    """Nothing is prepared beforehand: layers, groups of layers and cache layouts are made while others make them."""
    asked = requests(THREADS, VOCABULARY, tokens=2, seed=1)
    found = []
    for _ in range(2):
        model = tiny_model(num_hidden_layers=3, dtype=torch.bfloat16)
        hf_lowbit.quantize(model, everything(calibrated=False))
        found.append(together(model, asked) if not found else one_by_one(model, asked))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["packed", "latents", "codes"])
def test_rows_of_a_ragged_batch_get_what_they_get_alone(kind):
    """In float32, where sums of other shapes do not change which token is the likeliest."""
    model = tiny_model()
    hf_lowbit.quantize(model, CONFIGS[kind]())
    for request in requests(6, VOCABULARY, tokens=5, seed=2)[:3]:
        with fused(model) as fuse:
            rows = answer(model, request, fuse)
            alone = [answer(model, type(request)((row,), request.tokens), fuse)[0] for row in request.prompts]
        assert rows == alone


def test_memory_does_not_grow_over_two_hundred_requests(models):
    """All formats of weights, and latents.

    Seven waves of thirty, of which two warm up, in threads that end with their wave; a quarter is broken off.
    """
    asked = requests(30, VOCABULARY, tokens=2, longest=8, seed=3)
    seen = watched(lambda: together(models["recipe"], asked), waves=7)
    more, tensors = growth(seen, warm_up=2)
    assert tensors == 0
    # What a wave holds at its height varies by some arenas of the C library; a leak of one token's cache for each
    # request would be ten times that.
    assert more < 4 << 20, seen


def test_what_leaks_is_seen(models):
    """The check above fails where it should: a model that keeps something of each request."""
    kept = []
    handle = models["packed"].model.norm.register_forward_hook(
        lambda module, args, out: kept.append(out.new_zeros(1 << 14))
    )
    asked = requests(4, VOCABULARY, tokens=2, longest=8, seed=3)
    try:
        more, tensors = growth(watched(lambda: together(models["packed"], asked, threads=4), waves=4), warm_up=0)
    finally:
        handle.remove()
    assert tensors > 0
    assert more > 0


def test_growth_is_between_halves():
    def seen(*sizes):
        return [Held(size, size) for size in sizes]

    assert growth(seen(9, 9, 1, 2, 3, 5, 6, 7), 2) == (4, 4)
    assert growth(seen(5, 5, 5, 5), 0) == (0, 0)


def test_a_thread_that_raises_is_heard():
    class Broken:
        """Has the one name that a fuse is put at, and generates nothing."""

        def __init__(self):
            self.o_proj = torch.nn.Linear(1, 1)

        def named_modules(self):
            return [("o_proj", self.o_proj)]

        def generate(self, *_, **__):
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        together(Broken(), requests(4, VOCABULARY, tokens=2), threads=2)


def test_an_exception_in_the_middle_leaves_nothing_behind(models):
    """Of a request that was broken off inside a forward pass no tensor is kept but the last input of shared layers."""
    model = models["recipe"]
    before = held().tensors
    with fused(model) as fuse:
        for _ in range(3):
            fuse.burns = True
            with pytest.raises(Cancelled):
                model(tokens(1, 6))
    assert held().tensors <= before + 2 * len(packed_modules(model))


def test_threads_that_end_take_their_share_along(models):
    model, before = models["packed"], held().tensors
    workers = [threading.Thread(target=lambda: model(tokens(1, 4))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert held().tensors <= before


# The real model ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["packed", "latents"])
def test_the_real_model_over_two_hundred_requests(kind, smollm2_path, wikipedia_calibration, wikipedia_heldout):
    own = {"calibration": str(wikipedia_calibration), "samples": 8, "sequence_length": 256, "run": QUIET}
    config = {
        "packed": ARBConfig(**own, iterations=2, quantiles=5),
        "latents": ReCalKVConfig(**own, gradient_samples=4, latent_bits=4),
    }[kind]
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, quantization_config=config, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    words = tokenizer(load_texts(str(wikipedia_heldout))[0]).input_ids
    asked = [
        type(request)(
            tuple(tuple(words[31 * number + 97 * i :][: len(row)]) for i, row in enumerate(request.prompts)),
            request.tokens,
            request.ends,
            request.after,
        )
        for number, request in enumerate(requests(20, VOCABULARY, tokens=6, longest=48))
    ]
    assert min(min(row) for request in asked for row in request.prompts) > PAD
    expected = one_by_one(model, asked)
    seen = watched(lambda: check(together(model, asked), expected), waves=13)
    more, tensors = growth(seen, warm_up=3)
    sizes = [one.resident >> 20 for one in seen]
    print(f"{kind}: {len(asked) * len(seen)} requests, {sizes} MiB, growth {more / 2**20:.1f} MiB")
    assert tensors == 0
    assert more < 16 << 20, seen


def check(found, expected):
    assert found == expected
