"""Publish a compressed model and load it as a stranger would: another process, an empty cache, no token.

``python -m examples.push_and_pull`` needs no network and no account: it starts a small Hub of its own on this machine
and pushes a tiny model of random weights there. With ``--repo me/name`` the same steps go to the real Hub, with the
token of `hf auth login` (add ``--private`` to keep the result to yourself).
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STRANGER = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM  # hf_lowbit need not be imported, only installed
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(8)[None]).logits}, sys.argv[2])
"""


def local_hub(stack: contextlib.ExitStack, home: Path) -> None:
    """Start a Hub and point the clients at it; they read these variables when they are imported."""
    from tests.hub_server import Hub

    hub = stack.enter_context(Hub())
    os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(prog="python -m examples.push_and_pull", description=__doc__)
    parser.add_argument("--repo", help="on the real Hub, user/name; by default a Hub on this machine is used")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.repo is None:
            local_hub(stack, work / "home")
        run(args.repo or "me/tiny-1bit", args.private or None, work, alone=args.repo is None)


def run(repo: str, private: bool | None, work: Path, alone: bool) -> None:
    """Compress, push, look, load elsewhere, compare."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import hf_lowbit
    from hf_lowbit.report.inspect import inspect

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).eval()
    hf_lowbit.quantize(model, hf_lowbit.ARBConfig(variant="rtn", calibration=None))
    # one commit: config, weights and a card; then every hash is read back
    done = model.push_to_hub(repo, base_model="org/tiny", license="mit", private=private)
    print(f"pushed {done.files} files, {done.size:,} bytes, commit {done.commit[:10]}: {done.url}")

    found = inspect(repo)  # a few kilobytes: headers, no weights
    print(f"{found.bits_per_weight:.2f} bits per packed weight, seen without downloading them")

    variables = {**os.environ, "HF_HOME": str(work / "empty"), **({"HF_TOKEN": ""} if alone else {})}
    command = [sys.executable, "-c", STRANGER, repo, str(work / "logits.safetensors")]
    subprocess.run(command, check=True, env=variables, stderr=subprocess.DEVNULL)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(8)[None]).logits
    if not torch.equal(expected, load_file(work / "logits.safetensors")["logits"]):
        raise RuntimeError("the model changed on its way through the Hub")
    print("another process loaded it from the Hub: the same logits, bit for bit")


if __name__ == "__main__":
    main()
