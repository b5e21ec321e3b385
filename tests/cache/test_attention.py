"""Converted attention as an object: copied, pickled, compiled, offloaded, given adapters, given back."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_lowbit.cache import (
    LatentProjection,
    ReCalKVCache,
    attach_latent_attention,
    cache_bytes,
    detach_latent_attention,
)
from hf_lowbit.cache.adoption import claim
from hf_lowbit.cache.attention import LatentAttention
from hf_lowbit.kernels import latent_attention
from tests.cache.features import FEATURES, generated
from tests.cache.latent_models import compress, dense_model
from tests.tiny import tokens

PROMPT = tokens(2, 10)


def same_tokens(first, second):
    return torch.equal(generated(first, PROMPT)[0], generated(second, PROMPT)[0])


@pytest.fixture
def latent():
    return compress(dense_model("llama"), ranks=24)


class TestObject:
    def test_it_is_still_what_it_was(self, latent):
        attention = latent.model.layers[0].self_attn
        assert isinstance(attention, LlamaAttention) and isinstance(attention, LatentAttention)
        assert type(attention).__name__ == "LatentLlamaAttention"
        assert type(attention) is type(latent.model.layers[1].self_attn)
        assert isinstance(attention.k_proj, LatentProjection)

    def test_the_state_dict_names_nothing_twice(self, latent):
        names = set(latent.state_dict())
        expected = {
            name for name in dense_model("llama").state_dict() if "k_proj" not in name and "v_proj" not in name
        }
        parts = ("weight", "weight_down", "weight_up")
        expected |= {f"model.layers.{i}.self_attn.{p}_proj.{part}" for i in range(2) for p in "kv" for part in parts}
        assert names == expected
        assert not any("rotary" in name for name, _ in latent.model.layers.named_modules())

    def test_a_copy_has_rotary_frequencies_of_its_own(self, latent):
        twin = copy.deepcopy(latent)
        assert same_tokens(latent, twin)
        structure = twin.model.layers[0].self_attn.latent_structure
        assert structure.rotary is twin.model.rotary_emb
        assert structure.rotary is not latent.model.rotary_emb

    @pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "opt"])
    def test_it_can_be_pickled(self, family):
        latent = compress(dense_model(family), grouped=True, latent_bits=4)
        again = pickle.loads(pickle.dumps(latent))
        assert same_tokens(latent, again)
        stream = io.BytesIO()
        torch.save(latent, stream)
        stream.seek(0)
        assert same_tokens(latent, torch.load(stream, weights_only=False))

    def test_a_cache_can_be_pickled(self, latent):
        cache = ReCalKVCache.from_model(latent, latent_bits=4, recent_window=3)
        with torch.no_grad():
            latent(PROMPT[:, :6], past_key_values=cache)
        twin = pickle.loads(pickle.dumps(cache))
        expected = generated(latent, PROMPT, past_key_values=cache)[0]
        assert torch.equal(generated(latent, PROMPT, past_key_values=twin)[0], expected)

    def test_attaching_again_changes_options_alone(self, latent):
        before = latent.model.layers[0].self_attn
        assert attach_latent_attention(latent, latent_bits=3) == 2
        assert latent.model.layers[0].self_attn is before
        found = latent(PROMPT).past_key_values
        assert cache_bytes(found)["codes"] and not cache_bytes(found)["latents"]

    def test_given_back(self, latent):
        expected = generated(latent, PROMPT)[0]
        assert detach_latent_attention(latent) == 0
        for layer in latent.model.layers:
            for name in ("k_proj", "v_proj"):
                setattr(layer.self_attn, name, getattr(layer.self_attn, name).dequantize())
        assert detach_latent_attention(latent) == 2
        assert type(latent.model.layers[0].self_attn) is LlamaAttention
        assert torch.equal(generated(latent, PROMPT)[0], expected)
        fresh = set(vars(dense_model("llama").model.layers[0].self_attn))
        assert set(vars(latent.model.layers[0].self_attn)) == fresh

    def test_a_model_without_latents_is_left_alone(self):
        dense = dense_model("llama")
        assert attach_latent_attention(dense) == 0
        assert type(dense.model.layers[0].self_attn) is LlamaAttention


class TestProjection:
    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_parts_make_the_whole(self, family):
        projection = compress(dense_model(family), grouped=True, rotated=True).model.layers[0].self_attn.v_proj
        x = torch.randn(2, 3, 64)
        z = projection(x, "latent")
        assert z.shape == (2, 1, 3, 32)
        heads = projection(z, "heads")
        assert heads.shape == (2, 2, 3, 16)
        torch.testing.assert_close(heads.transpose(1, 2).flatten(2), projection(x))

    def test_factors_in_half_precision_serve_any_dtype(self):
        latent = compress(dense_model("llama"), factor_dtype=torch.float16)
        exact = compress(dense_model("llama"))
        with torch.no_grad():
            found, right = (model(PROMPT).logits for model in (latent, exact))
            assert 0 < (found - right).abs().max() < 0.05
            assert latent.to(torch.bfloat16)(PROMPT).logits.dtype == torch.bfloat16
        assert latent.model.layers[0].self_attn.k_proj.weight_down.dtype == torch.float16

    def test_only_latents_have_parts(self):
        with pytest.raises(TypeError, match="a projection of format 'low_rank' has no latents"):
            from hf_lowbit.formats.low_rank import LowRankFormat
            from hf_lowbit.layers import PackedLinear

            packed = LowRankFormat.pack(torch.randn(8, 2), torch.randn(2, 8), torch.float32)
            LatentProjection.of(PackedLinear(packed, None, torch.float32))


class TestDecoding:
    """One token goes through the op, everything else through the user's attention function."""

    @pytest.fixture
    def calls(self, monkeypatch):
        """Tokens that were in the cache at every call of the op."""
        found = []
        kernel = latent_attention.TABLE.kernels["reference"]

        def counted(case):
            found.append(case.keys.shape[1])
            return kernel.linear(case)

        counting = latent_attention.Kernel("reference", "counts", kernel.why_not, counted)
        monkeypatch.setitem(latent_attention.TABLE.kernels, "reference", counting)
        return found

    def test_single_tokens_are_decoded_by_the_op(self, latent, calls):
        generated(latent, PROMPT, max_new_tokens=3)
        assert calls == [11, 11, 12, 12]

    def test_recent_tokens_are_a_part_of_their_own(self, latent, calls):
        cache = ReCalKVCache.from_model(latent, latent_bits=4, recent_window=4, sink_tokens=2)
        generated(latent, PROMPT, max_new_tokens=2, past_key_values=cache)
        assert calls == [2, 5, 4, 2, 5, 4]  # the first, the codes, the latest; in two layers

    def test_eager_attention_and_attention_of_the_user_are_called(self, latent, calls):
        latent.set_attn_implementation("eager")
        generated(latent, PROMPT, max_new_tokens=3)
        assert calls == []

    @torch.no_grad()
    def test_when_a_token_is_left_to_the_function_that_was_asked_for(self):
        latent = compress(dense_model("mistral"))
        attention = latent.model.layers[0].self_attn
        one, two = torch.zeros(2, 4, 1, 16), torch.zeros(2, 4, 2, 16)
        mask, flat = torch.ones(2, 1, 1, 9, dtype=torch.bool), torch.ones(2, 9)
        growing, static = (ReCalKVCache.from_model(latent, max_cache_len=size).layers[0] for size in (None, 30))
        everything = claim(DynamicCache(), 0, attention.latent_layout())  # keeps more than the window
        asked = {
            "sdpa": [(one, growing, None), (one, growing, mask), (one, static, mask), (one, everything, mask)],
            "flash_attention_2": [(one, growing, None)],
        }
        refused = {
            "sdpa": [(two, growing, None), (one, static, None), (one, growing, flat)],
            "flash_attention_2": [(one, static, None), (one, growing, mask), (one, everything, None)],
            "eager": [(one, growing, None)],
            "flex_attention": [(one, growing, None)],
        }
        for expected, cases in ((True, asked), (False, refused)):
            for implementation, given in cases.items():
                attention.config._attn_implementation = implementation
                assert all(attention._can_decode(*arguments) is expected for arguments in given), implementation
        attention.config._attn_implementation = "sdpa"
        attention.train()
        assert not attention._can_decode(one, growing, None)

    @pytest.mark.parametrize("bits", [8, 4, 3])
    @pytest.mark.parametrize(("first", "window"), [(0, 0), (3, 0), (0, 5), (3, 5), (9, 9)])
    @pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
    @torch.no_grad()
    def test_the_op_and_the_rebuilt_keys_agree_on_codes(self, family, bits, first, window):
        """One module alone: in the next, a difference in the last digit may be just what turns a code."""
        latent = compress(dense_model(family), rotated=True, latent_bits=bits, recent_window=window, sink_tokens=first)
        cache = latent(PROMPT).past_key_values
        place = torch.full((2, 1), 10)
        inputs, rotary = torch.randn(2, 1, 64), getattr(latent.model, "rotary_emb", None)
        given = {"position_ids": place, "position_embeddings": None if rotary is None else rotary(inputs, place)}
        found = []
        for implementation in ("sdpa", "eager"):
            latent.set_attn_implementation(implementation)
            attention = getattr(latent.model, "decoder", latent.model).layers[0].self_attn
            found.append(attention(inputs, past_key_values=copy.deepcopy(cache), **given)[0])
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


class TestCodes:
    @pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
    def test_more_bits_are_nearer_to_the_latents(self, family):
        latent = compress(dense_model(family), rotated=True)
        errors = []
        with torch.no_grad():
            right = FEATURES["prefill_and_single_steps"](latent, PROMPT)[1]
            for bits in (8, 4, 3):
                coded = compress(dense_model(family), rotated=True, latent_bits=bits, sink_tokens=0)
                found = FEATURES["prefill_and_single_steps"](coded, PROMPT)[1]
                errors.append(sum(float((a - b).square().mean()) for a, b in zip(found, right, strict=True)))
        assert 0 < errors[0] < errors[1] / 20
        assert errors[1] < errors[2] / 2

    @pytest.mark.parametrize("use", ["beam_search", "static_cache", "several_turns", "prefix_shared_by_a_batch"])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_codes_of_8_bits_in_other_uses(self, family, use):
        dense = dense_model(family)
        coded = compress(dense, rotated=True, latent_bits=8)
        with torch.no_grad():
            _, right = FEATURES[use](dense, PROMPT)
            _, found = FEATURES[use](coded, PROMPT)
        # a step of 8 bits is 0.4 % of a latent's range; the first numbers come before tokens can part
        assert (found[0] - right[0]).norm() < 0.02 * right[0].norm()

    @pytest.mark.parametrize("use", ["prompt_lookup", "chunked_prefill", "chunks_by_hand"])
    def test_codes_do_not_depend_on_how_tokens_come(self, use):
        """Without recent tokens in full, what attention sees of a token is what is stored of it, always."""
        coded = compress(dense_model("llama"), rotated=True, latent_bits=4)
        with torch.no_grad():
            if use == "chunks_by_hand":
                found = FEATURES[use](coded, PROMPT)[1]
                torch.testing.assert_close(torch.cat(found, dim=1), coded(PROMPT).logits, atol=1e-4, rtol=0)
                return
            prompt = torch.cat([PROMPT[:1, :6]] * 3, dim=1)
            plain = generated(coded, prompt)[0]
            options = {"prompt_lookup_num_tokens": 3} if use == "prompt_lookup" else {"prefill_chunk_size": 4}
            assert torch.equal(generated(coded, prompt, **options)[0], plain)


class TestCompiled:
    @pytest.mark.parametrize(
        ("family", "bits"),
        [
            ("llama", None),
            pytest.param("llama", 4, marks=pytest.mark.slow),
            pytest.param("opt", None, marks=pytest.mark.slow),
            ("opt", 4),
        ],
    )
    def test_decoding_on_a_static_cache_is_one_graph(self, family, bits):
        latent = compress(dense_model(family), grouped=True)
        self.assert_one_graph(latent, bits, "aot_eager")

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
    def test_inductor(self, family):
        self.assert_one_graph(compress(dense_model(family), grouped=True), None, "inductor")

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["mistral", "gemma3", "phi3"])
    def test_windows(self, family):
        """The stock layer counts the tokens of a window in a Python number: a second graph is made for any number."""
        self.assert_one_graph(compress(dense_model(family), grouped=True), None, "aot_eager", graphs=2)

    def assert_one_graph(self, latent, bits, backend, graphs=1):
        torch._dynamo.reset()
        compiled = torch.compile(latent, fullgraph=True, backend=backend)
        caches = [ReCalKVCache.from_model(latent, max_cache_len=32, latent_bits=bits) for _ in range(2)]
        with torch.no_grad():
            fed = [latent(PROMPT, past_key_values=cache).logits[:, -1:].argmax(-1) for cache in caches]
            counters.clear()
            for place in range(10, 16):
                positions = torch.full((2, 1), place)
                found = compiled(fed[0], past_key_values=caches[0], position_ids=positions).logits
                right = latent(fed[1], past_key_values=caches[1], position_ids=positions).logits
                torch.testing.assert_close(found, right, atol=1e-4, rtol=0)
                fed = [found.argmax(-1), right.argmax(-1)]
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == graphs

    def test_the_static_cache_of_the_user_is_compiled_too(self):
        latent = compress(dense_model("llama"))
        cache = StaticCache(config=latent.config, max_cache_len=20)
        torch._dynamo.reset()
        with torch.no_grad():
            last = latent(PROMPT, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert cache.is_compileable
            step = torch.compile(latent, fullgraph=True, backend="aot_eager")
            logits = step(last, past_key_values=cache, position_ids=torch.full((2, 1), 10)).logits
            expected = latent(torch.cat([PROMPT, last], dim=1)).logits[:, -1:]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["prompt-at-once", "prompt-in-chunks"])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_generate_compiles_by_itself(self, family, options):
        config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
        config._compile_all_devices = True  # it does so on accelerators alone otherwise
        dense = dense_model(family)
        latent = compress(dense)
        latent(PROMPT)  # what transformers prepares in a model's first call, it cannot prepare within a graph
        torch._dynamo.reset()
        counters.clear()
        found = generated(latent, PROMPT, cache_implementation="static", compile_config=config, **options)
        assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
        assert torch.equal(found[0], generated(dense, PROMPT)[0])


class TestOthers:
    """Libraries that change modules under our feet."""

    def test_weights_that_live_elsewhere(self, latent):
        expected = generated(latent, PROMPT)[0]
        offloaded = cpu_offload(copy.deepcopy(latent), execution_device=torch.device("cpu"))
        assert offloaded.model.layers[0].self_attn.k_proj.weight_up.is_meta
        assert torch.equal(generated(offloaded, PROMPT)[0], expected)

    def test_converted_after_accelerate_has_wrapped_the_modules(self):
        plain = compress(dense_model("llama"), ranks=24, attach=False)
        expected = generated(plain, PROMPT)[0]
        wrapped = cpu_offload(plain, execution_device=torch.device("cpu"))
        assert attach_latent_attention(wrapped) == 2
        found = wrapped.generate(
            PROMPT, max_new_tokens=14, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        assert torch.equal(found.sequences, expected)
        assert cache_bytes(found.past_key_values)["latents"]

    def test_a_forward_pass_that_someone_replaced(self):
        plain = compress(dense_model("llama"), attach=False)
        plain.model.layers[1].self_attn.forward = lambda *args, **kwargs: None
        with pytest.raises(
            ValueError, match="the forward pass of this LlamaAttention was replaced by another library"
        ):
            attach_latent_attention(plain)

    def test_adapters_beside_keys_and_values(self, latent):
        model = get_peft_model(latent, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        assert generated(model, PROMPT)[0].shape == (2, 24)

    def test_adapters_on_keys_and_values(self, latent):
        model = get_peft_model(latent, LoraConfig(target_modules=["k_proj"]))
        with pytest.raises(TypeError, match=r"self_attn.k_proj is a Linear and gives no latents; adapters"):
            model(PROMPT)

    def test_continuous_batching(self, latent):
        """Refused in the caller's thread: transformers' own writes errors to its log and returns the prompt."""
        said = "continuous batching keeps dense keys and values in pages"
        prompt = PROMPT[:1]
        for again in (latent, copy.deepcopy(latent), pickle.loads(pickle.dumps(latent))):
            with pytest.raises(NotImplementedError, match=f"^{said}"):
                again.generate(prompt, cache_implementation="paged", max_new_tokens=4)
        with pytest.raises(NotImplementedError, match=f"^{said}"):
            latent.generate_batch(prompt.tolist(), max_new_tokens=4)
        with pytest.raises(NotImplementedError, match=f"^{said}"):
            latent.init_continuous_batching()
        with pytest.raises(NotImplementedError, match=rf"^model.layers.0.self_attn: {said}"):
            latent(PROMPT, use_cache=False, cache=DynamicCache())

    def test_continuous_batching_of_a_model_that_was_given_back(self, latent):
        for layer in latent.model.layers:
            for name in ("k_proj", "v_proj"):
                setattr(layer.self_attn, name, torch.nn.Linear(64, 32, bias=False))
        assert "init_continuous_batching" in vars(latent)
        detach_latent_attention(latent)
        assert "init_continuous_batching" not in vars(latent)
