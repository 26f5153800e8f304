"""The settings of a plan: shared ones of a selection, and those of the planned training step."""

from __future__ import annotations

from typing import Literal, TypeAlias

from rightrank.schema.setting_table import option, setting
from rightrank.schema.settings import (
    COMPARE,
    DATA,
    DTYPE_ALIASES,
    MACHINE,
    TRAINING,
    DtypeName,
    Ranks,
    SelectSettings,
    StepSettings,
)

OptimizerName: TypeAlias = Literal["adamw", "adamw_fused", "adamw_8bit"]
TRANSFORMERS_NAMES = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw_fused", "adamw_bnb_8bit": "adamw_8bit"}

DEFAULT_PLAN_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class PlanSettings(StepSettings):
    """All settings of `plan` other than MODEL."""

    ranks: Ranks = option(
        DEFAULT_PLAN_RANKS,
        COMPARE,
        "ranks, such as 8,16; by default powers of two, 1 to 512",
        foreign_names=("rank", "r", "lora_r", "lora_rank"),
    )

    # the step
    optim: OptimizerName = setting(
        "adamw",
        TRAINING,
        "`adamw`, `adamw_fused` or `adamw_8bit`",
        foreign_names=("optimizer",),
        aliases=TRANSFORMERS_NAMES,
    )
    loss: Literal["full", "chunked"] = setting(
        "full",
        TRAINING,
        "`full`, as Trainer, or `chunked`, as `rightrank select`",
    )
    adapters_per_pass: int = setting(
        1, TRAINING, "adapters trained in one pass over the frozen base", foreign_names=("arms",), gt=0
    )
    padding: bool = setting(False, TRAINING, "rows of unequal length, so that attention is given a mask")
    attn_implementation: Literal["sdpa", "eager"] = setting("sdpa", TRAINING, "as in transformers")
    packed: bool = setting(
        False,
        TRAINING,
        "adapted layers run as `rightrank select` runs them; always so for more than one adapter in a pass",
    )
    num_labels: int | None = setting(None, TRAINING, "a classification head of so many labels", gt=1, le=2**20)
    eval_batch_size: int | None = setting(None, DATA, "examples in a forward pass of an evaluation", gt=0)

    # the device and the budget
    dtype: DtypeName = setting(
        "bfloat16",
        MACHINE,
        "the frozen weights' type: `bf16`, `fp16` or `fp32`",
        foreign_names=("bf16", "fp16", "torch_dtype"),
        aliases=DTYPE_ALIASES,
    )
    device: Literal["cuda", "cpu"] = setting("cuda", MACHINE, "kernels and allocator of `cuda` or `cpu`")

    def _require_consistent(self) -> None:
        super()._require_consistent()
        if self.adapters_per_pass > 1 and (self.use_dora or self.target_parameters or self.peft_options):
            raise ValueError(
                "several adapters in a pass are for plain LoRA on modules, other adapters train alone: leave out use_dora and target_parameters"
            )
        if self.num_labels is not None and self.loss == "chunked":
            raise ValueError("a classification (num_labels) has no logits to take in pieces: give loss 'full'")

    @property
    def is_packed(self) -> bool:
        return self.packed or self.adapters_per_pass > 1


# Settings of a step that mean the same in a selection.
STEP_OF_SELECT = tuple(
    name for name in PlanSettings.model_fields if name in SelectSettings.model_fields and name != "adapters_per_pass"
)
