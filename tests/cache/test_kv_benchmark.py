"""The measurement of caches beside each other, on a tiny shape: what it counts, predicts and draws."""

import pytest
import torch

from benchmarks import report_kv
from benchmarks.kv import __main__ as kv
from benchmarks.kv import cases, quality
from hf_lowbit.cache import cache_bytes
from hf_lowbit.kernels.latent_codec import row_bytes

TINY = cases.Shape(hidden=32, heads=4, kv_heads=2, head_dim=16, together=2)


@pytest.fixture(scope="module")
def case():
    return kv.measure(TINY, tokens=40, batch=2, seconds=0.01)


def test_bytes_are_those_of_the_formulas(case):
    held = {name: row["bytes"] for name, row in case["caches"].items()}
    positions = 4
    assert held["dense"] == 2 * 40 * 2 * 32 * 2
    assert held["latents"] == 2 * 40 * (2 * (16 + 16) + positions)
    first = 2 * 4 * 2 * (16 + 16)  # tokens in full
    for bits in (8, 4, 3):
        rows = row_bytes([16], bits) * 2
        assert held[f"latents, {bits} bits"] == 2 * 40 * (rows + positions) + first


def test_every_cache_is_timed(case):
    assert case["layers"] == 30 and case["turns"] >= 8
    for row in case["caches"].values():
        assert row["microseconds"] > 0 and row["floor_microseconds"] >= 0


def test_bytes_held_are_those_the_cache_counts():
    model, make = cases.caches(cases.models(TINY))["latents, 4 bits"]
    cache = make()
    with torch.inference_mode():
        cases.fill(model, cache, TINY, 12, 1)
    assert cases.held(cache) == cache_bytes(cache)["total"] > 0
    assert cache.get_seq_length() == 12


def test_layers_are_so_many_that_none_stays_in_a_cache():
    assert cases.layers_for(cases.SHAPES["SmolLM2-135M"], 512, 1) == 30
    assert cases.layers_for(cases.SHAPES["32 heads, groups of 4"], 16384, 8) == 1


def test_the_roofline():
    """By hand, for SmolLM2-135M at 10 GB/s and 100 operations per byte."""
    found = kv.roofline(cases.SHAPES["SmolLM2-135M"], 1e10, 1e12)
    assert found["nanoseconds"]["dense"] == pytest.approx(2 * 192 * 2 / 10)
    operations = 2 * 192 * 96 + 3 * 192 + 2 * 9 * (64 + 96)
    assert found["nanoseconds"]["latents"] == pytest.approx(max(192 * 2 / 10, operations / 1e3))
    assert found["from_tokens"] == 0  # fewer weights are read, too
    slow = kv.roofline(cases.SHAPES["32 heads, groups of 4"], 1e10, 1e12)
    assert slow["ceiling"] < 1 and slow["from_tokens"] is None


def test_faster_from():
    def at(tokens, dense, latents, batch=1):
        rows = {"dense": {"microseconds": dense}, "latents": {"microseconds": latents}}
        return {"tokens": tokens, "batch": batch, "caches": rows}

    found = [at(512, 9, 8), at(2048, 10, 11), at(4096, 12, 11), at(16384, 20, 15), at(512, 9, 10, batch=8)]
    assert kv.faster_from(found, 1) == 4096
    assert kv.faster_from(found, 8) is None


def test_tables_and_plot(case, tmp_path, monkeypatch):
    shape = {"cases": [{**case, "batch": 1}], "roofline": kv.roofline(TINY, 1e10, 1e12), "faster_from": {"1": 40}}
    environment = {"cpu": "x", "threads": 1, "packages": {"torch": "2"}, "commit": "0"}
    result = {"shapes": {"SmolLM2-135M": shape}, "kernel": "AMX", "kvpress": "no", "environment": environment}
    kv.plot(result, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    monkeypatch.setattr(report_kv, "_read", lambda _: result)
    assert "SmolLM2-135M, 40 | 0.01 (1.00)" in report_kv.memory()
    assert "40 × 1" in report_kv.steps() and "| 40 |" in report_kv.roofline()


class Words:
    """A tokenizer for which every word is a token."""

    def __call__(self, text):
        return {"input_ids": [sum(map(ord, word)) for word in text.split()]}


def test_a_needle_stands_where_it_should():
    text = torch.arange(5000, 5100)
    prompt, answer = quality.haystack(Words(), text, 0.5, ("Here", "12 34"))
    assert prompt.shape == (1, 100)
    whole = Words()("The secret number of Here is 12 34.")["input_ids"]
    begun = Words()("The secret number of Here is")["input_ids"]
    found = prompt[0].tolist()
    at = int(0.5 * (100 - len(whole) - len(begun)))
    assert found[at : at + len(whole)] == whole and found[-len(begun) :] == begun
    assert answer.tolist() == Words()("12 34")["input_ids"]
