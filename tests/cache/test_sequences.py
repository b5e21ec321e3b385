"""Whatever is done to a cache in whatever order, a latent model at full rank goes on like the dense one."""

import functools
import random

import pytest
import torch
from transformers import DynamicCache

from tests.cache.latent_models import compress, dense_model
from tests.tiny import VOCABULARY


@functools.cache
def pair(family):
    dense = dense_model(family)
    return dense, compress(dense, grouped=True)


class Run:
    """A dense and a latent model with a cache each, to which the same things happen."""

    def __init__(self, family, seed):
        self.models = pair(family)
        self.caches = [DynamicCache(config=model.config) for model in self.models]
        for cache in self.caches:
            cache.activate_past_recording()
        self.random = random.Random(seed)
        self.mask = torch.ones(3, 0, dtype=torch.long)
        self.since = 0  # tokens since the cache was last cut back to its window
        self.feed(4, padded=True)

    def feed(self, count, padded=False):
        """Run both models on new tokens and compare; rows may begin with padding."""
        new = torch.ones(len(self.mask), count, dtype=torch.long)
        if padded:
            new[0, :2] = new[1, :1] = 0
        self.mask = torch.cat([self.mask, new], dim=1)
        ids = torch.randint(3, VOCABULARY, new.shape)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -count:]
        given = {"attention_mask": self.mask, "position_ids": places}
        right, found = (
            model(ids, past_key_values=cache, **given).logits
            for model, cache in zip(self.models, self.caches, strict=True)
        )
        seen = new.bool()
        torch.testing.assert_close(found[seen], right[seen], atol=1e-4, rtol=0)
        self.since += count

    def step(self):
        """Do something at random."""
        action = self.random.choice(["one", "some", "crop", "reorder", "repeat", "select"])
        if action == "one":
            self.feed(1)
        elif action == "some":
            self.feed(self.random.randint(2, 5))
        elif action == "crop" and self.since:
            removed = self.random.randint(0, min(self.since, self.mask.shape[1] - 2))
            self.both(lambda cache: cache.crop(-removed))
            self.mask = self.mask[:, : self.mask.shape[1] - removed]
            self.since = 0
        elif action == "reorder":
            chosen = torch.tensor([self.random.randrange(len(self.mask)) for _ in range(len(self.mask))])
            self.both(lambda cache: cache.reorder_cache(chosen))
            self.mask = self.mask[chosen]
        elif action == "repeat" and len(self.mask) < 5:
            self.both(lambda cache: cache.batch_repeat_interleave(2))
            self.mask = self.mask.repeat_interleave(2, dim=0)
        elif action == "select" and len(self.mask) > 2:
            chosen = torch.tensor(sorted(self.random.sample(range(len(self.mask)), len(self.mask) - 1)))
            self.both(lambda cache: cache.batch_select_indices(chosen))
            self.mask = self.mask[chosen]

    def both(self, change):
        for cache in self.caches:
            change(cache)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "opt"])
@torch.no_grad()
def test_any_order(family, seed):
    run = Run(family, seed)
    for _ in range(25):
        run.step()
    run.feed(3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 40))
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "phi3", "opt"])
@torch.no_grad()
def test_any_order_at_length(family, seed):
    run = Run(family, seed)
    for _ in range(60):
        run.step()
    run.feed(3)
