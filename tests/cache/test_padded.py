"""Rows that are padded on the left: their own first tokens are kept in full, and each is answered as it is alone."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicLayer

from hf_lowbit import CheckpointError
from hf_lowbit.cache import ReCalKVCache, load_cache, padded, save_cache, store
from hf_lowbit.cache.adoption import new_layer
from hf_lowbit.cache.layout import Layout
from tests.cache.latent_models import compress, dense_model
from tests.tiny import tokens

PADS = (0, 3, 6)
LENGTH = 7


@pytest.mark.parametrize(
    ("rows", "slots"),
    [
        ([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]], [2, 0]),  # padding has position 0
        ([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]], [2, 0]),  # or 1
        ([[0, 0, 0], [1, 1, 0], [0, 1, 2]], [2, 2, 0]),  # a single token behind padding
        ([[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]], None),  # padding on the right
        ([[0, 1, 2], [0, 1, 2]], None),
        ([[5, 6, 7]], None),  # positions of the caller's own
        ([[0]], None),
    ],
)
def test_where_rows_begin(rows, slots):
    found = padded.first_slots(torch.tensor(rows))
    assert (None if found is None else found.tolist()) == slots


def layer_of(first=4, bits=3):
    layout = Layout("layer", (12,), (6,), "stamp", rotary=True, bits=bits, recent=0, first=first)
    return new_layer(DynamicLayer(), layout)


def positions_of(tokens_so_far, pads=PADS):
    return torch.stack([(torch.arange(tokens_so_far) - pad).clamp(min=0) for pad in pads])


@pytest.mark.parametrize("stops", [(7, 8, 9, 10, 12), (12,), (7, 12), (8, 9, 12)])
def test_each_row_keeps_its_own_first_tokens(stops):
    keys, values = torch.randn(3, 1, 12, 12), torch.randn(3, 1, 12, 6)
    layer, start = layer_of(), 0
    for stop in stops:
        stored = layer.update(
            keys[:, :, start:stop], values[:, :, start:stop], position_ids=positions_of(stop)[:, start:]
        )
        start = stop
    assert layer.first_slots.tolist() == list(PADS)
    for found, right in zip(layer.latents(*stored), (keys, values), strict=True):
        for row, pad in enumerate(PADS):
            assert torch.equal(found[row, 0, pad : pad + 4], right[row, 0, pad : pad + 4])
            others = torch.cat([found[row, 0, :pad], found[row, 0, pad + 4 :]])
            wanted = torch.cat([right[row, 0, :pad], right[row, 0, pad + 4 :]])
            assert not torch.isclose(others, wanted, atol=1e-4).all()
    layer.reset()
    assert layer.first_slots is None
    assert layer.first(9) is None


def test_rows_are_taken_back_selected_and_repeated():
    keys, values = torch.randn(3, 1, 12, 12), torch.randn(3, 1, 12, 6)
    layer = layer_of()
    layer.update(keys[:, :, :9], values[:, :, :9], position_ids=positions_of(9))
    layer.crop(-2)  # of the last row all but the first token
    stored = layer.update(keys[:, :, 7:], values[:, :, 7:], position_ids=positions_of(12)[:, 7:])
    full = layer.latents(*stored)[0]
    assert torch.equal(full[2, 0, 6:10], keys[2, 0, 6:10])
    layer.reorder_cache(torch.tensor([2, 1, 2]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([1, 2]))
    assert layer.first_slots.tolist() == [6, 3]
    assert torch.equal(layer.first(12)[0][:, 0], torch.stack([keys[2, 0, 6:10], keys[1, 0, 3:7]]))
    layer.crop(-12)
    assert layer.first_slots is None


@pytest.fixture(scope="module")
def latent():
    return compress(dense_model("llama"), ranks=16, rotated=True)


def written(model, pads, rows=None, **options):
    """Tokens and logits of rows of one prompt with its first tokens replaced by padding."""
    prompt = tokens(3, LENGTH)[list(range(3)) if rows is None else rows]
    seen = torch.stack([torch.arange(LENGTH) >= pad for pad in pads])
    cache = ReCalKVCache.from_model(model, **options)
    out = model.generate(
        prompt.where(seen, 0), attention_mask=seen.long(), max_new_tokens=8, do_sample=False, past_key_values=cache,
        return_dict_in_generate=True, output_logits=True, min_new_tokens=8,
    )  # fmt: skip
    return out.sequences[:, LENGTH:], torch.stack(out.logits, 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"latent_bits": 4}, {"latent_bits": 3, "recent_window": 3}], ids=str)
def test_rows_of_a_batch_are_answered_as_they_are_alone(latent, options, implementation):
    latent.set_attn_implementation(implementation)
    try:
        found, logits = written(latent, PADS, **options)
        for row, pad in enumerate(PADS):
            prompt = tokens(3, LENGTH)[row : row + 1, pad:]
            out = latent.generate(
                prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True,
                output_logits=True, past_key_values=ReCalKVCache.from_model(latent, **options),
            )  # fmt: skip
            assert torch.equal(found[row], out.sequences[0, LENGTH - pad :])
            torch.testing.assert_close(logits[row], torch.stack(out.logits, 1)[0], rtol=1e-3, atol=1e-4)
    finally:
        latent.set_attn_implementation("sdpa")


def test_a_file_says_where_rows_begin(latent, tmp_path):
    seen = torch.stack([torch.arange(LENGTH) >= pad for pad in PADS])
    prompt = tokens(3, LENGTH).where(seen, 0)

    def filled():
        cache = ReCalKVCache.from_model(latent, latent_bits=4)
        with torch.no_grad():
            latent(prompt, attention_mask=seen.long(), position_ids=positions_of(LENGTH), past_key_values=cache)
        return cache

    def step(cache):
        mask = torch.cat([seen, torch.ones(3, 1, dtype=torch.bool)], 1).long()
        with torch.no_grad():
            return latent(
                tokens(3, 1), attention_mask=mask, position_ids=positions_of(8)[:, 7:], past_key_values=cache
            ).logits

    cache = filled()
    save_cache(cache, latent, tmp_path / "a")
    loaded = load_cache(latent, tmp_path / "a")
    assert loaded.layers[0].first_slots.tolist() == list(PADS)
    assert torch.equal(step(loaded), step(cache))

    def rewritten(change):
        tensors = load_file(tmp_path / "a")
        tensors["layers.1.first_slots"] = change(tensors["layers.1.first_slots"])
        with safe_open(tmp_path / "a", "pt") as file:
            header = json.loads(file.metadata()[store._KEY])
        header["checksum"] = store._checksum(tensors)
        save_file(tensors, tmp_path / "c", metadata={store._KEY: json.dumps(header)})
        return tmp_path / "c"

    for change, message in (
        (lambda slots: slots - 1, "is out of range"),
        (lambda slots: slots + 1, "is out of range"),
        (lambda slots: slots.long(), "is torch.int64"),
        (lambda slots: slots.float(), "is torch.float32"),
        (lambda slots: slots[:2].clone(), r"is torch.int32 \(2,\), expected torch.int32 \(3,\)"),
    ):
        with pytest.raises(CheckpointError, match=f"layers.1.first_slots {message}"):
            load_cache(latent, rewritten(change))

    cache = filled()
    for layer in cache.layers:
        layer.first_slots = layer.first_slots + LENGTH
    with pytest.raises(ValueError, match="first_slots is out of range"):
        save_cache(cache, latent, tmp_path / "b")


def test_without_rotary_embeddings_a_file_says_it_too(tmp_path):
    model = compress(dense_model("opt"), ranks=16, rotated=True)
    seen = torch.stack([torch.arange(LENGTH) >= pad for pad in PADS])
    cache = ReCalKVCache.from_model(model, latent_bits=4)
    model.generate(
        tokens(3, LENGTH).where(seen, 0), attention_mask=seen.long(), max_new_tokens=2, past_key_values=cache
    )
    save_cache(cache, model, tmp_path / "a")
    for layer, loaded in zip(cache.layers, load_cache(model, tmp_path / "a").layers, strict=True):
        assert loaded.first_slots.tolist() == list(PADS)
        assert torch.equal(loaded.first(9)[0], layer.first(9)[0])
