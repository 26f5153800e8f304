"""Check that mlx-lm loads the adapters that `resize` writes. Run it with a Python that has mlx-lm (`mlx[cpu]` on Linux):

    python -m benchmarks.consumers.mlx PYTHON    # PYTHON has rightrank

A small random Llama gets LoRA by mlx-lm's own code, with random values, and is saved as `mlx_lm.lora` saves it. At its own rank, the resized
adapter must give the same logits; at half the rank, each update must be the best one of that rank. It prints the version and the largest errors.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import save_config

RANK, LAYERS = 8, 2
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
TOKENS = mx.arange(24)[None]


def make_model() -> Model:
    mx.random.seed(0)
    return Model(ModelArgs("llama", 48, LAYERS, 96, 4, 1e-5, 100, num_key_value_heads=2))


def save_adapter(folder: Path) -> None:
    model = make_model()
    parameters = {"rank": RANK, "scale": 3.0, "dropout": 0.0, "keys": KEYS}
    model.freeze()
    linear_to_lora_layers(model, LAYERS, parameters)
    model.update(tree_map(lambda values: values + 0.1 * mx.random.normal(values.shape), model.trainable_parameters()))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    settings = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": parameters, "model": "tiny"}
    save_config(settings, folder / "adapter_config.json")


def load_model(folder: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the logits and the updates of the model with an adapter."""
    model = load_adapters(make_model(), str(folder))
    layers = [module for _, module in model.named_modules() if isinstance(module, LoRALinear)]
    updates = [np.array(layer.scale * layer.lora_a @ layer.lora_b) for layer in layers]
    return np.array(model(TOKENS)), updates


def truncate(update: np.ndarray, rank: int) -> np.ndarray:
    u, values, vt = np.linalg.svd(update)
    return (u[:, :rank] * values[:rank]) @ vt[:rank]


def main(python: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_adapter(folder / "trained")
        for rank in (RANK, RANK // 2):
            command = [python, "-m", "rightrank", "resize", "trained", f"rank{rank}", "--rank", str(rank)]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        logits, updates = load_model(folder / "trained")
        same_logits, _ = load_model(folder / f"rank{RANK}")
        _, small = load_model(folder / f"rank{RANK // 2}")
    logit_error = float(abs(logits - same_logits).max())
    update_error = max(
        float(abs(truncate(old, RANK // 2) - new).max()) for old, new in zip(updates, small, strict=True)
    )
    assert logit_error < 1e-4, logit_error
    assert update_error < 1e-5, update_error
    print(
        f"mlx-lm {version('mlx-lm')}: logits differ by {logit_error:.1g}, the updates of {len(small)} modules by {update_error:.1g}"
    )


if __name__ == "__main__":
    main(sys.argv[1])
