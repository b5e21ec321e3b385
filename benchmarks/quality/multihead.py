"""A small model in which every query head has keys and values of its own (no GQA), trained here in minutes.

No such model ships inside a package that a machine without a model hub can fetch, so this one is trained: a Llama of
0.8 million parameters with 8 heads that predicts bytes, on the Wikipedia articles meant for calibration. It writes no
sense, but its heads are trained and not random. Bytes, since to predict them takes attention from the first minutes
on; a model of words trained as shortly hardly uses it, and then nothing that is done to keys and values matters. Kept
in the cache folder of :mod:`assets`; the seed is fixed.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import assets
from hf_lowbit.calibration.data import load_texts, tokenize

VOCABULARY, LENGTH, BATCH, STEPS = 257, 128, 8, 900
_WARMUP, _RATE = 50, 2e-3


def folder() -> Path:
    """Folder of the model, which ``from_pretrained`` reads; trained the first time, some five minutes on one core."""
    target = assets.cache_folder() / "multihead-bytes"
    if not target.is_dir():
        work = target.with_name(f".{target.name}")
        shutil.rmtree(work, ignore_errors=True)
        tokenizer = _tokenizer()
        stream = tokenize(load_texts(str(assets.wikipedia("calibration"))), tokenizer)
        model = _trained(stream)
        tokenizer.save_pretrained(work)
        model.save_pretrained(work)
        work.rename(target)
    return target


def _tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(assets.wikipedia("calibration"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")  # noqa: S106 - no secret


def _trained(stream: Tensor) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / _WARMUP, 0.05 + 0.95 * (1 + math.cos(math.pi * step / STEPS)) / 2),
    )
    generator = torch.Generator().manual_seed(0)
    bar = tqdm(range(STEPS), desc="training", unit="step")
    for _ in bar:
        starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator).tolist()
        batch = torch.stack([stream[start : start + LENGTH] for start in starts])
        logits = model(input_ids=batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        bar.set_postfix_str(f"loss {float(loss.detach()):.3f}", refresh=False)
    return model.eval()


if __name__ == "__main__":
    print(folder())
