"""A real grid of DPO in the form that `benchmarks.selection.replay` reads: SmolLM2 on pairs of glosses.

    python -m benchmarks.preference.grid MODEL gloss_pairs.jsonl --work FOLDER --out benchmarks/preference/grids.json

Every rank × learning rate × seed is trained, with the value at half of the steps and the truncations of the top rank.
FOLDER keeps finished trainings, and the same command resumes. Incomplete seeds are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.selection.real_training import COMMON, Workshop, changed, curve_of, open_workshop, store, train_grid
from rightrank.schema.settings import SelectSettings

SETTINGS = COMMON | {
    "layers_to_transform": (28, 29),
    "learning_rates": (1e-3, 3e-3, 1e-2),
    "max_steps": 64,
    "seq_len": 48,
    "validation_fraction": 0.2,
    "test_fraction": 0.02,
    "eval_items": 150,
}


def settings_of(options: argparse.Namespace) -> SelectSettings:
    given = {"learning_rates": options.learning_rates, "seeds": options.seeds, "ranks": options.ranks}
    return SelectSettings(**SETTINGS | {name: values for name, values in given.items() if values})


def workshop(options: argparse.Namespace) -> Workshop:
    return open_workshop(options.model, options.data, settings_of(options), options.work, checkpoints=(0.5,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning-rates", type=float, nargs="*")
    parser.add_argument("--ranks", type=int, nargs="*")
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--store-only", action="store_true", help="train nothing: store what is whole")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shop = workshop(options)
    if not options.store_only:
        train_grid(shop)
    extra = {
        "model": Path(options.model).name,
        "settings": changed(shop.settings),
    }
    store([curve_of("gloss_pairs", shop, 1.0, extra)], options.out)


if __name__ == "__main__":
    main()
