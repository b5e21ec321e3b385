"""What a cache is used for, each as a function of a model: a dense one and its latent twin must give the same.

Every function returns token ids, which have to be equal, and logits or attention weights, which have to be close. The
model may be any; where a cache is made by hand it is transformers' own.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

Outcome = tuple[Tensor, list[Tensor]]
NEW = 14
FEATURES: dict[str, Callable[[Any, Tensor], Outcome]] = {}


def feature(function: Callable[[Any, Tensor], Outcome]) -> Callable[[Any, Tensor], Outcome]:
    """Add a function to the table."""
    FEATURES[function.__name__] = function
    return function


def generated(model: Any, prompt: Tensor, **options: Any) -> Outcome:
    """Return what ``generate`` makes of a prompt, with the logits of every step."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    found = model.generate(prompt, return_dict_in_generate=True, output_logits=True, **options)
    return found.sequences, list(found.logits)


def with_eager(model: Any) -> Any:
    """Return a copy with the attention that keeps its weights."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def padded(prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Return a batch whose first row is shorter, padded on the left, and its mask."""
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    return prompt * mask, mask


def growing(model: Any) -> DynamicCache:
    """Return an empty cache that can be taken back."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


@feature
def forward_without_cache(model: Any, prompt: Tensor) -> Outcome:
    logits = model(prompt, use_cache=False).logits
    return logits.argmax(-1), [logits]


@feature
def prefill_and_single_steps(model: Any, prompt: Tensor) -> Outcome:
    found = model(prompt[:, :5])
    logits = [found.logits]
    for at in range(5, prompt.shape[1]):
        found = model(prompt[:, at : at + 1], past_key_values=found.past_key_values)
        logits.append(found.logits)
    return torch.cat(logits, dim=1).argmax(-1), logits


@feature
def generate_by_itself(model: Any, prompt: Tensor) -> Outcome:
    return generated(model, prompt)


@feature
def cache_without_config(model: Any, prompt: Tensor) -> Outcome:
    return generated(model, prompt, past_key_values=DynamicCache())


@feature
def static_cache(model: Any, prompt: Tensor) -> Outcome:
    return generated(model, prompt, cache_implementation="static")


@feature
def static_cache_with_room(model: Any, prompt: Tensor) -> Outcome:
    return generated(model, prompt, past_key_values=StaticCache(config=model.config, max_cache_len=40))


@feature
def padding_on_the_left(model: Any, prompt: Tensor) -> Outcome:
    prompt, mask = padded(prompt)
    return generated(model, prompt, attention_mask=mask)


@feature
def padding_with_eager_attention(model: Any, prompt: Tensor) -> Outcome:
    prompt, mask = padded(prompt)
    return generated(with_eager(model), prompt, attention_mask=mask)


@feature
def padding_with_static_cache(model: Any, prompt: Tensor) -> Outcome:
    prompt, mask = padded(prompt)
    return generated(model, prompt, attention_mask=mask, cache_implementation="static")


@feature
def beam_search(model: Any, prompt: Tensor) -> Outcome:
    prompt, mask = padded(prompt)
    return generated(model, prompt, attention_mask=mask, num_beams=3)


@feature
def several_samples(model: Any, prompt: Tensor) -> Outcome:
    torch.manual_seed(5)
    return generated(model, prompt, do_sample=True, num_return_sequences=3)


@feature
def several_turns(model: Any, prompt: Tensor) -> Outcome:
    cache = DynamicCache(config=model.config)
    first, logits = generated(model, prompt[:, :6], past_key_values=cache, max_new_tokens=5)
    second, more = generated(model, torch.cat([first, prompt[:, 6:]], dim=1), past_key_values=cache, max_new_tokens=9)
    return second, logits + more


@feature
def crop(model: Any, prompt: Tensor) -> Outcome:
    cache = growing(model)
    model(prompt, past_key_values=cache)
    cache.crop(-4)
    model(prompt[:, -4:-2], past_key_values=cache)
    cache.crop(-2)
    logits = model(prompt[:, -4:], past_key_values=cache).logits
    return logits.argmax(-1), [logits]


@feature
def prompt_lookup(model: Any, prompt: Tensor) -> Outcome:
    repeated = torch.cat([prompt[:1, :6]] * 3, dim=1)
    tokens, _ = generated(model, repeated, prompt_lookup_num_tokens=3)
    return tokens, []


@feature
def assistant_of_its_own_kind(model: Any, prompt: Tensor) -> Outcome:
    tokens, _ = generated(model, prompt[:1], assistant_model=copy.deepcopy(model))
    return tokens, []


@feature
def chunked_prefill(model: Any, prompt: Tensor) -> Outcome:
    return generated(model, prompt, prefill_chunk_size=3)


@feature
def chunks_by_hand(model: Any, prompt: Tensor) -> Outcome:
    cache, logits = DynamicCache(config=model.config), []
    for chunk in prompt.split(3, dim=1):
        logits.append(model(chunk, past_key_values=cache).logits)
    return torch.cat(logits, dim=1).argmax(-1), logits


@feature
def attention_weights(model: Any, prompt: Tensor) -> Outcome:
    found = with_eager(model)(prompt, output_attentions=True)
    return found.logits.argmax(-1), [found.logits, *found.attentions]


@feature
def attention_weights_of_steps(model: Any, prompt: Tensor) -> Outcome:
    found = with_eager(model).generate(
        prompt,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    return found.sequences, [weights for step in found.attentions for weights in step]


@feature
def reset_and_use_again(model: Any, prompt: Tensor) -> Outcome:
    cache = DynamicCache(config=model.config)
    generated(model, prompt, past_key_values=cache)
    cache.reset()
    return generated(model, prompt.flip(1), past_key_values=cache)


@feature
def reset_of_static_cache(model: Any, prompt: Tensor) -> Outcome:
    cache = StaticCache(config=model.config, max_cache_len=40)
    generated(model, prompt, past_key_values=cache)
    cache.reset()
    return generated(model, prompt.flip(1), past_key_values=cache)


@feature
def prefix_shared_by_a_batch(model: Any, prompt: Tensor) -> Outcome:
    prefix = growing(model)
    model(prompt[:1, :6], past_key_values=prefix)
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(2)
    logits = model(prompt[:, 6:], past_key_values=cache).logits
    again = model(prompt[:1, 6:], past_key_values=prefix).logits
    return logits.argmax(-1), [logits, again]


@feature
def rows_selected(model: Any, prompt: Tensor) -> Outcome:
    cache = growing(model)
    model(prompt[:, :6], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    logits = model(prompt[1:, 6:], past_key_values=cache).logits
    return logits.argmax(-1), [logits]


@feature
def mask_with_holes(model: Any, prompt: Tensor) -> Outcome:
    mask = torch.ones(2, prompt.shape[1] + 1, dtype=torch.long)
    mask[0, 2:4] = mask[1, 5] = 0
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    first = model(prompt, attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache).logits
    one = prompt[:, :1]
    second = model(one, attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache).logits
    # rows of masked tokens mean nothing
    seen = mask[:, :-1].bool()
    return second.argmax(-1), [first[seen], second]


@feature
def positions_of_the_caller(model: Any, prompt: Tensor) -> Outcome:
    cache = DynamicCache(config=model.config)
    steps = torch.tensor([0, 1, 2, 5, 6, 9, 10, 11, 17, 18, 19, 23])[: prompt.shape[1]].expand(2, -1)
    first = model(prompt[:, :-1], position_ids=steps[:, :-1], past_key_values=cache).logits
    second = model(prompt[:, -1:], position_ids=steps[:, -1:], past_key_values=cache).logits
    return second.argmax(-1), [first, second]


@feature
def embeddings_as_input(model: Any, prompt: Tensor) -> Outcome:
    embeddings = model.get_input_embeddings()(prompt)
    found = model.generate(
        inputs_embeds=embeddings,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, list(found.logits)
