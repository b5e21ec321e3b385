"""Which models can work on latents: told by structure and by a trial, refused by name."""

import copy
import re
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn

from hf_lowbit.cache import attach_latent_attention, attention_modules, check_attention, structure_of
from hf_lowbit.cache.probe import norm_shift
from hf_lowbit.errors import UnsupportedModelError
from hf_lowbit.fused_qkv import split_fused_qkv
from tests.cache.features import FEATURES
from tests.cache.latent_models import FAMILIES, compress, dense_model, lively
from tests.tiny import VOCABULARY, tiny_llava, tiny_model, tiny_t5, tokens

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(name, **changes):
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_promised_families_are_found_on_meta_as_well(family):
    dense = dense_model(family)
    names = [name for name, _ in attention_modules(dense)]
    assert len(names) == 2
    assert check_attention(dense) == names
    assert check_attention(copy.deepcopy(dense).to("meta")) == names
    assert check_attention(dense, names[1:]) == names[1:]


def test_a_model_is_converted_before_its_weights_are_there():
    latent = compress(dense_model("qwen3"), ranks=8, attach=False)
    empty = copy.deepcopy(latent).to("meta")
    assert attach_latent_attention(empty) == 2
    empty.to_empty(device="cpu").load_state_dict(latent.state_dict())
    empty.model.rotary_emb = latent.model.rotary_emb  # frequencies are no part of a state dict
    attach_latent_attention(latent)
    for layer in empty.model.layers:
        rotary = layer.self_attn.latent_structure
        object.__setattr__(rotary, "rotary", latent.model.rotary_emb)
    with torch.no_grad():
        right = FEATURES["prefill_and_single_steps"](latent, tokens(2, 10))[1]
        found = FEATURES["prefill_and_single_steps"](empty, tokens(2, 10))[1]
    assert all(map(torch.equal, found, right))


# families that were not thought of one by one, with something of their own each
OTHERS = {
    "Olmo": {},
    "Granite": {"attention_multiplier": 0.3},  # scores scaled by another number
    "StableLm": {"partial_rotary_factor": 0.25},
    "SmolLM3": {"num_hidden_layers": 4},  # the fourth layer has no rotation
    "Phi": {},
    "Mixtral": {"num_local_experts": 2},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_of_known_structure_are_the_dense_ones_too(name):
    dense = small(name, **OTHERS[name])
    lively(dense)
    latent = compress(dense, grouped=True)
    with torch.no_grad():
        ids, right = FEATURES["padding_on_the_left"](dense, tokens(2, 10))
        found_ids, found = FEATURES["padding_on_the_left"](latent, tokens(2, 10))
    assert torch.equal(ids, found_ids)
    torch.testing.assert_close(torch.stack(found), torch.stack(right), atol=1e-4, rtol=0)


def test_layers_without_rotation_keep_no_positions():
    latent = compress(small("SmolLM3", num_hidden_layers=4))
    rotary = [module.latent_structure.rotary is not None for _, module in attention_modules(latent)]
    assert rotary == [True, True, True, False]


def test_the_text_part_of_a_model_that_sees():
    model = tiny_llava()
    names = check_attention(model)
    assert names == [f"model.language_model.layers.{layer}.self_attn" for layer in range(2)]
    latent = compress(model)
    with torch.no_grad():
        right, found = (found(tokens(1, 8)).logits for found in (model, latent))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=0)


class TestRefusals:
    def refused(self, model, *parts):
        with pytest.raises(UnsupportedModelError) as error:
            check_attention(model)
        message = str(error.value)
        assert "\n" not in message
        for part in parts:
            assert part in message
        return message

    def test_every_module_is_named(self):
        message = self.refused(tiny_model("gpt2"), "GPT2Attention consists of c_attn, c_proj, which is not known")
        assert "transformer.h.0.attn, transformer.h.1.attn" in message

    @pytest.mark.parametrize(
        ("name", "changes", "reason"),
        [
            ("Gemma2", {"head_dim": 16}, "Gemma2Attention computes something else"),  # scores are capped
            ("Cohere", {}, "CohereAttention computes something else"),  # rotates neighbours, not halves
            ("Ministral3", {"head_dim": 16}, "Ministral3Attention computes something else"),  # far queries are scaled
            ("Olmo2", {}, "Olmo2Attention could not be tried out"),  # norms of all heads together
            ("Olmo", {"clip_qkv": 4.0}, "clipped"),
            ("DiffLlama", {}, "DiffLlamaAttention has lambda_k1"),
            ("BitNet", {}, "BitNetAttention has attn_sub_norm"),
            ("Lfm2", {}, "k_layernorm"),
            ("FalconH1", {"mamba_d_ssm": 64, "mamba_n_heads": 4}, "its cache layer is of the kind 'hybrid'"),
            (
                "DeepseekV3",
                {"num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 2},
                "DeepseekV3Attention has a latent cache of its own (multi-head latent attention)",
            ),
        ],
    )
    def test_other_structures(self, name, changes, reason):
        self.refused(small(name, **changes), "model.layers.0.self_attn", "model.layers.1.self_attn", reason)

    def test_sinks(self):
        self.refused(tiny_model("gpt_oss"), "GptOssAttention has sinks")

    def test_encoder_and_decoder(self):
        self.refused(tiny_t5(), "decoder.block.0.layer.0.SelfAttention", "T5Attention consists of")
        config = transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        )  # fmt: skip
        bart = transformers.BartForConditionalGeneration(config)
        self.refused(bart, "model.decoder.layers.0.self_attn", "encoder-decoder models are not supported")

    def test_layers_that_share_keys(self):
        model = tiny_model("llama")
        model.config.num_kv_shared_layers = 1
        self.refused(model, "layers that share keys and values with others are not supported")

    def test_rotation_along_several_axes(self):
        model = tiny_model("llama")
        model.config.rope_parameters = {**model.config.rope_parameters, "mrope_section": [2, 2, 4]}
        self.refused(model, "rotary embeddings along several axes are not supported")

    def test_no_attention_at_all(self):
        with pytest.raises(
            UnsupportedModelError, match="Linear has no attention module that keeps a cache of its own"
        ):
            check_attention(nn.Linear(2, 2))

    def test_no_frequencies(self):
        model = tiny_model("llama")
        model.model.rotary_emb = nn.Identity()
        self.refused(model, "its rotary embeddings are of a kind that is not known")

    def test_a_class_that_does_more_than_its_parts_show(self):
        class Louder(transformers.models.llama.modeling_llama.LlamaAttention):
            def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
                return super().forward(hidden_states * 1.1, position_embeddings, attention_mask, **kwargs)

        Louder.__module__ = "transformers.models.llama.modeling_llama"
        model = tiny_model("llama")
        model.model.layers[1].self_attn.__class__ = Louder
        assert "layers.0" not in self.refused(model, "model.layers.1.self_attn: Louder computes something else")

    def test_nothing_is_changed_when_one_module_is_refused(self):
        latent = compress(dense_model("llama"), attach=False)
        latent.model.layers[1].self_attn.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        before = type(latent.model.layers[0].self_attn)
        with pytest.raises(UnsupportedModelError, match=r"model.layers.1.self_attn: LlamaAttention has extra"):
            attach_latent_attention(latent)
        assert type(latent.model.layers[0].self_attn) is before

    def test_keys_alone(self):
        latent = compress(dense_model("llama"), attach=False)
        latent.model.layers[0].self_attn.v_proj = nn.Linear(64, 32)
        with pytest.raises(ValueError, match=r"model.layers.0.self_attn.v_proj is no packed layer of format 'latent'"):
            attach_latent_attention(latent)

    def test_heads_of_another_size(self):
        latent = compress(dense_model("llama"), attach=False)
        attention = latent.model.layers[0].self_attn
        other = compress(dense_model("llama", head_dim=32, num_key_value_heads=1), attach=False)
        attention.k_proj = other.model.layers[0].self_attn.k_proj
        with pytest.raises(ValueError, match=re.escape("self_attn.k_proj has 1 heads of 32, the model 2 of 16")):
            attach_latent_attention(latent)

    def test_options(self):
        latent = compress(dense_model("llama"), attach=False)
        with pytest.raises(ValueError, match="latent_bits must be None or one of 3, 4, 8, got 2"):
            attach_latent_attention(latent, latent_bits=2)


class TestNorms:
    known: ClassVar = {"qwen3": 0.0, "gemma3": 1.0}

    @pytest.mark.parametrize("family", known)
    def test_what_a_weight_lacks(self, family):
        model = tiny_model(family)
        assert norm_shift(model.model.layers[0].self_attn.k_norm) == self.known[family]
        structure = structure_of(model, "model.layers.0.self_attn")
        assert structure.norm_shift == self.known[family]

    def test_other_norms(self):
        norm = nn.LayerNorm(16, bias=False)  # takes the mean away
        assert norm_shift(norm) is None


class TestFused:
    def test_the_stock_forward_goes_on_and_memory_is_shared(self):
        model = dense_model("phi3")
        fused = model.model.layers[0].self_attn.qkv_proj.weight
        with torch.no_grad():
            expected = model(tokens(2, 9)).logits
            assert split_fused_qkv(model) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
            torch.testing.assert_close(model(tokens(2, 9)).logits, expected, atol=1e-5, rtol=0)
        attention = model.model.layers[0].self_attn
        assert attention.k_proj.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
        assert "model.layers.0.self_attn.qkv_proj.weight" not in model.state_dict()
        assert split_fused_qkv(model) == []
        twin = copy.deepcopy(model)
        assert twin.model.layers[0].self_attn.qkv_proj._attention is twin.model.layers[0].self_attn

    def test_on_meta_with_biases_and_for_some_modules(self):
        model = dense_model("phi3").to("meta")
        attention = model.model.layers[1].self_attn
        attention.qkv_proj.bias = nn.Parameter(torch.empty(128, device="meta"))
        assert split_fused_qkv(model, ["model.layers.1.self_attn"]) == ["model.layers.1.self_attn"]
        shapes = [tuple(getattr(attention, name).weight.shape) for name in ("q_proj", "k_proj", "v_proj")]
        assert shapes == [(64, 64), (32, 64), (32, 64)]
        assert attention.v_proj.bias.shape == (32,) and attention.v_proj.bias.is_meta

    def test_rows_that_are_no_heads(self):
        model = dense_model("phi3")
        model.model.layers[1].self_attn.qkv_proj = nn.Linear(64, 100)
        with pytest.raises(ValueError, match=r"layers.1.self_attn.qkv_proj has 100 rows, 4 \+ 2 · 2 heads of 16"):
            split_fused_qkv(model)
        assert "qkv_proj" in model.model.layers[0].self_attn._modules
