"""Select a rank with a service of the Tinker protocol, which runs several trainings at a time while this process waits.

    pip install tinker
    python examples/tinker_service.py --model BASE --data data.jsonl --base-url URL     (rows of prompt and completion)

Before any paid training it tests properties that the protocol does not specify, and stops if trainings of the service cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import tinker
import torch
from common import read_rows
from safetensors.torch import load_file

from rightrank import TrialResult, TrialTask, select_rank_with

RANKS, LEARNING_RATES, SEEDS, BATCH = (1, 4, 16), (1e-4, 3e-4, 1e-3), (0, 1), 8


class Service:
    """The operations of the service that a training needs."""

    def __init__(self, client: Any, model: str, rows: list[dict[str, str]], held_out: int) -> None:
        self.client, self.model = client, model
        tokenizer = self.start_training(1, 0).get_tokenizer()
        datums = [build_datum(tokenizer, row["prompt"], row["completion"]) for row in rows]
        self.held_out, self.rows = datums[:held_out], datums[held_out:]

    def start_training(self, rank: int, seed: int) -> Any:
        return self.client.create_lora_training_client(self.model, rank=rank, seed=seed)

    def save(self, training: Any, folder: Path) -> None:
        """Download the adapter, and add the names of its target modules if the service left them out.

        PEFT silently loads an adapter with `target_modules: null`, but only works if its defaults name the right modules.
        """
        rest_client = self.client.create_rest_client()
        if hasattr(rest_client, "get_checkpoint_archive_url_from_tinker_path"):  # tinker before 0.38
            path = training.save_weights_for_sampler(name=folder.name).result().path
            with tempfile.TemporaryDirectory() as folder_name:
                url = rest_client.get_checkpoint_archive_url_from_tinker_path(path).result().url
                archive, _ = urllib.request.urlretrieve(url, Path(folder_name) / "adapter.tar")
                with tarfile.open(archive) as tar:
                    tar.extractall(folder, filter="data")
        else:
            path = training.save_weights_external(name=folder.name, ttl_seconds=86400).result().path
            for name, url in rest_client.get_external_weights_urls(path).result().urls.items():
                urllib.request.urlretrieve(url, folder / Path(name).name)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        names = {name.split(".lora_")[0].split(".")[-1] for name in load_file(folder / "adapter_model.safetensors")}
        config["target_modules"] = config.get("target_modules") or sorted(names)
        file.write_text(json.dumps(config, indent=2))

    def train(self, task: TrialTask) -> TrialResult:
        training, generator = self.start_training(task.rank, task.seed), random.Random(task.seed)
        order = [generator.randrange(len(self.rows)) for _ in range(task.steps * BATCH)]
        adam = tinker.AdamParams(learning_rate=task.learning_rate)
        task.report(0, *average(self.compute_losses(training)))
        for step in range(1, task.steps + 1):
            batch = [self.rows[index] for index in order[(step - 1) * BATCH : step * BATCH]]
            requests = training.forward_backward(batch, "cross_entropy"), training.optim_step(adam)
            for request in requests:
                request.result()
            if step % max(1, task.steps // 4) == 0 and step < task.steps:
                task.report(step, *average(self.compute_losses(training)))
        self.save(training, task.folder)
        mean, losses = average(self.compute_losses(training))
        return TrialResult(metrics={"loss": mean}, example_scores=losses)

    def compute_losses(self, training: Any) -> list[float]:
        """Return the mean loss of each held-out completion. It does not depend on how the service averages a batch."""
        outputs = training.forward(self.held_out, "cross_entropy").result().loss_fn_outputs
        weights = [example.loss_fn_inputs["weights"].tolist() for example in self.held_out]
        log_probabilities = [output["logprobs"].tolist() for output in outputs]
        return [
            -sum(weight * value for weight, value in zip(example_weights, values, strict=True)) / sum(example_weights)
            for example_weights, values in zip(weights, log_probabilities, strict=True)
        ]


def build_datum(tokenizer: Any, prompt: str, completion: str) -> Any:
    """Build one example, with the loss on its completion."""
    start = tokenizer(prompt)["input_ids"]
    tokens = start + tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    weights = [0.0] * (len(start) - 1) + [1.0] * (len(tokens) - len(start))
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def average(losses: list[float]) -> tuple[float, list[float]]:
    return sum(losses) / len(losses), losses


def probe_service(service: Service) -> float:
    """Return the service's alpha, read from untrained adapters.

    Raises:
        SystemExit: the service cannot be used; the message states why.
    """
    with tempfile.TemporaryDirectory() as temporary_folder:
        probes = [(RANKS[0], 0), (RANKS[-1], 0), (RANKS[-1], 0), (RANKS[-1], 1)]
        folders = [Path(temporary_folder) / f"probe-{number}" for number in range(len(probes))]
        for folder, (rank, seed) in zip(folders, probes, strict=True):
            folder.mkdir()
            service.save(service.start_training(rank, seed), folder)
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
        tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders[1:]]
    alphas = {config["r"]: config["lora_alpha"] for config in configs}
    if [config["r"] for config in configs[:2]] != [RANKS[0], RANKS[-1]]:
        sys.exit(f"refused: the service created ranks {sorted(alphas)} instead of {RANKS[0]} and {RANKS[-1]}")
    if len(set(alphas.values())) > 1:
        sys.exit(f"refused: alpha differs by rank ({alphas}), so the ranks would also differ in their scale alpha / r")
    first, repeated, other_seed = (
        {name: tensor for name, tensor in adapter.items() if "lora_A" in name} for adapter in tensors
    )
    if not all(torch.equal(first[name], repeated[name]) for name in first):
        sys.exit("refused: two adapters with the same seed have different matrices A, so the service ignores seeds")
    if all(torch.equal(first[name], other_seed[name]) for name in first):
        sys.exit("refused: two seeds give the same matrices A, so extra seeds would not measure the seed noise")
    return float(configs[0]["lora_alpha"])


def describe_cost(service: Service, steps: int) -> str:
    """Describe the maximum number of tokens of all trainings, from the mean length of an example."""
    count = len(RANKS) * len(LEARNING_RATES) * len(SEEDS)
    mean = sum(example.model_input.length for example in service.rows) / len(service.rows)
    evaluated = 5 * sum(example.model_input.length for example in service.held_out)
    trained = round(count * steps * BATCH * mean)
    return f"at most {count} trainings: {trained:,} tokens forward and backward, {count * evaluated:,} forward only"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="base model of the service")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file")
    parser.add_argument("--base-url", default=None, help="the service; None for the SDK's default")
    parser.add_argument("--out", default="run", help="run folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=100)
    arguments = parser.parse_args()
    client = tinker.ServiceClient(base_url=arguments.base_url)
    service = Service(client, arguments.model, read_rows(arguments.data), arguments.held_out)
    alpha = probe_service(service)
    print(f"alpha {alpha:g} at every rank; {describe_cost(service, arguments.steps)}")
    selected = select_rank_with(
        service.train,
        arguments.out,
        ranks=RANKS,
        learning_rates=LEARNING_RATES,
        seeds=SEEDS,
        lora_alpha=alpha,
        max_steps=arguments.steps,
        strategy="upward",
        workers=4,
    )
    print(selected.decision.sentence)


if __name__ == "__main__":
    main()
