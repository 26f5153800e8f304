"""Every command refuses an adapter on another base model of the same shapes, in one line and with exit status 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rightrank.bases.base_models import load_base
from rightrank.evaluation.attached_adapters import require_matching_base
from rightrank.schema.errors import ModelError
from tests.adapters.adapters import edit_config, make_adapter, make_base
from tests.commands import run
from tests.tiny import ON_CPU, make_tokenizer, write_completions

SMALL = ["--set", "seq_len=32", "--set", "max_eval_examples=8", "--set", "max_steps=2", "--set", "device=cpu"]


def copy_with_noise(base: Path, folder: Path, factor: float = 0.0, dtype: torch.dtype = torch.float32) -> Path:
    """Copy a base model, and add noise times `factor` to one projection of each layer, as a merged adapter would."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(file)
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name] += factor * torch.randn(tensors[name].shape, generator=generator)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("bases") / "base")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_base(base: Path) -> Path:
    return copy_with_noise(base, base.parent / "other", 0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_completions(tmp_path_factory.mktemp("data") / "rows.jsonl", 40)


def write_identity(adapter: Path, base: Path) -> Path:
    """Write `base.json` beside the adapter, and give its base model a name that does not exist."""
    (adapter / "base.json").write_bytes(load_base(str(base), ON_CPU, None).identity.to_json())
    edit_config(adapter, base_model_name_or_path="someone/gone")
    return adapter


@pytest.mark.trains
@pytest.mark.parametrize("identified_by", ["by base.json", "by name"])
@pytest.mark.parametrize(
    "command",
    [
        "compare {0} base --model {base} --data {data} --set device=cpu --set seq_len=32",
        "resize {0} {out} --data {data} --base {base} SMALL",
    ],
)
def test_another_base_of_the_same_shapes_is_refused_in_one_line(
    command: str,
    identified_by: str,
    base: Path,
    other_base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds = {"0": "plain", "1": "rslora"}
    adapters = {name: make_adapter(base, tmp_path / name, kind, rank=4) for name, kind in kinds.items()}
    for adapter in adapters.values():
        if identified_by == "by base.json":
            write_identity(adapter, base)
        elif identified_by == "by name":
            edit_config(adapter, base_model_name_or_path="someone/gone")
    paths = {"base": other_base, "data": data, "out": tmp_path / "out"}
    words = command.format(adapters["0"], adapters["1"], **paths).split()
    capsys.readouterr()
    status, out, err = run([argument for word in words for argument in (SMALL if word == "SMALL" else [word])], capsys)
    assert (status, out) == (2, "")
    assert "it was trained on" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_copy_is_the_same_base_whatever_its_name_and_precision(base: Path, other_base: Path, tmp_path: Path) -> None:
    adapter = write_identity(make_adapter(base, tmp_path / "adapter"), base)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        copy = copy_with_noise(base, tmp_path / str(dtype), dtype=dtype)
        require_matching_base(adapter, load_base(str(copy), ON_CPU.model_copy(update={"dtype": "bfloat16"}), None))
        require_matching_base(adapter, load_base(str(copy), ON_CPU, ["a", "b"]))
        with pytest.raises(ModelError, match=r"q_proj\.weight has other values"):
            require_matching_base(adapter, load_base(str(other_base), ON_CPU, None))
