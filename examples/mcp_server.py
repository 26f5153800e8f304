"""Offer rightrank's commands as tools of an MCP server, for agents that call tools instead of a shell.

Install and start it (an MCP client starts it by itself)::

    pip install 'mcp>=2' '.[train]'
    python examples/mcp_server.py

Every tool runs one command with --json and returns its object. An error is the command's one line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("rightrank")


def run_command(name: str, *arguments: str, **options: str) -> dict[str, Any]:
    """Run a command of rightrank and return its JSON object.

    Options are written as --name=value and arguments after --, so that a value that starts with - is not read as an option.

    Raises:
        ToolError: the command ended with an error; the message is its last line.
    """
    named = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    command = [sys.executable, "-m", "rightrank", name, *named, "--json", "--", *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if not completed.stdout:
        raise ToolError(completed.stderr.strip().rpartition("\n")[2])
    answer: dict[str, Any] = json.loads(completed.stdout)
    return answer


@server.tool()
def expect(task: str, rows: int) -> dict[str, Any]:
    """Tell what public sweeps found about LoRA ranks for a task (chat, language, …) with this many rows. Takes a second."""
    return run_command("expect", task=task, rows=str(rows))


@server.tool()
def plan(model: str, ranks: list[int], seq_len: int = 512) -> dict[str, Any]:
    """Predict the peak memory of training each rank, from the config.json of a model folder."""
    return run_command("plan", model, ranks=",".join(map(str, ranks)), seq_len=str(seq_len))


@server.tool()
def decide(results: str) -> dict[str, Any]:
    """Decide which rank is enough from a table of finished trainings (CSV or JSONL), or from a run folder."""
    return run_command("decide", results)


@server.tool()
def status(run: str) -> dict[str, Any]:
    """Report the state, the answer and the next commands of a run folder."""
    return run_command("status", run)


@server.tool()
def select(model: str, data: str, out: str, goal: str = "adapter", hours: float = 1.0) -> dict[str, Any]:
    """Find the learning rate and the smallest adapter by training, within some hours. The same call resumes."""
    return run_command("select", model, data, out=out, goal=goal, time=f"{hours:g}h")


if __name__ == "__main__":
    server.run()
