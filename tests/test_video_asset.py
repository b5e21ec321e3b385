"""The small video model: its clips are what prompts say, training repeats, outliers change no output."""

import math

import pytest
import torch

from assets import video
from assets.video import data
from assets.video import model as training


def slow_clip(words, start):
    """One clip, pixel by pixel in float64."""
    colour, shape, direction = (data.WORDS[index] for index in words)
    values = data.COLOURS[colour]
    step = data.DIRECTIONS[direction]
    clip = torch.empty(3, data.FRAMES, data.SIZE, data.SIZE, dtype=torch.float64)
    for frame in range(data.FRAMES):
        for row in range(data.SIZE):
            for column in range(data.SIZE):
                apart = []
                for place, begin, move in zip((column, row), start, step, strict=True):
                    away = abs(place - begin - move * frame) % data.SIZE
                    apart.append(min(away, data.SIZE - away))
                across, along = apart

                def edge(distance):
                    return min(max(distance, 0.0), 1.0)

                cover = {
                    "square": edge(3.0 - max(across, along)),
                    "disc": edge(3.4 - math.hypot(across, along)),
                    "plus": max(edge(4 - across) * edge(1.4 - along), edge(1.4 - across) * edge(4 - along)),
                }[shape]
                for channel in range(3):
                    clip[channel, frame, row, column] = cover * 0.9 * values[channel] + (1 - cover) * -0.8
    return clip


def test_clips_are_as_defined():
    generator = torch.Generator().manual_seed(5)
    words = video.draw_words(64, generator)
    assert [len(set(column)) for column in words.T.tolist()] == [4, 3, 4]  # every word occurs
    start = 16 * torch.rand(64, 2, generator=generator)
    found = video.render(words, start)
    assert found.shape == (64, 3, 8, 16, 16)
    chosen = [next(i for i in range(64) if data.WORDS[words[i, 1]] == shape) for shape in data.SHAPES]
    chosen += [next(i for i in range(64) if data.WORDS[words[i, 2]] == direction) for direction in data.DIRECTIONS]
    for index in chosen:
        expected = slow_clip(words[index].tolist(), start[index].tolist())
        torch.testing.assert_close(found[index].double(), expected, rtol=0, atol=1e-5)


def test_prompts_are_frozen_vectors():
    words = torch.tensor([[0, 4, 7], [-1, -1, -1]])
    found = video.embed(words)
    assert found.shape == (2, 3, 32)
    assert torch.equal(found, video.embed(words))
    assert torch.equal(found[1, 0], found[1, 2])  # of the missing prompt
    assert len({tuple(row.tolist()) for row in video.embed(torch.arange(-1, 11)[None])[0]}) == 12


def test_training_repeats_bit_by_bit_and_leaves_the_seed_alone():
    budget = video.Budget(3, 2, 1)
    before = torch.get_rng_state()
    first, second = training.train(budget).state_dict(), training.train(budget).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    untrained = training.build(1).state_dict()
    assert not any(torch.equal(first[name], untrained[name]) for name in first if name.endswith("to_q.weight"))


def test_quick_model_has_learnt_what_prompts_are_about():
    """It is trained for seconds only, so what is asked is little: the colour that is named, on a dark ground."""
    clips = video.sample(video.load("quick"), steps=8)
    for clip, (colour, _, _) in zip(clips, video.PROMPTS, strict=True):
        brightest = clip.flatten(1).topk(60, 1).values.mean(1)  # by channel
        lit = torch.tensor(data.COLOURS[colour]) > 0
        assert float(brightest[lit].min()) > float(brightest[~lit].max()) + 0.3
    assert float(clips.median()) < -0.5


def test_outliers_change_weights_and_no_output():
    model, harder = video.load("quick"), video.load("quick", outliers=True)
    query = [m.blocks[1].attn2.to_q.weight.abs().amax(0) for m in (model, harder)]
    assert (query[1] < query[0] / 19).sum() == 3  # columns of outlier channels are divided
    found = [video.sample(m, steps=4) for m in (model, harder)]
    assert video.psnr(found[1], found[0]) > 100
    assert not torch.equal(found[1], found[0])


def test_guidance_changes_the_videos():
    model = video.load("quick")
    assert video.psnr(video.sample(model, steps=2, guidance=3.0), video.sample(model, steps=2)) < 40


def test_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="budget is 'huge'; it must be one of full, quick"):
        video.path("huge")


@pytest.mark.parametrize("prompt", [("red", "square"), ("square", "red", "up"), ("red", "square", "sideways")])
def test_unknown_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="must be a colour, a shape and a direction of red, green"):
        video.sample(None, (video.PROMPTS[0], prompt))
    with pytest.raises(ValueError, match="there is no prompt"):
        video.indices([])


def test_videos_of_other_shapes_have_no_distance():
    with pytest.raises(ValueError, match=r"videos have shapes \(2, 3\) and \(1, 3\)"):
        video.psnr(torch.zeros(2, 3), torch.zeros(1, 3))


@pytest.mark.slow
def test_full_model_paints_what_it_is_asked_for():
    """Clips are nearer to clips of their own colour, wherever these start, and on the whole of their own direction."""
    starts = torch.cartesian_prod(torch.arange(0, 16.0), torch.arange(0, 16.0))

    def error(clip, prompt):
        words = video.indices([prompt])
        return float((video.render(words.expand(len(starts), 3), starts) - clip).square().mean((1, 2, 3, 4)).min())

    model, coloured, own, others = video.load(), 0, 0.0, 0.0
    for noise in (100, 101, 102):
        for clip, (colour, shape, direction) in zip(video.sample(model, seed=noise), video.PROMPTS, strict=True):
            wanted = error(clip, (colour, shape, direction))
            coloured += wanted < min(
                error(clip, (other, shape, direction)) for other in data.COLOURS if other != colour
            )
            own += wanted
            others += sum(error(clip, (colour, shape, other)) for other in data.DIRECTIONS if other != direction) / 3
    assert coloured >= 15  # of 18
    assert own < 0.95 * others  # in ten minutes single clips still move elsewhere
