"""A small video diffusion transformer that is really trained, for tests, benchmarks and the example.

No video model is to be had where this is developed, and on random weights damage by quantization cannot be seen. So
one is trained here, in minutes on one core, on clips of coloured shapes that move (:mod:`assets.video.data`); its
prompts are three words: colour, shape, direction. It works on pixels, through the real pipeline of diffusers::

    from assets import video

    model = video.load()                          # Wan transformer, 1.55 M parameters; trained on first use
    outliers = video.load(outliers=True)          # the same function, with weights and activations that are harder
    clips = video.sample(model)                   # (6, 3, 8, 16, 16), of 6 prompts and fixed noise, 16 steps
    video.psnr(video.sample(quantized), clips)    # decibels

The colour of a clip is that of its prompt, the direction not always: in minutes no more is to be had, and what
quantization changes is told from the clips of the float model. ``load("quick")`` is a smaller model of a few seconds,
for tests: it knows where colour goes, hardly what moves.
``video.path(...)`` is the folder, for ``from_pretrained``. Nothing of it is ever committed.
"""

from assets.video.data import CHANNELS, FRAMES, SIZE, WORDS, clips, draw_words, embed, indices, render
from assets.video.model import BUDGETS, Budget, load, path
from assets.video.outliers import inject
from assets.video.sampling import PROMPTS, noise, pipeline, psnr, sample

__all__ = [
    "BUDGETS", "CHANNELS", "FRAMES", "PROMPTS", "SIZE", "WORDS", "Budget", "clips", "draw_words", "embed", "indices",
    "inject", "load", "noise", "path", "pipeline", "psnr", "render", "sample",
]  # fmt: skip
