"""The workbench: the loaded base, the encoded data, the objective and the frozen prefix that all arms share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from rightrank.engine.adapter import attached
from rightrank.engine.attention import FUSED, float32_attention, wants_float32
from rightrank.engine.batches import Batch, batch_plan, batch_plan_by_length, collate, length_sorted_batches
from rightrank.engine.distributed import all_reduce, process_index, require_shares, world_size
from rightrank.engine.encode import EncodedData
from rightrank.engine.inits import EVA_BATCHES, input_directions
from rightrank.engine.label_rows import label_rows_only
from rightrank.engine.loss import BatchLoss, Objective, Scale, head_loss, make_objective
from rightrank.engine.multi_lora import ArmBatch, MultiLora, concatenated
from rightrank.engine.multi_lora_layers import Routing
from rightrank.engine.prefix import FrozenPrefix, find_blocks, prefix_depth
from rightrank.engine.sequence_packing import packed, packed_attention
from rightrank.engine.targets import Targets, find_targets, lora_config, require_equal_ranks
from rightrank.engine.token_store import EncodedExample, lengths_of
from rightrank.errors import InterruptedRun
from rightrank.io.models import LoadedModel
from rightrank.maths.counts import rank_of_equal_parameters
from rightrank.records import Arm, Preparing, SplitName
from rightrank.settings import SelectSettings
from rightrank.variants import target_sets

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, of a loss computed otherwise


@dataclass(frozen=True, slots=True)
class Scores:
    """Example scores of a split, in the split's order."""

    losses: list[float]  # summed over the item's label tokens, nats
    tokens: list[int]
    correct: list[int] | None

    @property
    def loss(self) -> float:
        """Token-weighted mean loss, nats a label."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def metrics(self) -> dict[str, float]:
        values = {"loss": self.loss}
        if self.correct is not None:
            values["accuracy"] = sum(self.correct) / len(self.correct)
        return values


class Runtime:
    """Built once for a run; `losses` and `evaluate` work with or without an adapter attached to the base."""

    def __init__(
        self, loaded: LoadedModel, data: EncodedData, settings: SelectSettings, steps: int, cache_folder: Path
    ) -> None:
        self.loaded = loaded
        self.data = data
        self.settings = settings
        self.model = loaded.model
        sets = [
            find_targets(self.model, settings.model_copy(update={"target_modules": names}), data.is_classification)
            for names in target_sets(settings)
        ]
        self.targets: Targets = sets[0]
        self._target_sets = dict(zip(target_sets(settings), sets, strict=True))
        require_equal_ranks(settings, self.targets, self._target_sets)
        self._first_rows: dict[tuple[int, int, tuple[str, ...] | None], dict[str, torch.Tensor]] = {}
        self.steps = steps  # optimizer steps of an arm
        self._pad_id: int = loaded.tokenizer.pad_token_id
        probe = self.batch("selection", length_sorted_batches(data.splits["selection"], settings.batch_size)[0])
        self.objective: Objective = make_objective(self.model, probe, data.is_classification)
        self.uses_sequence_packing = self._may_pack_sequences()
        require_shares(settings.batch_size)
        self._last_block = self._find_last_block(probe)
        # Processes that share a base run every pass together, and each would fill its own part of the prefix.
        caching = settings.cache_prefix and not settings.shard_base
        self.prefix = self._make_prefix(cache_folder, probe) if caching else None

    def prepare(self, on_progress: Callable[[Preparing], None], should_stop: Callable[[], bool]) -> None:
        """Compute the frozen prefix of all training items that the arms will ask for, with progress.

        Raises:
            InterruptedRun: asked to stop.
        """
        if self.prefix is None:
            return
        begun = time.perf_counter()
        expected = self._expected_items("train")
        done = 0
        with self._wide_attention():
            for count in self.prefix.fill(self.model, "train", expected):
                done += count
                on_progress(Preparing(items=done, of_items=len(expected), seconds=time.perf_counter() - begun))
                if should_stop():
                    raise InterruptedRun("stopped before the first training")

    def items(self, split: SplitName) -> Sequence[EncodedExample]:
        return self.data.splits[split]

    def batch(self, split: SplitName, indices: Sequence[int]) -> Batch:
        return collate(self.items(split), indices, self._pad_id, self.loaded.device)

    def batch_plan(self, seed: int, steps: int | None = None) -> list[list[int]]:
        """The training batches of every arm of a seed: one list of item indices for each optimizer step.

        A plan of more steps begins with the plan of fewer.
        """
        steps = self.steps if steps is None else steps
        items, size = self.items("train"), self.settings.items_per_step
        if self.settings.train_sampling_strategy == "group_by_length":
            return batch_plan_by_length(lengths_of(items), size, steps, seed)
        return batch_plan(len(items), size, steps, seed)

    def losses(self, split: SplitName, batch: Batch, scale: Scale) -> BatchLoss:
        """The loss of `batch` under whatever adapter the base now carries."""
        return self._losses(split, batch, scale, None)

    def backpropagate(self, split: SplitName, batch: Batch, scale: Scale) -> BatchLoss:
        """As `losses`, with the backward pass."""
        return self._losses(split, batch, scale, None, backward=True)

    def accumulate_gradients(self, multi_lora: MultiLora, arm_batches: Sequence[ArmBatch]) -> list[torch.Tensor]:
        """One pass over every arm's training batch, forward and backward; the item losses [b] of each.

        Gradients are added to the arms' tensors.
        """
        batch = concatenated([arm_batch.batch for arm_batch in arm_batches], self._pad_id)
        scale = torch.tensor(
            [arm_batch.scale for arm_batch in arm_batches for _ in arm_batch.batch.indices], device=self.loaded.device
        )
        with multi_lora.routed(arm_batches, self.uses_sequence_packing) as routing:
            result = self._losses("train", batch, scale, routing, backward=True)
        return list(torch.split(result.item_losses, [len(arm_batch.batch.indices) for arm_batch in arm_batches]))

    @torch.no_grad()
    def evaluate(self, split: SplitName) -> Scores:
        """Every item of a split, in large batches of fixed composition, adapter dropout off."""
        with self.without_dropout():
            return self._evaluate(split, 1, lambda batch: self.losses(split, batch, 1.0))[0]

    @torch.no_grad()
    def evaluate_adapters(self, split: SplitName, multi_lora: MultiLora, adapters: Sequence[str]) -> list[Scores]:
        """As `evaluate`, of several arms of a pass in one pass over the split."""

        def losses(batch: Batch) -> BatchLoss:
            arm_batches = [ArmBatch(adapter, batch, 1.0, None) for adapter in adapters]
            with multi_lora.routed(arm_batches, self.uses_sequence_packing) as routing:
                return self._losses(split, concatenated([batch] * len(arm_batches), self._pad_id), 1.0, routing)

        return self._evaluate(split, len(adapters), losses)

    def _evaluate(self, split: SplitName, copies: int, losses: Callable[[Batch], BatchLoss]) -> list[Scores]:
        items = self.items(split)
        count = len(items)
        classification = self.data.is_classification
        scores = [Scores([0.0] * count, [0] * count, [0] * count if classification else None) for _ in range(copies)]
        batches = length_sorted_batches(items, self.settings.eval_batch_size)
        mine = batches[process_index() :: world_size()]
        for indices in mine:
            result = losses(self.batch(split, indices))
            for row, (score, index) in enumerate((score, index) for score in scores for index in indices):
                score.losses[index] = float(result.item_losses[row])
                score.tokens[index] = int(result.item_tokens[row])
                if score.correct is not None and result.item_correct is not None:
                    score.correct[index] = int(result.item_correct[row])
        if self.settings.shard_base and len(mine) < -(-len(batches) // world_size()):
            losses(self.batch(split, batches[0]))  # others run one batch more, for which the base is gathered
        return scores if world_size() == 1 else [_summed(score) for score in scores]

    def _losses(
        self, split: SplitName, batch: Batch, scale: Scale, routing: Routing | None, backward: bool = False
    ) -> BatchLoss:
        rows = self._rows(batch)
        # The backward pass belongs inside: what is recomputed there must see the same prefix, attention and rows.
        with self._wide_attention(), self._prefix_for(split, rows), _attention(rows), self._label_rows(rows, routing):
            result = self.objective(self.model, rows, scale)
            if backward:
                torch.autograd.backward(result.total)
        return result

    @contextmanager
    def arm(self, arm: Arm) -> Iterator[Any]:
        """The PeftModel of a freshly initialised arm; the base alone for rank 0."""
        if arm.rank == 0:
            yield self.model
            return
        rows = self.first_rows(arm)
        with attached(self.model, self.settings, arm, self.arm_config(arm), rows) as peft_model, self.recomputing():
            yield peft_model

    def arm_config(self, arm: Arm) -> LoraConfig:
        """PEFT's configuration of the arm."""
        held = arm.model_copy(update={"rank": self.rank_of(arm)})
        return lora_config(self.settings, held, self.data.is_classification, self._targets_of(arm).names)

    def rank_of(self, arm: Arm) -> int:
        """The rank that the arm's modules are adapted at: another one where the count of parameters is to be the same."""
        if not arm.equal_parameters:
            return arm.rank
        return rank_of_equal_parameters(arm.rank, self.targets.shapes, self._targets_of(arm).shapes)

    def first_rows(self, arm: Arm) -> dict[str, torch.Tensor] | None:
        """The first A of each module where the arm's initialisation takes it from the data; None where it is drawn."""
        if arm.init_lora_weights != "eva":
            return None
        key = arm.seed, arm.rank, arm.target_modules
        if key not in self._first_rows:
            names = [target.name for target in self._targets_of(arm).modules]
            plans = self.batch_plan(arm.seed, EVA_BATCHES)
            batches = [self.batch("train", indices) for indices in plans]
            inputs = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in batches]
            with self._wide_attention():
                self._first_rows[key] = input_directions(self.model, names, arm.rank, inputs)
        return self._first_rows[key]

    def _targets_of(self, arm: Arm) -> Targets:
        return self.targets if arm.target_modules is None else self._target_sets[arm.target_modules]

    def recomputing(self) -> AbstractContextManager[None]:
        """Gradient checkpointing, where it was asked for."""
        return gradient_checkpointing_on(self.model) if self.settings.gradient_checkpointing else nullcontext()

    def _wide_attention(self) -> AbstractContextManager[None]:
        dtype = next(self.model.parameters()).dtype
        return float32_attention() if wants_float32(self.loaded.device, dtype) else nullcontext()

    @property
    def _tolerance(self) -> float:
        return TOLERANCE[next(self.model.parameters()).dtype]

    def _rows(self, batch: Batch) -> Batch:
        """The batch as the model is given it."""
        return packed(batch) if self.uses_sequence_packing else batch

    def _label_rows(self, batch: Batch, routing: Routing | None) -> AbstractContextManager[None]:
        return nullcontext() if self._last_block is None else label_rows_only(self._last_block, batch, routing)

    @torch.no_grad()
    def _may_pack_sequences(self) -> bool:
        """Whether items joined into one row have the losses that they have padded: the longest, and short ones."""
        attention = getattr(self.model.config, "_attn_implementation", None)
        if self.objective is not head_loss or attention != FUSED:
            return False
        split = max(self.data.splits, key=lambda name: int(lengths_of(self.items(name)).max()))
        by_length = np.argsort(lengths_of(self.items(split)), kind="stable").tolist()
        probe = self.batch(split, [by_length[0], by_length[-1], by_length[len(by_length) // 2]])
        plain = head_loss(self.model, probe, 1.0).item_losses
        row = packed(probe)
        with _attention(row):
            ours = head_loss(self.model, row, 1.0).item_losses
        return torch.allclose(ours, plain, rtol=self._tolerance, atol=0)

    @torch.no_grad()
    def _find_last_block(self, probe: Batch) -> Any:
        """The model's last block, if computing it at label positions alone changes no loss; else None."""
        found = find_blocks(self.model)
        if found is None or self.objective is not head_loss:
            return None
        last = found[1][-1]
        rows = self._rows(probe)
        with _attention(rows):
            plain = head_loss(self.model, rows, 1.0).item_losses
            with label_rows_only(last, rows, None):
                ours = head_loss(self.model, rows, 1.0).item_losses
        return last if torch.allclose(ours, plain, rtol=self._tolerance, atol=0) else None

    def _prefix_for(self, split: SplitName, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext() if self.prefix is None else self.prefix.serving(self.model, split, batch)

    def _make_prefix(self, folder: Path, probe: Batch) -> FrozenPrefix | None:
        """The prefix, if there is one and it changes no loss."""
        found = find_blocks(self.model)
        if found is None or self.settings.bias == "all":
            return None
        name, blocks = found
        adapted = {target.name for targets in self._target_sets.values() for target in targets.modules}
        trainable = [*adapted, *self.settings.modules_to_save]
        depth = prefix_depth(name, trainable, len(blocks))
        if depth == 0:
            return None
        prefix = FrozenPrefix(blocks, depth, self._pad_id, self.loaded.device, folder, self.settings.eval_batch_size)
        for split, items in self.data.splits.items():
            prefix.add_split(split, items, self._expected_items(split))
        with torch.no_grad():
            plain = self.objective(self.model, probe, 1.0).item_losses.sum()
            rows = self._rows(probe)
            with prefix.serving(self.model, "selection", rows), _attention(rows):
                cached = self.objective(self.model, rows, 1.0).item_losses.sum()
        return prefix if torch.isclose(cached, plain, rtol=self._tolerance, atol=0) else None

    def _expected_items(self, split: SplitName) -> set[int]:
        """The items of a split that the arms will ask for."""
        if split != "train":
            return set(range(len(self.items(split))))
        plans = (self.batch_plan(seed) for seed in self.settings.seeds)
        return {index for plan in plans for indices in plan for index in indices}

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Within the block, adapters drop nothing out."""
        training = [
            module for module in self.model.modules() if isinstance(module, torch.nn.Dropout) and module.training
        ]
        for module in training:
            module.train(False)
        try:
            yield
        finally:
            for module in training:
                module.train(True)


def _attention(batch: Batch) -> AbstractContextManager[None]:
    return nullcontext() if batch.lengths is None else packed_attention(batch.lengths, batch.input_ids.device)


def _summed(score: Scores) -> Scores:
    """The scores of all processes, each of which has zeros where another has an item."""
    rows = [score.losses, score.tokens, score.correct or []]
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    all_reduce(tensors)
    losses, tokens, correct = (tensor.tolist() for tensor in tensors)
    return Scores(losses, [round(n) for n in tokens], None if score.correct is None else [round(n) for n in correct])


@contextmanager
def gradient_checkpointing_on(model: Any) -> Iterator[None]:
    """Keep no activations inside the model's blocks: recompute them in the backward pass.

    transformers does so for blocks in training mode; only the blocks are put in it, so that dropout stays off.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable()
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        disable()
