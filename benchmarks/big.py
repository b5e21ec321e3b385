"""A checkpoint of the shape of an 8-billion-parameter model, made shard by shard, to compress under a memory ceiling.

    python -m benchmarks.big make FOLDER                 # 16 GB; one block in memory at a time
    python -m benchmarks.big run FOLDER WORK [--whole]   # compress, kill, resume, compare; writes scale/8b.json

``run`` goes through the command line of the package, on one thread: killed half way, resumed, and compared with layers
packed alone, or with ``--whole`` with all of a run that nothing disturbs. A watcher reads the memory of the process
ten times a second and ends it when what cannot be reclaimed (anonymous memory) passes the ceiling; pages of mapped
files, which the system can drop, are stated beside it.

The weights are random, so nothing is said of quality. What they share with real ones is what packing meets: matrices
of real sizes, rows of different scale, a few columns that stand out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.common import ROOT, write_result
from hf_lowbit import registry
from hf_lowbit.compress.journal import file_hash
from hf_lowbit.compress.source import CheckpointSource
from hf_lowbit.config import LowBitConfig

# Llama-3-8B, as its config.json states it
SHAPE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
STD, ROW_SPREAD = 0.02, 0.3  # of weights; of the logarithm of a row's scale
OUTLIERS, OUTLIER_SCALE = 6, 8.0  # columns of a matrix that stand out, and how far


def weight(name: str, rows: int, columns: int) -> Tensor:
    """Return a matrix, bfloat16; its name is its seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    scale = torch.exp(ROW_SPREAD * torch.randn(rows, 1, generator=generator)) * STD
    matrix = torch.randn(rows, columns, generator=generator).mul_(scale)
    matrix[:, torch.randperm(columns, generator=generator)[:OUTLIERS]] *= OUTLIER_SCALE
    return matrix.to(torch.bfloat16)


def parts(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the shapes of the tensors of each shard: embeddings, every block, head."""
    wide, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (wide // config.num_attention_heads)
    yield {"model.embed_tokens.weight": (config.vocab_size, wide)}
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        attention = {"q_proj": (wide, wide), "k_proj": (keys, wide), "v_proj": (keys, wide), "o_proj": (wide, wide)}
        feed = {"gate_proj": (inner, wide), "up_proj": (inner, wide), "down_proj": (wide, inner)}
        yield {
            **{f"{block}.self_attn.{name}.weight": shape for name, shape in attention.items()},
            **{f"{block}.mlp.{name}.weight": shape for name, shape in feed.items()},
            f"{block}.input_layernorm.weight": (wide,),
            f"{block}.post_attention_layernorm.weight": (wide,),
        }
    yield {"model.norm.weight": (wide,), "lm_head.weight": (config.vocab_size, wide)}


def make(folder: Path, blocks: int = SHAPE["num_hidden_layers"], **changes: Any) -> int:
    """Write a checkpoint, one shard in memory at a time.

    Args:
        folder: to be made.
        blocks: how many.
        changes: of :data:`SHAPE`.

    Returns:
        Number of parameters.
    """
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": blocks, **changes}, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    shards = list(parts(config))
    places, elements = {}, 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        norms = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items() if len(shape) == 1}
        matrices = {name: weight(name, *shape) for name, shape in shapes.items() if len(shape) == 2}
        save_file({**matrices, **norms}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shapes, file)
        elements += sum(tensor.numel() for tensor in (*matrices.values(), *norms.values()))
    index = {"metadata": {"total_size": 2 * elements, "total_parameters": elements}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"unknown": 0}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return elements


def watched(command: list[str], ceiling: float, until: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run a command on one thread, and look at its memory until it ends.

    Args:
        command: to run.
        ceiling: GiB of anonymous memory at which it is killed.
        until: it is killed as well when this is true.

    Returns:
        Wall and CPU seconds, peaks in GiB of anonymous and of all resident memory, and whether ``until`` came true.

    Raises:
        RuntimeError: it failed, or was killed at the ceiling.
    """
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        anonymous, stopped, ended, status, usage = 0.0, False, 0, 0, None
        while not ended:
            time.sleep(0.1)
            anonymous = max(anonymous, _anonymous(process.pid))
            if not stopped and (anonymous > ceiling or until()):
                stopped = True
                os.kill(process.pid, signal.SIGKILL)  # Popen.kill would reap it, and its usage would be lost
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        if anonymous > ceiling or (process.returncode and not stopped):
            log.seek(0)
            said = log.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{anonymous:.2f} GiB of {ceiling}, ended with {process.returncode}: {said}")
    return {
        "seconds": round(time.perf_counter() - began),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "anonymous_gib": round(anonymous, 2),
        "resident_gib": round(usage.ru_maxrss / 2**20, 2),
        "stopped": stopped,
    }


def _anonymous(pid: int) -> float:
    """Return the anonymous memory of a process in GiB, 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("RssAnon")), 0.0)


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of what decides the model: weights, index, config."""
    return {path.name: file_hash(path) for path in [*sorted(folder.glob("*model*")), folder / "config.json"]}


def differing(dense: Path, packed: Path, every: int) -> tuple[int, list[str]]:
    """Pack every so-many-th layer again, alone and undisturbed, and compare it with what was saved.

    Returns:
        How many layers were looked at, and which differ in any byte.
    """
    source = CheckpointSource(sorted(dense.glob("*.safetensors")))
    stored = CheckpointSource(sorted(packed.glob("*.safetensors")))
    config = LowBitConfig.from_dict(json.loads((packed / "config.json").read_text())["quantization_config"])
    names = list(config.modules or {})[::every]
    found = []
    for name in names:
        unit = registry.LinearUnit(name=name, weight=source.read(f"{name}.weight", torch.bfloat16))
        state = registry.get(config.method).compress(unit, None, config).state()
        same = [torch.equal(stored.read(f"{name}.weight_{part}", value.dtype), value) for part, value in state.items()]
        found += [] if all(same) else [name]
    return len(names), found


def run(folder: Path, work: Path, ceiling: float, options: list[str], name: str, whole: bool) -> None:
    """Compress, killed half way and resumed, and write the result file.

    What is done of this is kept in the working folder, so that the benchmark itself can be interrupted.

    Args:
        folder: of the dense checkpoint.
        work: folder for what is made; some is kept there, the models are not.
        ceiling: GiB of anonymous memory.
        options: of ``hf-lowbit quantize``.
        name: of the result file.
        whole: also compress undisturbed, and compare the hashes of all files; without, sampled layers are compared.
    """
    work.mkdir(exist_ok=True)
    kept = work / f"{name}.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    blocks = sum(part.endswith("input_layernorm.weight") for part in index["weight_map"])
    arguments = [*options, "--max-shard-size", "1GB"]
    base = [sys.executable, "-m", "hf_lowbit", "quantize", str(folder)]
    journal, out = work / ".again.run" / "journal.jsonl", work / "again"

    def keep(key: str, value: Any) -> None:
        found[key] = value
        kept.write_text(json.dumps(found))

    def recorded() -> int:
        return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0

    if "killed" not in found:
        shutil.rmtree(journal.parent, ignore_errors=True)
        row = watched([*base, str(out), *arguments], ceiling, lambda: recorded() >= 7 * blocks // 2)
        keep("killed", {**row, "layers": recorded()})
    if "resumed" not in found:
        row = watched([*base, str(out), *arguments, "--resume"], ceiling)
        rows = [json.loads(line) for line in (out / "compression_report.jsonl").read_text().splitlines()]
        row["bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        row["bits_per_weight"] = 8 * sum(one["bytes"] for one in rows) / sum(one["weights"] for one in rows)
        row["layer_seconds"] = sum(one["seconds"] for one in rows)
        keep("resumed", {**row, "layers": len(rows)})
    if "sampled" not in found:
        looked_at, wrong = differing(folder, out, every=max(1, 7 * blocks // 16))
        keep("sampled", {"layers": looked_at, "differing": wrong})
    if whole and "whole" not in found:
        wanted = hashes(out)
        shutil.rmtree(out, ignore_errors=True)
        row = watched([*base, str(work / "whole"), *arguments], ceiling)
        keep("whole", {**row, "same": hashes(work / "whole") == wanted})
    for path in (out, work / "whole"):
        shutil.rmtree(path, ignore_errors=True)
    shape = {"parameters": index["metadata"]["total_parameters"], "blocks": blocks}
    dense = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    result = {**shape, "dense_bytes": dense, "ceiling_gib": ceiling, "options": arguments, **found}
    path = write_result(f"scale/{name}", result)
    for place, shown in ((folder, "FOLDER"), (work, "WORK")):  # result files name no place of a machine
        path.write_text(path.read_text().replace(str(place), shown))
    print(path)


def main() -> None:
    """Parse arguments, make or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("folder", type=Path)
    maker.add_argument("--blocks", type=int, default=SHAPE["num_hidden_layers"])
    runner = commands.add_parser("run")
    runner.add_argument("folder", type=Path)
    runner.add_argument("work", type=Path)
    runner.add_argument("--ceiling", type=float, default=6.0, help="GiB of anonymous memory")
    runner.add_argument("--whole", action="store_true", help="also run undisturbed, and compare all files")
    runner.add_argument("--name", default="8b", help="of the result file")
    runner.add_argument("--options", default="--method dvd_quant --option layers=all --option weight_init=minmax")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.action == "run":
        run(
            arguments.folder,
            arguments.work,
            arguments.ceiling,
            arguments.options.split(),
            arguments.name,
            arguments.whole,
        )
        return
    print(f"{make(arguments.folder, arguments.blocks) / 1e9:.2f} billion parameters in {arguments.folder}")


if __name__ == "__main__":
    main()
