"""Test other trainers: Lightning and accelerate run here; axolotl, ms-swift and LLaMA-Factory are replaced by their stored interfaces.

If one of these programs is installed, its interface is compared with the stored one.
"""

from __future__ import annotations

import json
import runpy
import sys
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Trainer

from rightrank.schema.errors import DataError, ModelError
from rightrank.trainers.smallest import keep_smallest
from tests.tiny import make_tokenizer
from tests.trainers.trainings import RowList, Rows, make_peft_model, make_trainer, read_answer

INTERFACES = json.loads((Path(__file__).parent / "interfaces.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("program", INTERFACES)
def test_the_stored_interface_is_the_programs(program: str) -> None:
    """Check which methods are called with which arguments. Default values may differ."""
    module_name, _, name = INTERFACES[program]["where"].partition(":")
    if find_spec(module_name.partition(".")[0]) is None:
        pytest.skip(f"{program} is not installed")
    member = import_module(module_name)
    for method, stored in INTERFACES[program]["signatures"].items():
        parameters = signature(getattr(getattr(member, name) if name else member, method)).parameters
        assert f"({', '.join(parameters)})" == stored


class StoredProgram(ModuleType):
    """A package whose modules contain the stored interface of a program."""

    __path__: ClassVar[list[str]] = []


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the plug-in with a base class that has the stored methods, all empty."""
    base = type("BasePlugin", (), {"post_train": lambda self, cfg, model: None})
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, StoredProgram(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = base  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "rightrank.trainers.axolotl", raising=False)
    yield import_module("rightrank.trainers.axolotl")
    monkeypatch.delitem(sys.modules, "rightrank.trainers.axolotl")


@pytest.mark.trains
def test_axolotls_plugin_adds_the_callback(axolotl: Any, model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    plugin = axolotl.SmallestAdapterPlugin()
    stored = INTERFACES["axolotl"]["signatures"]
    assert all(f"({', '.join(signature(getattr(type(plugin), name)).parameters)})" == stored[name] for name in stored)
    fields = axolotl.SmallestAdapterArguments(rightrank_margin=0.1)
    assert plugin.get_input_args() == f"{type(fields).__module__}.{type(fields).__qualname__}"
    trainer = make_trainer(model_folder, rows, tmp_path)
    for callback in plugin.add_callbacks_post_trainer(SimpleNamespace(**fields.model_dump()), trainer):
        trainer.add_callback(callback)
    trainer.train()
    assert read_answer(tmp_path)["margin"] == 0.1


@pytest.mark.trains
@pytest.mark.parametrize("program", ["swift.callbacks", "llamafactory.train.sft.workflow"])
def test_the_code_of_the_page_adds_the_callback(
    program: str, model_folder: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the page's lines for ms-swift, which looks up a name, and for LLaMA-Factory, which creates the trainer itself."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "other-trainers.md").read_text(encoding="utf-8")
    blocks = [section.partition("```")[0] for section in page.split("```python\n")[1:]]
    packages = program.split(".")
    for name in [".".join(packages[: end + 1]) for end in range(len(packages))] + ["llamafactory.train.tuner"]:
        monkeypatch.setitem(sys.modules, name, StoredProgram(name))
    stored: Any = sys.modules[program]
    monkeypatch.setattr(sys.modules[program.rpartition(".")[0]], packages[-1], stored, raising=False)
    stored.callbacks_map, stored.CustomSeq2SeqTrainer = {}, Trainer

    def train(_: Any = None) -> None:
        monkeypatch.setattr("tests.trainers.trainings.Trainer", stored.CustomSeq2SeqTrainer)
        trainer = make_trainer(model_folder, rows, tmp_path)
        for make_callback in stored.callbacks_map.values():
            trainer.add_callback(make_callback(trainer.args, trainer))
        trainer.train()

    sys.modules["llamafactory.train.tuner"].run_exp = train  # type: ignore[attr-defined]
    file = tmp_path / "plugin.py"
    file.write_text(next(block for block in blocks if packages[0] in block and "callback" in block), encoding="utf-8")
    runpy.run_path(str(file))
    if stored.callbacks_map:
        train()
    assert read_answer(tmp_path)["margin_share"] == 0.01


def make_loader(rows: Rows, shuffle: bool = False) -> DataLoader[Any]:
    order = torch.Generator().manual_seed(0)
    return DataLoader(RowList(rows), 8, shuffle, collate_fn=DataCollatorForSeq2Seq(make_tokenizer()), generator=order)


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore")  # Lightning's remarks on workers and loggers
def test_lightning_and_a_loop_of_accelerate_give_one_answer(model_folder: Path, rows: Rows, tmp_path: Path) -> None:
    from tests.trainers.with_lightning import SmallestAdapter, fit_model

    callback = SmallestAdapter(make_loader(rows[140:]), margin=0.1)
    fit_model(
        make_peft_model(model_folder, lora_dropout=0.0),
        callback,
        make_loader(rows[:140], shuffle=True),
        tmp_path / "out",
    )
    assert callback.result is not None
    assert read_answer(tmp_path / "out")["rank"] == callback.result.answer.rank < 16

    model: Any = make_peft_model(model_folder, lora_dropout=0.0)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, make_loader(rows[:140], shuffle=True))
    for _, batch in zip(range(40), (batch for _ in range(3) for batch in batches), strict=False):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    initial_values = {name: value.detach().clone() for name, value in model.named_parameters()}
    states = torch.get_rng_state()
    result = keep_smallest(
        accelerator.unwrap_model(model),
        make_loader(rows[140:]),
        batches,
        out=tmp_path / "loop" / "rightrank",
        margin=0.1,
    )
    assert read_answer(tmp_path / "loop").items() >= json.loads(result.answer.model_dump_json()).items()
    assert all(torch.equal(value, initial_values[name]) for name, value in model.named_parameters())
    assert torch.equal(states, torch.get_rng_state())
    assert len(result.trained_scores.losses) == len(callback.result.trained_scores.losses) == 60


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "count", "error", "message"),
    [
        (lambda _: torch.nn.Linear(2, 2), 60, ModelError, "contains no PEFT model"),
        (make_peft_model, 0, DataError, "no held-out batches"),
    ],
)
def test_lightning_refuses_before_the_first_step(
    make: Any, count: int, error: Any, message: str, model_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    from tests.trainers.with_lightning import SmallestAdapter, fit_model

    callback = SmallestAdapter(make_loader(rows[140 : 140 + count]))
    with pytest.raises(error, match=message):
        fit_model(make(model_folder), callback, make_loader(rows[:140]), tmp_path)
