"""vLLM itself, in an environment of its own: the tokens are those of transformers, and what is refused is named.

All of it is slow: the environment takes minutes to make, an engine seconds to start.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_lowbit import ReCalKVConfig
from tests.hostile.forge import SINGLE, edit_config, edit_tensors
from tests.hub_server import Hub, Repo
from tests.serving import cases, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
COUNT = 24


@pytest.fixture(scope="module")
def engine() -> Path:
    """Python of the environment with vLLM."""
    return environment.python()


def run(engine: Path, work: Path, jobs: list[dict], **settings: str) -> list[dict]:
    """Return what came of some jobs, see engine.py; ``settings`` are variables of its environment."""
    results = work / "results.json"
    script = Path(__file__).with_name("engine.py")
    given = json.dumps([{"prompts": cases.prompts(), "tokens": COUNT, **job} for job in jobs])
    variables = {**cases.settings(), **settings}
    subprocess.run([str(engine), str(script), str(results)], input=given.encode(), check=True, env=variables, cwd=work)
    return json.loads(results.read_text("utf-8"))


def agree(results: list[dict], folders: list[Path]) -> None:
    for folder, result in zip(folders, results, strict=True):
        assert "error" not in result, (folder.name, result)
        assert result["methods"].get("PackedLinearMethod"), (folder.name, result["methods"])
        assert result["tokens"] == cases.generated(folder, cases.prompts(), COUNT), folder.name


def test_every_format_gives_the_tokens_of_transformers(engine, tmp_path):
    """Float32 in both; also while vLLM works on prompts of different lengths together."""
    folders = [cases.save(tmp_path / name, config) for name, config in cases.METHODS.items()]
    agree(run(engine, tmp_path, [{"model": str(folder)} for folder in folders]), folders)


def test_every_structure_gives_the_tokens_of_transformers(engine, tmp_path):
    folders = [
        cases.save(tmp_path / name, cases.INTEGER, name, **changes) for name, changes in cases.ARCHITECTURES.items()
    ]
    agree(run(engine, tmp_path, [{"model": str(folder)} for folder in folders]), folders)


def test_a_compiled_model_gives_the_same_tokens(engine, tmp_path):
    """vLLM compiles by default; the ops have rules for shapes."""
    folder = cases.save(tmp_path / "mixed", cases.MIXED)
    job = {"model": str(folder), "options": {"enforce_eager": False}}
    agree(run(engine, tmp_path, [job]), [folder])


def test_shards_are_served(engine, tmp_path):
    folder = cases.save(tmp_path / "shards", cases.MIXED, shards="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    agree(run(engine, tmp_path, [{"model": str(folder)}]), [folder])


def test_models_of_the_hub_are_fetched_and_checked(engine, tmp_path, served):
    """In another order than a local folder: the files come when the engine asks for them."""
    flipped = Path(shutil.copytree(served, tmp_path / "flipped"))
    content = bytearray((flipped / SINGLE).read_bytes())
    content[-1] ^= 1
    (flipped / SINGLE).write_bytes(content)
    with Hub() as hub:
        for name, folder in {"user/sound": served, "user/flipped": flipped}.items():
            files = {file.name: (file.read_bytes(), file.suffix == ".safetensors") for file in folder.iterdir()}
            hub.repos[name] = Repo()
            hub.repos[name].commit("main", files)
        sound, damaged = run(
            engine,
            tmp_path,
            [{"model": "user/sound"}, {"model": "user/flipped"}],
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "empty"),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
        )
    agree([sound], [served])
    assert f"in {SINGLE}: does not match its checksum" in damaged.get("error", "served"), damaged


def _refusals(base: Path, work: Path) -> list[tuple[dict, str]]:
    """Return jobs that must fail, and words of what is said."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(base, work / name))

    def bare(folder: Path, change) -> Path:
        """Change tensors and leave all checksums out of it: an edit that fits nothing."""
        with safe_open(folder / SINGLE, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata=metadata)
        return folder

    layer = "model.layers.0.self_attn.q_proj"
    latent = cases.save(work / "latent", ReCalKVConfig(ratio=0.5, calibration=None), "llama")
    nan = edit_tensors(copy("nan"), lambda t: t[f"{layer}.weight_row_scale"].view(-1)[:1].fill_(float("nan")))
    unknown = edit_config(copy("unknown"), lambda c: c["modules"][layer].update(format="octal"))
    flipped = bare(copy("flipped"), lambda t: t[f"{layer}.weight_sign"].view(-1)[:1].bitwise_xor_(1))
    missing = bare(copy("missing"), lambda t: t.pop(f"{layer}.weight_sign"))
    shorter = bare(copy("shorter"), lambda t: t.update({f"{layer}.weight_sign": t[f"{layer}.weight_sign"][:-1]}))
    return [
        ({"model": str(latent)}, "method 'recalkv' is not served"),
        ({"model": str(unknown)}, f"{layer}: unknown format 'octal'; known: binary"),
        ({"model": str(flipped)}, f"{layer}.weight_sign in model.safetensors: does not match its checksum"),
        ({"model": str(missing)}, f"{layer}.weight_sign is in none of the weight files"),
        ({"model": str(shorter)}, f"{layer}.weight_sign in model.safetensors is U8"),
        ({"model": str(nan)}, f"damaged checkpoint: {layer}: row_scale holds"),
        ({"model": str(base), "options": {"enable_lora": True}}, "LoRA adapters are not served on packed layers"),
        ({"model": str(base), "options": {"load_format": "dummy"}}, "load_format 'dummy' is not served"),
    ]


def test_what_is_not_served_is_refused_by_name(engine, tmp_path, served):
    jobs, words = zip(*_refusals(served, tmp_path), strict=True)
    for result, said in zip(run(engine, tmp_path, list(jobs)), words, strict=True):
        assert said in result.get("error", "served"), (said, result)


def test_tensor_parallelism_is_refused_by_name(engine, tmp_path, served):
    """Two processes with a worker each: the reason stands in the log of a worker."""
    job = {"model": str(served), "options": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}}
    given = json.dumps([{"prompts": cases.prompts(), "tokens": 1, **job}])
    script = Path(__file__).with_name("engine.py")
    done = subprocess.run(
        [str(engine), str(script), str(tmp_path / "results.json")],
        input=given,
        capture_output=True,
        text=True,
        env={**cases.settings(), "VLLM_CPU_OMP_THREADS_BIND": "0|1"},  # else it wants a NUMA node for each
        check=False,
        timeout=900,
    )
    assert "hf_lowbit: tensor_parallel_size 2 is not served" in done.stdout + done.stderr


def test_the_command_serves_over_http(engine, tmp_path):
    """What ``vllm serve FOLDER`` runs, of a real model, with no option about quantization."""
    folder = cases.save_real(tmp_path / "model", cases.INTEGER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # the command "vllm" of vllm-cpu 0.32.0 ends at once: it asks for the version of a package called vllm
    command = [
        str(engine),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        str(2**27),
    ]
    settings = {**cases.settings(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=settings, cwd=tmp_path)
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
            text = "The capital of France is"
            asked = {"model": str(folder), "prompt": text, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(asked).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
                got = json.load(answer)["choices"][0]["text"]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(120)
    assert got == cases.continued(folder, text, 16)


def _wait(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(900):
        if server.poll() is not None:
            pytest.fail(re.sub(r"\s+", " ", log.read_text("utf-8"))[-2000:])
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(1)
    pytest.fail("the server did not start")
