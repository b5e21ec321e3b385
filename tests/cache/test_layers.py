"""Layers that hold latents: positions and bytes through everything that happens to a cache, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from hf_lowbit.cache import ReCalKVCache, cache_bytes
from hf_lowbit.cache.adoption import claim, new_layer
from hf_lowbit.cache.layers import LatentDynamicLayer, LatentSlidingLayer, LatentStaticLayer
from hf_lowbit.cache.layout import Layout
from hf_lowbit.kernels.latent_codec import row_bytes
from tests.cache.latent_models import compress, dense_model
from tests.tiny import tokens

LAYOUT = Layout("model.layers.0.self_attn", (8, 4), (6,), "stamp", rotary=True)


def layout(**changes):
    return Layout(**{**vars(LAYOUT), **changes})


def filled(stock, length, batch=2, step=None, first=0, **changes):
    """Return a latent layer after tokens in steps; the key of a token at position p is p everywhere."""
    layer = new_layer(stock, layout(**changes))
    feed(layer, length, batch, step, first)
    return layer


def feed(layer, length, batch=2, step=None, first=0):
    for start in range(first, first + length, step or length):
        stop = min(start + (step or length), first + length)
        places = torch.arange(start, stop).expand(batch, -1) + 100 * torch.arange(batch)[:, None]
        keys = places[:, None, :, None].float().expand(-1, 1, -1, 12)
        layer.update(keys, -keys[..., :6], position_ids=places)


def assert_positions(layer, expected):
    """The stored positions are these, and every key is still that of its position."""
    assert layer.stored_positions.tolist() == expected
    assert layer.stored_positions.dtype == torch.int32
    assert torch.equal(layer.keys[:, 0, :, 0], layer.stored_positions.float())
    assert torch.equal(layer.values[:, 0, :, 0], -layer.stored_positions.float())


class TestPositions:
    @pytest.mark.parametrize("step", [1, 3, 9])
    def test_growing(self, step):
        layer = filled(DynamicLayer(), 9, step=step)
        assert_positions(layer, [list(range(9)), list(range(100, 109))])

    @pytest.mark.parametrize("step", [1, 3, 9])
    def test_window(self, step):
        layer = filled(DynamicSlidingWindowLayer(sliding_window=5), 9, step=step)
        assert_positions(layer, [[5, 6, 7, 8], [105, 106, 107, 108]])
        assert layer.get_seq_length() == 9

    def test_what_is_visible_is_what_update_returned(self):
        layer = new_layer(DynamicSlidingWindowLayer(sliding_window=5), LAYOUT)
        for start in range(0, 12, 3):
            places = torch.arange(start, start + 3)[None]
            keys = places[:, None, :, None].float().expand(-1, 1, -1, 12)
            returned = layer.update(keys, keys[..., :6], position_ids=places)[0]
            assert torch.equal(returned[:, 0, :, 0].int(), layer.visible_positions)

    def test_static(self):
        stock = StaticCache(config=dense_model("llama").config, max_cache_len=6).layers[0]
        layer = filled(stock, 4, step=2)
        assert isinstance(layer, LatentStaticLayer)
        assert_positions(layer, [[0, 1, 2, 3, 0, 0], [100, 101, 102, 103, 0, 0]])
        layer.reset()
        assert int(layer.get_seq_length()) == 0
        feed(layer, 3, first=7)
        assert_positions(layer, [[7, 8, 9, 0, 0, 0], [107, 108, 109, 0, 0, 0]])

    def test_crop(self):
        layer = filled(DynamicLayer(), 9)
        layer.crop(-4)
        feed(layer, 2, first=20)
        assert_positions(layer, [[0, 1, 2, 3, 4, 20, 21], [100, 101, 102, 103, 104, 120, 121]])

    def test_crop_of_a_window_that_records_its_past(self):
        cache = DynamicCache(config=dense_model("mistral").config)
        cache.layers[0] = DynamicSlidingWindowLayer(sliding_window=5)
        cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=5)
        cache.activate_past_recording()
        layer = claim(cache, 0, LAYOUT)
        feed(layer, 9, step=3)
        layer.crop(-3)
        assert_positions(layer, [[2, 3, 4, 5], [102, 103, 104, 105]])
        assert layer.get_seq_length() == 6

    def test_selecting_rows(self):
        layer = filled(DynamicLayer(), 3, batch=3)
        layer.reorder_cache(torch.tensor([2, 0, 0]))
        assert layer.stored_positions[:, 0].tolist() == [200, 0, 0]
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0, 1, 5]))
        assert_positions(layer, [[200, 201, 202], [200, 201, 202], [0, 1, 2]])

    def test_one_row_of_positions_serves_a_batch(self):
        layer = new_layer(DynamicLayer(), LAYOUT)
        layer.update(torch.zeros(3, 1, 2, 12), torch.zeros(3, 1, 2, 6), position_ids=torch.tensor([[4, 9]]))
        assert layer.stored_positions.tolist() == [[4, 9]] * 3

    def test_none_are_kept_without_rotation(self):
        layer = new_layer(DynamicLayer(), layout(rotary=False))
        layer.update(torch.zeros(3, 1, 2, 12), torch.zeros(3, 1, 2, 6))
        assert layer.visible_positions is None
        assert layer.held()["positions"] == []


class TestCodes:
    @pytest.mark.parametrize("bits", [8, 4, 3])
    def test_rows_of_bytes_are_stored_and_latents_come_back(self, bits):
        layer = new_layer(DynamicLayer(), layout(bits=bits))
        keys, values = torch.randn(2, 1, 5, 12), torch.randn(2, 1, 5, 6)
        stored = layer.update(keys, values, position_ids=torch.arange(5)[None])
        assert stored[0].dtype == torch.uint8 and stored[0].shape[-1] == row_bytes((8, 4), bits)
        found = layer.latents(*stored)
        assert (found[0] - keys).abs().max() < 6 / (2**bits - 1)
        assert (found[1] - values).abs().max() < 6 / (2**bits - 1)

    @pytest.mark.parametrize("step", [1, 2, 7])
    def test_the_latest_tokens_are_kept_in_full(self, step):
        layer = new_layer(DynamicLayer(), layout(bits=3, recent=3))
        keys, values = torch.randn(2, 1, 7, 12), torch.randn(2, 1, 7, 6)
        for places in torch.arange(7).split(step):
            stored = layer.update(keys[:, :, places], values[:, :, places], position_ids=places[None])
        found = layer.latents(*stored)
        for right, ours in zip((keys, values), found, strict=True):
            assert torch.equal(ours[:, :, 4:], right[:, :, 4:])
            assert not torch.isclose(ours[:, :, :4], right[:, :, :4], atol=1e-4).all()
        layer.crop(-2)
        assert layer.recent(5)[0].shape[2] == 1
        assert torch.equal(layer.recent(5)[0], keys[:, :, 4:5])
        layer.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(layer.recent(5)[1][0], values[1, :, 4:5])
        layer.batch_repeat_interleave(2)
        assert layer.recent(5)[1].shape[0] == 4
        layer.reset()
        assert layer.recent(5) is None

    @pytest.mark.parametrize("step", [1, 2, 7])
    @pytest.mark.parametrize("kind", ["growing", "static"])
    def test_the_first_tokens_are_kept_in_full(self, kind, step):
        stock = DynamicLayer() if kind == "growing" else StaticLayer(max_cache_len=12)
        layer = new_layer(stock, layout(bits=3, first=3))
        keys, values = torch.randn(2, 1, 7, 12), torch.randn(2, 1, 7, 6)
        for _ in range(2):
            for places in torch.arange(7).split(step):
                stored = layer.update(keys[:, :, places], values[:, :, places], position_ids=places[None])
            found = layer.latents(*stored)
            for right, ours in zip((keys, values), found, strict=True):
                assert torch.equal(ours[:, :, :3], right[:, :, :3])
                assert not torch.isclose(ours[:, :, 3:7], right[:, :, 3:], atol=1e-4).all()
            layer.reset()

    def test_first_tokens_that_are_taken_back(self):
        layer = new_layer(DynamicLayer(), layout(bits=3, first=4))
        keys, values = torch.randn(2, 1, 9, 12), torch.randn(2, 1, 9, 6)
        for start, stop in ((0, 5), (2, 9)):
            places = torch.arange(start, stop)
            stored = layer.update(keys[:, :, start:stop], values[:, :, start:stop], position_ids=places[None])
            if start == 0:
                layer.crop(-3)
        assert torch.equal(layer.latents(*stored)[0][:, :, :4], keys[:, :, :4])
        layer.reorder_cache(torch.tensor([1, 1]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([3]))
        assert torch.equal(layer.first(9)[1][0], values[1, :, :4])
        layer.crop(-9)
        assert layer.first(9) is None

    def test_a_window_never_keeps_more_in_full_than_it_has(self):
        layer = new_layer(DynamicSlidingWindowLayer(sliding_window=4), layout(bits=4, recent=10))
        for place in range(9):
            stored = layer.update(
                torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 6), position_ids=torch.tensor([[place]])
            )
        assert layer.recent(4)[0].shape[2] == 3
        assert layer.latents(*stored)[0].shape[2] == 4

    def test_a_reset_layer_takes_another_dtype_and_batch(self):
        layer = filled(DynamicLayer(), 3)
        layer.reset()
        layer.update(
            torch.zeros(5, 1, 2, 12).bfloat16(), torch.zeros(5, 1, 2, 6).bfloat16(), position_ids=torch.arange(2)[None]
        )
        assert layer.keys.dtype == torch.bfloat16 and layer.keys.shape[0] == 5


class TestBytes:
    """What the counter says is the formula, and the tensors that the garbage collector finds."""

    def generated(self, family="llama", ranks=8, **options):
        latent = compress(dense_model(family), ranks=ranks)
        cache = ReCalKVCache.from_model(latent, **{"sink_tokens": 0, **options})
        latent.generate(tokens(3, 10), max_new_tokens=7, do_sample=False, eos_token_id=None, past_key_values=cache)
        return cache

    def test_latents(self):
        found = cache_bytes(self.generated())
        # 2 layers, 3 rows, 16 tokens, keys and values of rank 8, 4 bytes; positions of 4 bytes
        assert found["latents"] == 2 * 3 * 16 * (8 + 8) * 4
        assert found["positions"] == 2 * 3 * 16 * 4
        assert found["total"] == found["latents"] + found["positions"]

    @pytest.mark.parametrize("bits", [8, 4, 3])
    def test_codes(self, bits):
        found = cache_bytes(self.generated(latent_bits=bits))
        assert found["codes"] == 2 * 3 * 16 * 2 * (bits + 4)  # 8 numbers of so many bits, and scale and zero point
        assert found["latents"] == found["recent"] == 0

    @pytest.mark.parametrize("options", [{}, {"max_cache_len": 50}], ids=["growing", "static"])
    def test_first_tokens(self, options):
        found = cache_bytes(self.generated(latent_bits=4, sink_tokens=4, **options))
        assert found["first"] == 2 * 3 * 4 * (8 + 8) * 4

    def test_first_tokens_in_a_window(self):
        assert cache_bytes(self.generated("mistral", latent_bits=4, sink_tokens=4))["first"] == 0

    def test_recent_tokens(self):
        found = cache_bytes(self.generated(latent_bits=4, recent_window=5))
        assert found["recent"] == 2 * 3 * 5 * (8 + 8) * 4

    def test_window(self):
        found = cache_bytes(self.generated("mistral"))
        assert found["latents"] == 2 * 3 * 7 * (8 + 8) * 4
        assert found["positions"] == 2 * 3 * 7 * 4

    def test_static(self):
        found = cache_bytes(self.generated(max_cache_len=50))
        assert found["latents"] == 2 * 3 * 50 * (8 + 8) * 4

    def test_no_positions_without_rotation(self):
        assert cache_bytes(self.generated("opt"))["positions"] == 0

    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
    @pytest.mark.parametrize(
        "options", [{}, {"latent_bits": 3, "recent_window": 4, "sink_tokens": 2}, {"max_cache_len": 30}]
    )
    def test_nothing_is_left_out(self, family, options):
        """Every tensor that can be reached from the cache, found by walking through its objects."""
        cache = self.generated(family, **options)
        found, todo, seen = {}, [cache], set()
        while todo:
            item = todo.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, torch.Tensor):
                if item.dim() > 0 and item.numel():
                    found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            elif isinstance(item, dict):
                todo += item.values()
            elif isinstance(item, list | tuple):
                todo += item
            elif hasattr(item, "__dict__"):
                todo += vars(item).values()
        assert sum(found.values()) == cache.nbytes == cache.memory_footprint()["total"]

    def test_half_the_rank_is_half_the_bytes(self):
        dense = dense_model("llama")
        stock = dense.generate(
            tokens(3, 10), max_new_tokens=7, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        counted = cache_bytes(stock.past_key_values)
        assert counted["dense"] == counted["total"] == 2 * 3 * 16 * 64 * 4
        assert cache_bytes(self.generated(ranks=16))["latents"] == counted["dense"] / 2

    def test_an_empty_cache_holds_nothing(self):
        assert ReCalKVCache(dense_model("llama").config).nbytes == 0


class TestRefusals:
    """One clear sentence for each mistake."""

    @pytest.fixture(scope="class")
    def latent(self):
        return compress(dense_model("llama"))

    @pytest.fixture
    def cache(self, latent):
        cache = DynamicCache(config=latent.config)
        with torch.no_grad():
            latent(tokens(2, 6), past_key_values=cache)
        return cache

    def test_another_model(self, cache):
        other = dense_model("llama")
        with torch.no_grad():
            other.model.layers[0].self_attn.k_proj.weight += 0.01
        with pytest.raises(ValueError, match=r"model.layers.0.self_attn: this cache was filled by another model"):
            compress(other)(tokens(2, 1), past_key_values=cache)

    def test_another_rank(self, cache):
        with pytest.raises(ValueError, match=r"another model \(its layer 0 .* ranks \(32,\) and \(32,\)"):
            compress(dense_model("llama"), ranks=8)(tokens(2, 1), past_key_values=cache)

    @torch.no_grad()
    def test_the_same_model_loaded_again_is_no_other_model(self, latent, cache):
        again = compress(dense_model("llama"))
        expected = latent(tokens(2, 1), past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(again(tokens(2, 1), past_key_values=cache).logits, expected)

    def test_dense_keys(self, latent):
        dense = dense_model("llama")
        cache = dense(tokens(2, 6)).past_key_values
        with pytest.raises(ValueError, match="already holds 6 tokens of dense keys and values"):
            latent(tokens(2, 1), past_key_values=cache)

    @pytest.mark.parametrize("options", [{}, {"latent_bits": 4}, {"max_cache_len": 20}], ids=str)
    def test_a_model_that_has_no_latents(self, options):
        """It would fill the cache with dense keys and values, and nobody would notice."""
        dense = dense_model("llama")
        with pytest.raises(ValueError, match="is for models with latent attention, and this model has none"):
            dense(tokens(2, 6), past_key_values=ReCalKVCache(dense.config, **options))

    def test_what_is_no_model_or_cache(self, latent):
        for wrong in (latent, None, "config.json"):
            with pytest.raises(TypeError, match=r"config must be that of a model, model\.config, got"):
                ReCalKVCache(wrong)
        with pytest.raises(TypeError, match="model must be a model, got str"):
            ReCalKVCache.from_model("model")
        with pytest.raises(TypeError, match="cache must be a cache of transformers, got tuple"):
            cache_bytes(())

    def test_another_dtype(self, latent, cache):
        model = copy.deepcopy(latent).bfloat16()
        with pytest.raises(ValueError, match=r"holds torch.float32 latents and was given torch.bfloat16"):
            model(tokens(2, 1), past_key_values=cache)

    @pytest.mark.parametrize("options", [{}, {"max_cache_len": 20}], ids=["growing", "static"])
    def test_another_batch(self, latent, options):
        cache = ReCalKVCache.from_model(latent, **options)
        latent(tokens(2, 6), past_key_values=cache)
        with pytest.raises(ValueError, match="holds a batch of 2 and was given one of 3"):
            latent(tokens(3, 1), past_key_values=cache)

    def test_crop_beyond_the_length(self, cache):
        with pytest.raises(ValueError, match="cannot crop 7 tokens from a cache of 6"):
            cache.crop(-7)
        assert cache.get_seq_length() == 6
        cache.crop(-6)
        assert cache.get_seq_length() == 0

    def test_crop_to_a_length(self, cache):
        with pytest.raises(ValueError, match="negative number of tokens to remove, got 3"):
            cache.crop(3)

    def test_crop_of_what_a_window_has_dropped(self):
        layer = filled(DynamicSlidingWindowLayer(sliding_window=5), 9)
        with pytest.raises(ValueError, match=r"cannot crop 2 tokens: a window of 5 keeps the last 4 only"):
            layer.crop(-2)

    def test_crop_of_a_static_cache(self, latent):
        cache = ReCalKVCache.from_model(latent, max_cache_len=20)
        latent(tokens(2, 6), past_key_values=cache)
        cache.crop(0)
        with pytest.raises(ValueError, match="a static cache cannot be cropped"):
            cache.crop(-1)
        for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices([0])):
            with pytest.raises(ValueError, match="a static cache cannot change its batch"):
                change()

    def test_layers_of_another_kind(self, latent):
        with pytest.raises(TypeError, match=r"type DynamicIndexedLayer cannot hold latents; pass no cache"):
            latent(tokens(2, 6), past_key_values=Cache(layers=[DynamicIndexedLayer(), DynamicIndexedLayer()]))

    def test_a_cache_for_encoders_and_decoders(self, latent):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with pytest.raises(TypeError, match="past_key_values is a EncoderDecoderCache, which cannot hold latents"):
            claim(cache, 0, LAYOUT)
        with pytest.raises(TypeError, match="past_key_values is a SimpleNamespace"):
            claim(SimpleNamespace(), 0, LAYOUT)

    def test_too_few_layers(self, latent):
        with pytest.raises(ValueError, match="the cache has 1 layers, the model at least 2"):
            latent(tokens(2, 6), past_key_values=Cache(layers=[DynamicLayer()]))

    def test_missing_positions(self, latent):
        attention = latent.model.layers[0].self_attn
        with pytest.raises(ValueError, match=r"position_ids must be \(1 or 2, 3\).*got None"):
            attention(
                torch.zeros(2, 3, 64),
                position_embeddings=(torch.ones(1, 3, 16), torch.ones(1, 3, 16)),
                past_key_values=DynamicCache(),
            )

    def test_positions_along_several_axes(self):
        layer = new_layer(DynamicLayer(), LAYOUT)
        with pytest.raises(ValueError, match=r"position_ids must be .* got \(3, 2, 4\)"):
            layer.update(
                torch.zeros(2, 1, 4, 12), torch.zeros(2, 1, 4, 6), position_ids=torch.zeros(3, 2, 4, dtype=int)
            )

    def test_positions_of_another_batch(self):
        layer = new_layer(DynamicLayer(), LAYOUT)
        with pytest.raises(ValueError, match=r"position_ids must be \(1 or 4, 2\) .* got \(3, 2\)"):
            layer.update(torch.zeros(4, 1, 2, 12), torch.zeros(4, 1, 2, 6), position_ids=torch.zeros(3, 2, dtype=int))

    @torch.no_grad()
    def test_a_crop_that_one_layer_cannot_do_is_done_by_none(self):
        latent = compress(dense_model("gemma3", layer_types=["full_attention", "sliding_attention"]))
        cache = ReCalKVCache.from_model(latent)
        latent(tokens(2, 12), past_key_values=cache)
        with pytest.raises(ValueError, match="a window of 8 keeps the last 7 only"):
            cache.crop(-2)
        assert [layer.get_seq_length() for layer in cache.layers] == [12, 12]
        assert cache.layers[0].keys.shape[2] == 12

    def test_latents_of_another_width(self):
        layer = new_layer(DynamicLayer(), LAYOUT)
        with pytest.raises(ValueError, match="do not fit a cache of widths 12 and 6"):
            layer.update(torch.zeros(2, 1, 4, 11), torch.zeros(2, 1, 4, 6), position_ids=torch.zeros(1, 4, dtype=int))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"latent_bits": 5}, "latent_bits must be None or one of 3, 4, 8, got 5"),
            ({"latent_bits": 4.0}, "latent_bits must be None or one of 3, 4, 8, got 4.0"),
            ({"latent_bits": [4]}, r"latent_bits must be None or one of 3, 4, 8, got \[4\]"),
            ({"latent_bits": 4, "recent_window": -1}, "recent_window must be an integer from 0, got -1"),
            ({"latent_bits": 4, "sink_tokens": -1}, "sink_tokens must be an integer from 0, got -1"),
            ({"recent_window": 4}, "recent_window=4 needs latent_bits"),
            ({"max_cache_len": 0}, "max_cache_len must be None or an integer from 1, got 0"),
            ({"latent_bits": 4, "recent_window": 4, "max_cache_len": 9}, "needs a growing cache"),
        ],
    )
    def test_options(self, latent, options, message):
        with pytest.raises(ValueError, match=message):
            ReCalKVCache(latent.config, **options)
        with pytest.raises(ValueError, match=message):
            ReCalKVCache.from_model(latent, **options)

    def test_offloading_without_an_accelerator(self, latent, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        with pytest.raises(ValueError, match="there is no accelerator"):
            ReCalKVCache(latent.config, offloading=True)

    def test_recent_tokens_in_a_static_cache_of_the_user(self):
        latent = compress(dense_model("llama"), latent_bits=4, recent_window=4)
        with pytest.raises(ValueError, match="recent_window=4 needs a dynamic cache, this one is static"):
            latent(tokens(2, 6), past_key_values=StaticCache(config=latent.config, max_cache_len=20))

    def test_a_model_without_latents(self):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no attention that works on latents"):
            ReCalKVCache.from_model(dense_model("llama"))


def test_layers_are_of_transformers_kinds():
    cache = ReCalKVCache.from_model(compress(dense_model("gemma3")))
    assert [type(layer) for layer in cache.layers] == [LatentSlidingLayer, LatentDynamicLayer]
    assert cache.is_sliding == [True, False]
    assert cache.is_croppable
    assert not cache.is_compileable


def test_layers_can_be_moved_off_and_back():
    layer = filled(DynamicLayer(), 5)
    expected = layer.keys.clone()
    layer.offload()
    layer.prefetch()
    feed(layer, 1, first=5)
    assert torch.equal(layer.keys[:, :, :5], expected)


class TestRoom:
    """One token after the other is written behind those that are there, and nobody else's memory is touched."""

    @staticmethod
    def filled(count, batch=2, **changes):
        layer = new_layer(DynamicLayer(), layout(**changes))
        generator = torch.Generator().manual_seed(6)
        keys, values = (torch.randn(batch, 1, count, width, generator=generator) for width in (12, 6))
        for at in range(count):
            layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1], position_ids=torch.tensor([[at]]))
        return layer, keys, values

    @pytest.mark.parametrize("batch", [1, 2])
    def test_what_is_held_is_what_came(self, batch):
        layer, keys, values = self.filled(300, batch)
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)

    def test_room_is_little_and_counted(self):
        layer, keys, _ = self.filled(300)
        held = layer.keys.untyped_storage().nbytes()
        assert keys.nbytes < held <= keys.nbytes * (1 + 1 / 60)
        place = layer.keys.data_ptr()
        layer.update(torch.zeros(2, 1, 1, 12), torch.zeros(2, 1, 1, 6), position_ids=torch.tensor([[300]]))
        assert layer.keys.data_ptr() == place

    def test_no_room_below_64_tokens(self):
        layer, keys, _ = self.filled(50)
        assert layer.keys.untyped_storage().nbytes() == keys.nbytes

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
    def test_a_copy_goes_its_own_way(self, copied):
        layer, keys, _ = self.filled(200)
        other = copied(layer)
        ends = [torch.full((2, 1, 1, 12), value) for value in (1.0, 2.0)]
        for each, end in zip((layer, other), ends, strict=True):
            each.update(end, torch.zeros(2, 1, 1, 6), position_ids=torch.tensor([[200]]))
        for each, end in zip((layer, other), ends, strict=True):
            assert torch.equal(each.keys, torch.cat([keys, end], dim=2))

    def test_after_a_crop(self):
        layer, keys, _ = self.filled(200)
        before = layer.keys
        layer.crop(-30)
        end = torch.full((2, 1, 1, 12), 3.0)
        layer.update(end, torch.zeros(2, 1, 1, 6), position_ids=torch.tensor([[170]]))
        assert torch.equal(layer.keys, torch.cat([keys[:, :, :170], end], dim=2))
        assert torch.equal(before, keys)

    def test_rows_selected_in_between(self):
        layer, keys, _ = self.filled(200)
        layer.reorder_cache(torch.tensor([1, 1]))
        end = torch.full((2, 1, 1, 12), 3.0)
        layer.update(end, torch.zeros(2, 1, 1, 6), position_ids=torch.tensor([[200]]))
        assert torch.equal(layer.keys, torch.cat([keys[[1, 1]], end], dim=2))
