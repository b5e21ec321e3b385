"""Perplexity against a computation by hand, held-out windows, speed, and the whole evaluation of a tiny model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lowbit import ARBConfig, CalibrationError, HfLowbitError, quantize
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.evaluate import decode_speed, evaluate, heldout_tokens, perplexity
from hf_lowbit.report.tables import evaluation_table


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w126 and an end of text."""
    words = {f"w{number}": number for number in range(127)} | {"<end>": 127}
    inner = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def words(count: int) -> str:
    return " ".join(f"w{number % 127}" for number in range(count))


def test_perplexity_is_exp_of_the_mean_over_all_predictions(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 128, (5, 12))
    total = 0.0
    with torch.no_grad():
        for row in tokens:
            probabilities = model(row[None]).logits[0].double().softmax(-1)
            total -= sum(math.log(probabilities[at, row[at + 1]]) for at in range(11))
    expected = math.exp(total / (5 * 11))
    # 1e-6: float32 logits of a model of two layers against float64 from there on
    for batch_size in (1, 2, 5):
        assert perplexity(model, tokens, batch_size, progress=False) == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary(model: LlamaForCausalLM) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, torch.randint(0, 128, (2, 9)), progress=False) == pytest.approx(128, rel=1e-6)
    assert model.training  # as it was before


@pytest.mark.parametrize(
    "tokens", [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.full((1, 4), 128)]
)
def test_perplexity_refuses_tokens_that_do_not_fit(model: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="token"):
        perplexity(model, tokens, progress=False)


def test_perplexity_refuses_nan(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.data[3, 3] = math.nan
    with pytest.raises(HfLowbitError, match="NaN"):
        perplexity(model, torch.zeros(1, 4, dtype=torch.int64), progress=False)


def test_held_out_windows_follow_one_another(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = heldout_tokens([words(100)], tokenizer, 3, 8)
    assert tokens.dtype == torch.int64
    assert tokens.flatten().tolist() == list(range(24))
    with pytest.raises(CalibrationError, match="at most 12 samples"):
        heldout_tokens([words(100)], tokenizer, 13, 8)
    with pytest.raises(ValueError, match="at least 1 sample"):
        heldout_tokens([words(100)], tokenizer, 0, 8)


def test_speed_is_a_ratio_to_the_first_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    found = decode_speed({"a": model, "b": model}, tokenizer, new_tokens=3, repeats=1, prompt="w1 w2")
    assert found["a"]["ratio"] == 1
    assert found["b"]["tokens_per_second"] == pytest.approx(
        found["a"]["tokens_per_second"] * found["b"]["ratio"], rel=1e-9
    )
    with pytest.raises(ValueError, match="at least one"):
        decode_speed({}, tokenizer)


def test_the_whole_evaluation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    dense = save_model(model, tmp_path / "dense", tokenizer)
    quantize(model, ARBConfig(variant="rtn", calibration=None))
    packed = save_model(model, tmp_path / "packed", tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(words(200))
    sizes: dict[str, Any] = {"samples": 2, "sequence_length": 16, "new_tokens": 2, "repeats": 1, "progress": False}
    result = evaluate(packed, text, dense, **sizes)
    rows, ratios = result["models"], result["ratios"]["packed"]
    assert list(rows) == ["packed", "dense"]
    assert rows["packed"]["bytes"] == sum(file.stat().st_size for file in packed.iterdir())
    assert rows["packed"]["bits_per_parameter"] < rows["dense"]["bits_per_parameter"]
    for key in ("perplexity", "bytes", "bits_per_parameter", "tokens_per_second"):
        assert ratios[key] == pytest.approx(rows["packed"][key] / rows["dense"][key])
    assert result["data"] == "text.txt"
    evaluation_table(result)
    alone = evaluate(packed, text, speed=False, **sizes)
    assert alone["ratios"] == {}
    assert alone["models"]["packed"]["perplexity"] == rows["packed"]["perplexity"]
    evaluation_table(alone)
