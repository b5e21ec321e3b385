"""Registers hf_lowbit with transformers and diffusers in programs that never import it. Runs after ``import torch``.

torch calls every entry point of the group "torch.backends" when it has been imported. This one puts a finder in front
of ``sys.meta_path`` that waits for those modules of both libraries that know quantizers; when one of them has been
executed, hf_lowbit registers itself. Until then the cost is this file; a program without them never pays more.

It uses the standard library only, since torch is half imported when it runs; it is silent, and nothing that goes
wrong here may break ``import torch``. ``HF_LOWBIT_AUTOLOAD=0`` switches it off, and so does torch's own
``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

import contextlib
import importlib.abc
import os
import sys
import warnings

# The quantizer tables are the natural place. If one is the first module imported, torch is loaded in the middle of it
# and it never passes the finder; modeling_utils comes later and always before a model is loaded.
EARLY = ("transformers.quantizers.auto", "diffusers.quantizers.auto")
LATE = ("transformers.modeling_utils", "diffusers.models.modeling_utils")


class _RegisteringLoader(importlib.abc.Loader):
    """Runs the real loader, puts it back where it was, then registers."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            import hf_lowbit

            hf_lowbit.register()
        except Exception as error:
            if module.__name__ in LATE:  # the early attempt may come before the library is whole
                library = module.__name__.partition(".")[0]
                warnings.warn(f"hf_lowbit could not register itself with {library}: {error!r}", stacklevel=2)


class Finder(importlib.abc.MetaPathFinder):
    """Wraps the loaders of the watched modules, each once."""

    def __init__(self):
        self._watched = {*EARLY, *LATE}

    def find_spec(self, name, path=None, target=None):
        if name not in self._watched:
            return None
        self._watched.discard(name)
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


def install():
    """Put the finder in front of the others, once; ``import hf_lowbit`` does so too."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def autoload():
    """Install the finder unless that is switched off; the entry point that torch calls."""
    with contextlib.suppress(Exception):
        if os.environ.get("HF_LOWBIT_AUTOLOAD", "1") != "0":
            install()
