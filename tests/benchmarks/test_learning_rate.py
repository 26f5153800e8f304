"""The grids of `benchmarks/learning_rate`: training in shared passes, policies, the judge and its locks, on tiny synthetic grids."""

from __future__ import annotations

import json
import lzma
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.learning_rate import averages, judge, lock, stored, table, train_grids
from benchmarks.learning_rate.bases import DECODER_NAMES, Base
from benchmarks.learning_rate.policies import (
    Key,
    Measured,
    SeedTable,
    choose_learning_rate,
    compute_bound,
    resample_grids,
    search_adapter,
    search_best_adapter,
    truncate_within,
    tune,
)
from transformers import LlamaConfig, LlamaModel

from rightrank.decision.sentences import MEASURED_PROBABILITIES
from rightrank.report.answer import LONGER_ADVICE

RATES = (3e-4, 1e-3, 3e-3)
EXAMPLES = 200


def make_measured(loss: float, noise: float = 0.01, seed: int = 0) -> Measured:
    """Return an adapter whose losses on both splits are near `loss`; small changes are shared by adapters of equal `seed`."""
    if not math.isfinite(loss):
        return Measured(np.full(EXAMPLES, math.inf), math.inf, None, math.inf)
    values = loss + noise * np.random.default_rng(seed).standard_normal(EXAMPLES)
    return Measured(values, float(values.mean()), values, loss)


def make_table(losses: dict[Key, float], grid: str = "synthetic", seed: int = 0, noise: float = 0.01) -> SeedTable:
    adapters = {key: make_measured(loss, noise, number) for number, (key, loss) in enumerate(losses.items())}
    ones, groups = np.ones(EXAMPLES), np.arange(EXAMPLES)
    return SeedTable(grid, seed, adapters, ones, groups, ones, groups)


def make_search(quarter: dict[float, float], rank: int = 64) -> dict[Key, float]:
    """Return losses at a quarter, and the same at the end."""
    at_quarter = {Key("trained", rank, rate, 0.25): loss for rate, loss in quarter.items()}
    return at_quarter | {Key("trained", rank, rate): loss for rate, loss in quarter.items()}


@pytest.mark.parametrize(
    ("losses", "noise", "rate"),
    [
        ((1.2, 1.1, 1.0), 0.01, 3e-3),
        ((1.2, 1.001, 1.0), 0.5, 1e-3),  # within one standard error, the lower rate
        ((1.2, 1.1, math.inf), 0.01, 1e-3),
        ((math.inf, math.inf, math.inf), 0.01, None),
    ],
)
def test_the_rate_with_the_lowest_loss_at_a_quarter_is_chosen(
    losses: tuple[float, ...], noise: float, rate: float | None
) -> None:
    table_of_rates = make_table(make_search(dict(zip(RATES, losses, strict=True))), noise=noise)
    assert choose_learning_rate(table_of_rates, 64) == rate
    assert (search_adapter(table_of_rates, 0.02) is None) == (rate is None)


def make_cuts(losses: dict[int, float]) -> SeedTable:
    cuts = {Key("truncated", rank, 1e-3): loss for rank, loss in losses.items()}
    return make_table({Key("trained", 64, 1e-3): 1.0, **cuts}, noise=0.001)


def test_truncation_stops_at_the_first_rank_beyond_the_margin() -> None:
    cuts = make_cuts({32: 1.001, 16: 1.002, 8: 1.1, 4: 1.002, 2: 1.002, 1: 2.0})
    assert truncate_within(cuts, Key("trained", 64, 1e-3), 0.01) == Key("truncated", 16, 1e-3)
    assert truncate_within(cuts, Key("trained", 64, 1e-3), 0.0005) == Key("trained", 64, 1e-3)


def test_the_bound_counts_groups_and_not_their_rows() -> None:
    group_means = np.random.default_rng(0).standard_normal(20)
    rows, groups = np.repeat(group_means, 10), np.repeat(np.arange(20), 10)
    _, alone, _ = compute_bound(group_means, np.ones(20), np.arange(20))
    mean, grouped, high = compute_bound(rows, np.ones(200), groups)
    assert grouped == pytest.approx(alone)
    assert high > mean + 1.6449 * grouped  # Student's t is wider than the normal distribution


def test_the_costs_and_ranks_are_those_of_the_protocol() -> None:
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    four = make_table(make_search(dict.fromkeys(rates, 1.0)) | make_search(dict.fromkeys(rates, 0.9), 16))
    choices = [policy(four, 0.02) for policy in (search_adapter, search_best_adapter, tune(16))]
    assert [choice.trainings for choice in choices if choice is not None] == [1.75, 3.5, 4.0]
    best = choices[1]
    assert (best.key.rank, best.whole) == (16, None)  # rank 16 is better


def test_intervals_resample_grids() -> None:
    wide = resample_grids({"a": [0.0] * 9, "b": [1.0]})
    assert (wide["mean"], wide["low"], wide["high"]) == (0.5, 0.0, 1.0)


# The file format and the judge.


def write_grid(folder: Path, name: str, seed: int, advantage: float) -> None:
    """Write a file as `train_grids` does, in which rank 64 is better than rank 16 by `advantage` and truncations to 8 lose little."""
    draw = np.random.default_rng([seed, len(name)])
    difficulty = 2 + 0.3 * draw.standard_normal(EXAMPLES)
    records: list[dict[str, Any]] = []
    rows = []

    def add(loss: float, **record: Any) -> None:
        records.append(record)
        rows.append(np.round(1000 * (difficulty + loss + 0.002 * draw.standard_normal(EXAMPLES))).astype(np.uint16))

    for trained in (50, 100, 200, 400):
        for rank in train_grids.RANKS:
            for number, rate in enumerate(train_grids.RATES):
                kind = "trained" if trained == 400 else "checkpoint"
                loss = abs(number - 1) * 0.1 + advantage * (64 - rank) / 48
                add(loss, kind=kind, rank=rank, rate=rate, steps=400, trained=trained, test=trained == 400)
    for rank in train_grids.TRUNCATED_RANKS:
        for number, rate in enumerate(train_grids.RATES):
            loss = abs(number - 1) * 0.1 + (0.001 if rank >= 8 else 0.2)
            add(loss, kind="truncated", rank=rank, rate=rate, steps=400, test=True)
    if seed:
        add(-0.02, kind="average", rank=128, rate=1e-3, steps=400, test=True, **{"with": 0})
        add(-0.019, kind="average truncated", rank=16, rate=1e-3, steps=400, test=True, **{"with": 0})
    add(-0.05, kind="long", rank=64, rate=1e-3, steps=800, trained=800, test=True)
    values = np.array(rows)
    arrays = {
        f"{name}_{split}": np.ones(EXAMPLES, np.uint8) for name in ("weights",) for split in ("validation", "test")
    }
    arrays |= {f"groups_{split}": np.arange(EXAMPLES, dtype=np.uint16) for split in ("validation", "test")}
    test = values[[record["test"] for record in records]]
    np.savez_compressed(
        folder / f"{name}_{seed}.npz", records=np.array(json.dumps(records)), validation=values, test=test, **arrays
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in judge.BASES:
        for seed in range(3):
            write_grid(tmp_path, name, seed, advantage=0.03)
    return tmp_path


def test_the_judge_measures_a_known_advantage(folder: Path) -> None:
    tables = [judge.read_seed(path) for path in sorted(folder.glob("*.npz"))]
    result = judge.judge(tables)
    adapter = result["a: adapter minus 16 tuned"]
    assert adapter["mean"] == pytest.approx(-0.03 + 0.001, abs=0.002)
    assert (adapter["median rank"], adapter["failed"]) == (8, 0)
    assert judge.convert_losses(np.array([1000, judge.DIVERGED], dtype=np.uint16), np.ones(2))[1] == math.inf
    assert {name: result["holds"][name] for name in "abc"} == {"a": True, "b": True, "c": True}


def test_the_judge_says_that_a_worse_policy_fails(tmp_path: Path) -> None:
    for name in ("answers", "roles"):
        write_grid(tmp_path, name, 0, advantage=-0.03)
        write_grid(tmp_path, name, 1, advantage=-0.03)
    tables = [judge.read_seed(path) for path in sorted(tmp_path.glob("*.npz"))]
    result = judge.judge(tables)
    assert not result["holds"]["a"]
    assert result["a: adapter minus 16 tuned"]["by grid"]["roles"] == pytest.approx(0.031, abs=0.002)


def test_truncations_that_lose_more_on_the_test_split_are_counted(folder: Path) -> None:
    tables = [judge.read_seed(path) for path in sorted(folder.glob("answers*.npz"))]
    worse = [
        replace(
            member,
            adapters={
                key: replace(value, test_mean=value.test_mean + 0.1) if key.kind == "truncated" else value
                for key, value in member.adapters.items()
            },
        )
        for member in tables
    ]
    assert judge.measure_exceeding(tables)["share"] == 0
    assert judge.measure_exceeding(worse)["share"] == 1


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the lock, the grids and the judgement at a temporary folder."""
    monkeypatch.setattr(lock, "LOCK", tmp_path / "lock.json")
    for module in (lock, judge):
        monkeypatch.setattr(module, "GRIDS", tmp_path / "grids")
    monkeypatch.setattr(judge, "JUDGED", tmp_path / "judged.json")
    out = tmp_path / "out"
    out.mkdir()
    return out


def test_the_judge_refuses_until_grids_are_locked_and_enough(locks: Path) -> None:
    names = list(judge.BASES)
    for name in names[:7]:
        for seed in range(3):
            write_grid(locks, name, seed, 0.0)
    lock.lock_grids(locks, "commit")
    files = sorted(judge.GRIDS.glob("*.npz"))
    assert "7 grids with 3 seeds" in str(judge.find_refusal(files))
    for seed in range(3):
        write_grid(locks, names[7], seed, 0.0)
    lock.lock_grids(locks, "commit")
    files = sorted(judge.GRIDS.glob("*.npz"))
    assert judge.find_refusal(files) is None
    judge.JUDGED.write_text("{}")
    assert "have judged" in str(judge.find_refusal(files))


def test_the_judge_refuses_a_file_that_differs_from_its_lock(locks: Path) -> None:
    write_grid(locks, "answers", 0, 0.0)
    lock.lock_grids(locks, "commit")
    path = judge.GRIDS / "answers_0.npz"
    write_grid(locks, "answers", 0, 0.5)
    lock.lock_grids(locks, "later")
    assert lock.hash_file(path) == lock.read_lock()["grids"]["answers_0.npz"]["sha256"]  # a locked file is not replaced
    assert lock.read_lock()["grids"]["answers_0.npz"]["trained_from"] == "commit"
    with pytest.raises(SystemExit, match="the protocol is locked"):
        lock.lock_protocol(locks)
    path.write_bytes(path.read_bytes() + b"0")
    assert "answers_0.npz" in str(judge.find_refusal([path]))
    path.unlink()
    assert "missing: ['answers_0.npz']" in str(judge.find_refusal([]))


def test_what_is_committed_agrees_with_its_locks() -> None:
    locks = lock.read_lock()
    assert set(locks["code"]) == set(lock.CODE)
    for name, entry in locks["grids"].items():
        assert lock.hash_file(lock.GRIDS / name) == entry["sha256"], name


# The table of policies, and that of averages.


def test_the_stored_averages_are_those_of_the_grids() -> None:
    stored = {row["grid"]: row for row in json.loads(averages.RESULTS.read_text(encoding="utf-8"))["rows"]}
    assert averages.compare_grid("words") == stored["words"]
    means = json.loads(averages.RESULTS.read_text(encoding="utf-8"))["mean"]
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "science.md").read_text(encoding="utf-8")
    for name in ("average, 64", "average, 4", "twice the steps, 64", "twice the steps, 4"):
        assert f"{-means[name]['mean']:.3f}" in page
    assert len(stored) == 8
    assert {row["pairs"] for row in stored.values()} == {3}


def test_the_sentences_have_the_numbers_of_the_judgement() -> None:
    bins = json.loads(judge.JUDGED.read_text())["d: stated probabilities"]["bins"]
    for measured in bins:
        assert f"{measured['stated']:.2f}" in MEASURED_PROBABILITIES
        assert f"{measured['true']:.0%}" in MEASURED_PROBABILITIES
    rows = {row["policy"]: row for row in json.loads((lock.HERE / "table_new.json").read_text())["rows"]}
    regrets = {policy: row["regret of the adapter"]["mean"] for policy, row in rows.items()}
    gains = {policy: regrets["adapter"] - regret for policy, regret in regrets.items()}
    assert f"{gains['twice the steps, truncated']:.3f} nats" in LONGER_ADVICE
    assert max(gains["adapter, a second seed"], gains["best-adapter"]) <= 0.002 + 5e-4


def test_the_loss_at_each_margin_is_that_learning_rate_loss_and_that_of_the_truncation(folder: Path) -> None:
    tables = [judge.read_seed(path) for path in sorted(folder.glob("answers*.npz"))]
    rows = table.summarise_margins(tables)
    full = [table.conclude(seed, table.PRIMARY["adapter"](seed, 0.0)) for seed in tables]
    tuned = [table.conclude(seed, table.PRIMARY["16, rate tuned by whole trainings"](seed, 0.0)) for seed in tables]
    pairs = [(a.test, b.test) for a, b in zip(full, tuned, strict=True) if a is not None and b is not None]
    learning_rate_loss = float(np.mean([a - b for a, b in pairs]))
    assert [row["median rank"] for row in rows] == sorted((row["median rank"] for row in rows), reverse=True)
    assert rows[0]["median rank"] == 8  # the only truncation of these grids is to rank 8
    for row in rows:
        lost = row["lost by the truncation"]["mean"]
        assert row["minus rank 16 tuned"]["mean"] == pytest.approx(learning_rate_loss + lost, abs=2e-5)


def test_the_table_has_a_row_for_each_policy_that_the_grids_support(folder: Path) -> None:
    tables = [judge.read_seed(path) for path in sorted(folder.glob("[ar]*.npz"))]
    rows = {name: table.summarise(name, search, tables) for name, search in table.list_searches().items()}
    assert rows["twice the steps at the next lower rate, truncated"] is None  # only the chosen rate was trained longer
    regrets = {name: row["regret of the adapter"]["mean"] for name, row in rows.items() if row is not None}
    assert regrets["16, rate tuned by whole trainings"] == pytest.approx(0.03, abs=0.002)
    assert regrets["adapter, average of two seeds"] == pytest.approx(-0.019, abs=0.003)
    assert regrets["twice the steps, truncated"] == pytest.approx(-0.05, abs=0.002)
    best = rows["adapter"]
    assert best["trainings"] == 1.75
    for name in (
        "random search at the cost of best-adapter",
        "Optuna TPE, median pruning, at the cost of best-adapter",
    ):
        row = rows[name]
        assert row["trainings"] <= 4.5
        assert row["regret of the adapter"]["mean"] > regrets["best-adapter"]
    assert len(table.format_table([row for row in rows.values() if row is not None]).splitlines()) == 2 + len(regrets)


def test_shares_of_wrong_answers_replace_the_test_loss(tmp_path: Path) -> None:
    write_grid(tmp_path, "answers", 0, advantage=0.03)
    with np.load(tmp_path / "answers_0.npz") as arrays:
        stored_arrays = dict(arrays)
    scores = np.ones(stored_arrays["test"].shape, np.uint8)
    scores[0, : EXAMPLES // 4] = 0
    np.savez_compressed(tmp_path / "answers_0.npz", scores=scores, **stored_arrays)
    shares = table.read_shares(tmp_path / "answers_0.npz")
    assert shares.adapters[Key("trained", 4, 3e-4)].test_mean == pytest.approx(0.25)
    assert shares.adapters[Key("trained", 64, 3e-4)].test_mean == 0


def test_a_stored_grid_of_the_earlier_study_is_read(tmp_path: Path) -> None:
    items = {"64": {"0.001": {"0": [1.0, 3.0], "1": [1.0, 3.0]}}, "4": {"0.001": {"0": [2.0, 3.0]}}}
    curve = {
        "metric": "loss", "steps": 400, "seeds": [0, 1], "item_tokens": [1, 3], "item_losses": items,
        "checkpoints": {"0.25": {"64": {"0.001": {"0": 2.5}}}}, "checkpoint_items": {},
        "truncation_items": {"4": {"0.001": {"0": [1.5, 3.0]}}},
    }  # fmt: skip
    with pytest.raises(SystemExit, match="no stored grids"):
        stored.read_stored(tmp_path)
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide/tiny.json.xz").write_bytes(lzma.compress(json.dumps({"curves": [curve]}).encode()))
    cells = np.array([[64, 0.001, 0], [4, 0.001, 0], [64, 0.001, 1]])
    np.savez_compressed(
        tmp_path / "wide/tiny.npz",
        cells=cells,
        losses=np.array([[2000, 2000], [4000, 4000], [2000, 2000]]),
        tokens=[2, 2],
    )
    read, second = stored.read_stored(tmp_path)
    assert read.adapters[Key("trained", 64, 0.001)].validation_mean == 1.0
    assert read.adapters[Key("trained", 64, 0.001)].test_mean == 1.0
    assert read.adapters[Key("trained", 64, 0.001, 0.25)].validation_mean == 2.5
    assert read.adapters[Key("truncated", 4, 0.001)].test_mean == pytest.approx(1.0 + 0.5 / 4)
    assert second.adapters[Key("trained", 4, 0.001)].test_mean == math.inf  # it diverged


# Training.


@pytest.fixture(scope="module")
def task() -> train_grids.Task:
    """Return a language-model task on a random Llama with hidden states of 16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval().requires_grad_(False)
    block = model.layers[-1]
    weights = {name: block.get_submodule(path).weight.data for name, path in DECODER_NAMES.items()}
    norms = {"input_norm": block.input_layernorm, "mlp_norm": block.post_attention_layernorm, "final_norm": model.norm}
    weights |= {name: norm.weight.data for name, norm in norms.items()} | {"head": model.embed_tokens.weight.data}
    shapes = {name: (weights[name].shape[0], weights[name].shape[1]) for name in DECODER_NAMES}
    base = Base("tiny", model, None, weights, shapes, is_encoder=False)
    draw = np.random.default_rng(0)
    examples = []
    for number in range(60):
        ids = draw.integers(1, 40, size=int(draw.integers(4, 9))).tolist()
        positions = [len(ids) - 2, len(ids) - 1]
        examples.append(train_grids.Example([(ids, positions, draw.integers(0, 5, size=2).tolist())], str(number)))
    splits = {"test": list(range(10)), "validation": list(range(10, 20)), "train": list(range(20, 60))}
    ids, mask = torch.zeros(60, 8, dtype=torch.long), torch.zeros(60, 8, dtype=torch.bool)
    for number, example in enumerate(examples):
        tokens = example.sequences[0][0]
        ids[number, : len(tokens)], mask[number, : len(tokens)] = torch.tensor(tokens), True
    base.check(ids, mask)
    hidden = base.compute_prefix(ids, mask.long())
    return train_grids.Task(base, examples, splits, False, 0, weights["head"], hidden)


def train_to_end(
    task: train_grids.Task, cells: list[tuple[int, float]], steps: int = 16
) -> list[dict[str, torch.Tensor]]:
    *_, (_, adapters, _) = train_grids.train(task, cells, 0, steps)
    return adapters


@pytest.mark.trains
def test_adapters_that_share_a_pass_are_trained_as_alone(task: train_grids.Task) -> None:
    cells = [(4, 1e-2), (4, 3e-3), (8, 1e-2)]
    shared = train_to_end(task, cells)
    for cell, adapter in zip(cells, shared, strict=True):
        (alone,) = train_to_end(task, [cell])
        for name, tensor in alone.items():
            torch.testing.assert_close(adapter[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.trains
def test_training_is_that_of_torch_adamw(task: train_grids.Task) -> None:
    (ours,) = train_to_end(task, [(4, 1e-2)])
    first = train_grids.first_adapter(task, 4, 0)
    bank = train_grids.Bank([first], trainable=True)
    scaled = train_grids.ScaledBank(bank, [train_grids.ALPHA / 4])
    parameters = list(bank.tensors[0].values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step if step < 1 else (16 - step) / 15)
    for indices in train_grids.plan_batches(task, 0, 16):
        losses, _ = train_grids.compute_losses(task, scaled, indices)
        (losses.sum() / task.weights(indices).sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for name, tensor in scaled.unstack()[0].items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.trains
def test_a_seed_is_stored_with_truncations_averages_and_longer_trainings(
    task: train_grids.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_grids, "STEPS", 16)
    monkeypatch.setattr(train_grids, "MOMENT_STEPS", 2)
    for seed in (0, 1):
        train_grids.run_seed(task, "answers", seed, tmp_path, tmp_path)
    read = judge.read_seed(tmp_path / "answers_1.npz")
    assert len(read.trained()) == len(train_grids.RANKS) * len(train_grids.RATES)
    assert read.rates("trained", 64, 0.25) == sorted(train_grids.RATES)
    whole = read.adapters[Key("trained", 64, 1e-2)]
    cuts = read.find_cuts("trained", 1e-2)
    assert sorted(cuts) == sorted(train_grids.TRUNCATED_RANKS)
    assert (
        abs(read.adapters[cuts[32]].validation_mean - whole.validation_mean) < 0.01
    )  # no matrix has more than 24 singular values
    averages = [key for key in read.adapters if key.kind == "average"]
    assert averages
    assert sorted(read.find_cuts("average", averages[0].rate, 0)) == sorted(train_grids.AVERAGED_RANKS)
    assert len(read.rates("long", 64)) == 2
    assert len(read.rates("long", 64, 0.5)) == 2


def test_the_average_of_an_adapter_with_itself_is_the_adapter(task: train_grids.Task) -> None:
    adapter = train_grids.first_adapter(task, 4, 0)
    adapter = {
        name: tensor if name.endswith(".A") else torch.ones_like(tensor) * 0.1 for name, tensor in adapter.items()
    }
    doubled = train_grids.average([adapter, adapter])
    assert doubled["q.A"].shape[0] == 8
    losses, _ = train_grids.evaluate(task, [adapter, doubled], "test")
    assert np.abs(losses[0].astype(int) - losses[1].astype(int)).max() <= 1


def test_splits_hold_whole_groups_with_few_rows_each() -> None:
    examples = [train_grids.Example([([1], [0], [1])], f"group {number // 40}") for number in range(8000)]
    splits = train_grids.split_examples(examples)
    groups = {name: {examples[index].group for index in indices} for name, indices in splits.items()}
    assert not groups["test"] & groups["validation"]
    assert not (groups["test"] | groups["validation"]) & groups["train"]
    assert (
        max(sum(examples[index].group == group for index in splits["validation"]) for group in groups["validation"])
        <= train_grids.MAX_GROUP_ROWS
    )
