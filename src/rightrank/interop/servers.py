"""Launch scripts of servers that load the adapter, unchanged or padded."""

from __future__ import annotations

import shlex

from rightrank.interop.recipe import Recipe
from rightrank.interop.written import Written
from rightrank.schema.errors import ResultsError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
LOOPBACK = "127.0.0.1"  # vLLM's default is every interface; the others default to this one
SERVED_NAME = "rightrank"


def served_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM that fits this rank.

    Raises:
        ResultsError: a rank above the largest that vLLM supports.
    """
    found = next((served for served in VLLM_RANKS if served >= rank), None)
    if found is None:
        raise ResultsError(
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}, got {rank}: resize the adapter, or merge it into the base"
        )
    return found


def max_module_rank(rank: int) -> int:
    """The rank that a server reserves for an adapter of `rank`: modules up to it cost no memory. `rank` above all of them."""
    return next((served for served in VLLM_RANKS if served >= rank), rank)


def vllm(recipe: Recipe) -> Written:
    """`vllm serve` with the adapter; vLLM pads adapters below the maximum itself."""
    arguments = ["vllm", "serve", recipe.model, "--host", LOOPBACK, "--enable-lora"]
    arguments += ["--max-lora-rank", str(served_rank(recipe.highest_rank))]
    arguments += ["--lora-modules", f"{SERVED_NAME}={recipe.adapter.resolve()}"]
    notes = _serving_notes(recipe)
    if recipe.rank_pattern or recipe.alpha_pattern:
        notes.append("vLLM 0.33 reads patterns; for an older one, give --pad")
    return Written({"vllm.sh": _script(arguments)}, "sh vllm.sh", notes)


def sglang(recipe: Recipe) -> Written:
    """SGLang's server with the adapter."""
    arguments = ["python", "-m", "sglang.launch_server", "--model-path", recipe.model, "--enable-lora"]
    arguments += [
        "--max-lora-rank",
        str(recipe.highest_rank),
        "--lora-paths",
        f"{SERVED_NAME}={recipe.adapter.resolve()}",
    ]
    notes = _serving_notes(recipe) + _scale_notes(recipe, "SGLang uses lora_alpha / r for every module")
    return Written({"sglang.sh": _script(arguments)}, "sh sglang.sh", notes)


def llama_cpp(recipe: Recipe) -> Written:
    """Conversion with llama.cpp's scripts, from the checkout that `LLAMA_CPP` names, and its server."""
    python = 'python "${LLAMA_CPP:?give the folder of a llama.cpp checkout}"'
    model, adapter = shlex.quote(recipe.model), shlex.quote(str(recipe.adapter.resolve()))
    lines = [
        "#!/bin/sh",
        "set -e",
        f"{python}/convert_lora_to_gguf.py {adapter} --base {model} --outfile adapter.gguf --outtype f16",
        f"{python}/convert_hf_to_gguf.py {model} --outfile base.gguf --outtype f16",
        "exec llama-server -m base.gguf --lora adapter.gguf",
    ]
    notes = _serving_notes(recipe) + _scale_notes(recipe, "GGUF holds one alpha, and llama.cpp uses alpha / rank")
    if not recipe.has_local_model:
        notes.append("the converter reads the base from a folder: replace the model's name with its folder")
    return Written({"llama_cpp.sh": "\n".join(lines) + "\n"}, "LLAMA_CPP=… sh llama_cpp.sh", notes)


def ollama(recipe: Recipe) -> Written:
    """A Modelfile: the base, and the adapter as Ollama reads it from safetensors."""
    lines = [f"FROM {recipe.model}", f"ADAPTER {recipe.adapter.resolve()}"]
    notes = _serving_notes(recipe) + _scale_notes(recipe, "Ollama uses lora_alpha / r")
    notes.append(
        "Ollama reads safetensors adapters of Llama, Mistral and Gemma models; for others convert with --to llama.cpp and "
        "put adapter.gguf into the Modelfile"
    )
    if not recipe.has_local_model:
        notes.append("FROM needs a model folder, a GGUF file or Ollama's name of the same base")
    return Written({"Modelfile": "\n".join(lines) + "\n"}, f"ollama create {SERVED_NAME} -f Modelfile", notes)


def _script(arguments: list[str]) -> str:
    return f"#!/bin/sh\nexec {shlex.join(arguments)}\n"


def _scale_notes(recipe: Recipe, who: str) -> list[str]:
    """A warning if the server applies one scale and the adapter has several."""
    other = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if getattr(recipe, name)]
    return (
        [f"{who}; this adapter has {' and '.join(other)}: without --pad it computes another function"] if other else []
    )


def _serving_notes(recipe: Recipe) -> list[str]:
    notes = []
    if recipe.modules_to_save:
        notes.append(
            f"servers do not load modules_to_save ({', '.join(recipe.modules_to_save)}): merge the adapter instead"
        )
    if recipe.kind:
        notes.append(f"servers load plain LoRA; this adapter has {' and '.join(recipe.kind)}: merge it instead")
    if recipe.task_type != "CAUSAL_LM":
        notes.append(f"servers load adapters of causal language models; the task of this one is {recipe.task_type}")
    return notes
