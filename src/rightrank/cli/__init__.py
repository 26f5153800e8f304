"""The command line: parse, call the API, print. One function for each command.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 started and could not finish, 2 bad usage or
bad input, 130 interrupted by the user, 143 by SIGTERM. `compare` also ends with 3 (worse) or 4 (cannot tell).
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

import click

from rightrank.cli import adapter_commands, plan_commands, run_commands, select
from rightrank.schema.errors import RightrankError, format_one_line, is_out_of_memory
from rightrank.version import __version__

# Packages of `rightrank[train]`; commands that need none of them work without them.
TRAINING_PACKAGES = frozenset(
    ("accelerate", "datasets", "huggingface_hub", "pandas", "peft", "pyarrow", "torch", "transformers")
)


class Commands(click.Group):
    """The commands in the order in which they are added: the main job, before it, its run folder, finished results, adapters."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rightrank")
def cli() -> None:
    """Find the LoRA rank that is enough and no more: measured on your model and your data.

    Start with `rightrank expect`, which needs no model, then `rightrank select MODEL DATA`.
    """


for module in (select, plan_commands, run_commands, adapter_commands):
    for command in module.COMMANDS:
        cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    _prepare_streams()
    arguments_given = sys.argv[1:] if arguments is None else arguments
    try:
        status = cli.main(
            args=arguments_given, prog_name="rightrank", standalone_mode=False, obj=["rightrank", *arguments_given]
        )
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _print_error(error.format_message())
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _print_error("stopped; run the same command again to resume")
        sys.exit(130)
    except RightrankError as error:
        _print_error(str(error))
        sys.exit(error.exit_status)
    except ImportError as error:  # a package is missing, or too old to have a name
        package = (error.name or "").partition(".")[0]
        if package not in TRAINING_PACKAGES:
            raise
        _print_error(
            f"{package} can't be imported ({error}); install what this command needs: pip install 'rightrank[train]'"
        )
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _print_error(
            "out of memory; finished trials are kept: free memory or lower the settings, and run the same command again"
        )
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output closed the pipe
        sys.exit(1)
    except OSError as error:
        path = error.filename2 or error.filename or "the system"  # the target of a rename
        _print_error(f"{path}: {error.strerror or error}; give a path that can be read or written")
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def _prepare_streams() -> None:
    """Write UTF-8 whatever the locale is, as JSON requires; write to nowhere if a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _print_error(message: str) -> None:
    with suppress(OSError):  # if stderr can't be written, the exit status remains
        click.echo(f"rightrank: {format_one_line(message)}", err=True)
