"""A small stand-in for a service of the Tinker protocol and its SDK, in this process. It is no service: it serves tests.

It has the calls that `examples/tinker_service.py` makes, by the signatures of tinker 0.38 and before, over a real small model with
PEFT adapters. Saved adapters name no modules. `QUIRKS` holds what services and SDKs do differently: the alpha, the seeds, and how
an adapter is downloaded.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

QUIRKS: dict[str, Any] = {"alpha": lambda rank: 32, "seed": lambda seed: seed, "archives": False}
_LOCK = threading.RLock()  # one model at a time; the service that it stands for has a queue


class ModelInput:
    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        return cls(tokens)

    @property
    def length(self) -> int:
        return len(self.tokens)


class Datum:
    def __init__(self, model_input: ModelInput, loss_fn_inputs: dict[str, list[float]]) -> None:
        lengths = {model_input.length, *map(len, loss_fn_inputs.values())}
        assert len(lengths) == 1, lengths
        self.model_input = model_input
        self.loss_fn_inputs = {name: np.asarray(values) for name, values in loss_fn_inputs.items()}


@dataclass
class AdamParams:
    learning_rate: float = 1e-4


class ServiceClient:
    def __init__(self, base_url: str | None = None) -> None:
        self.base_url = base_url
        self.place = Path(tempfile.mkdtemp())

    def create_lora_training_client(self, base_model: str, rank: int = 32, seed: int | None = None) -> TrainingClient:
        return TrainingClient(base_model, rank, QUIRKS["seed"](seed), self.place)

    def create_rest_client(self) -> SimpleNamespace:
        def place(path: str) -> Path:
            return Path(path.removeprefix("tinker:/"))

        def archive(path: str) -> Future[SimpleNamespace]:
            return complete(SimpleNamespace(url=place(path).as_uri()))

        def files(path: str) -> Future[SimpleNamespace]:
            return complete(SimpleNamespace(urls={file.name: file.as_uri() for file in place(path).iterdir()}))

        if QUIRKS["archives"]:
            return SimpleNamespace(get_checkpoint_archive_url_from_tinker_path=archive)
        return SimpleNamespace(get_external_weights_urls=files)


class TrainingClient:
    """A base with one adapter and its optimizer."""

    def __init__(self, base_model: str, rank: int, seed: int, folder: Path) -> None:

        self.base_model, self.place = base_model, folder
        config = LoraConfig(r=rank, lora_alpha=QUIRKS["alpha"](rank), target_modules="all-linear")
        with _LOCK:
            torch.manual_seed(seed)
            self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model), config)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        )

    def get_tokenizer(self) -> Any:

        return AutoTokenizer.from_pretrained(self.base_model)

    def forward(self, data: list[Datum], loss_fn: str) -> Future[SimpleNamespace]:
        assert loss_fn == "cross_entropy"
        with torch.no_grad():
            return complete(
                SimpleNamespace(
                    loss_fn_outputs=[{"logprobs": self._compute_log_probabilities(datum).numpy()} for datum in data]
                )
            )

    def forward_backward(self, data: list[Datum], loss_fn: str) -> Future[SimpleNamespace]:
        """Average each sequence over its tokens first, as open servers do."""
        assert loss_fn == "cross_entropy"
        for datum in data:
            weights = torch.tensor(datum.loss_fn_inputs["weights"])
            (-(self._compute_log_probabilities(datum) * weights).sum() / weights.sum() / len(data)).backward()
        return complete(SimpleNamespace(loss_fn_outputs=[]))

    def optim_step(self, adam_params: AdamParams) -> Future[None]:
        for group in self.optimizer.param_groups:
            group["lr"] = adam_params.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return complete(None)

    def save_weights_external(self, name: str, ttl_seconds: int | None = None) -> Future[SimpleNamespace]:
        """Save the adapter as a folder of files."""
        return complete(SimpleNamespace(path=f"tinker:/{self._saved() / 'adapter'}"))

    def save_weights_for_sampler(self, name: str, ttl_seconds: int | None = None) -> Future[SimpleNamespace]:
        """Save the adapter as a tar file."""
        folder = self._saved()
        with tarfile.open(folder / "adapter.tar", "w") as tar:
            for path in (folder / "adapter").iterdir():
                tar.add(path, path.name)
        return complete(SimpleNamespace(path=f"tinker:/{folder / 'adapter.tar'}"))

    def _saved(self) -> Path:
        """Save a folder with `adapter/`, whose configuration does not name target modules."""
        folder = Path(tempfile.mkdtemp(dir=self.place))
        self.model.save_pretrained(folder / "adapter")
        file = folder / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": None}))
        return folder

    def _compute_log_probabilities(self, datum: Datum) -> torch.Tensor:
        logits = self.model(input_ids=torch.tensor([datum.model_input.tokens])).logits[0].float()
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"], dtype=torch.long)
        return torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]


def complete(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
