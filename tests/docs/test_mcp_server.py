"""Test the example of an MCP server: its tools return what the commands print with --json."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp.server.mcpserver")  # from mcp 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Any:
    return runpy.run_path(str(ROOT / "examples" / "mcp_server.py"))["server"]


def call_tool(server: Any, name: str, **arguments: object) -> Any:
    """Return the result that a client receives."""

    async def call() -> Any:
        from mcp import Client

        async with Client(server) as client:
            return await client.call_tool(name, arguments)

    return asyncio.run(call())


def test_the_tools_are_five_commands_with_a_description(server: Any) -> None:
    tools = asyncio.run(server.list_tools())
    assert [tool.name for tool in tools] == ["expect", "plan", "decide", "status", "select"]
    assert all(tool.description for tool in tools)


def test_a_tool_returns_the_object_of_its_command(server: Any) -> None:
    assert call_tool(server, "expect", task="chat", rows=5000).structured_content["ranks"]
    example = ROOT / "src" / "rightrank" / "cli" / "example.csv"
    assert call_tool(server, "decide", results=str(example)).structured_content["rank"] == 16


def test_an_error_is_the_line_of_the_command(server: Any, tmp_path: Path) -> None:
    result = call_tool(server, "status", run=str(tmp_path))
    assert result.is_error
    assert "no journal.jsonl there" in result.content[0].text


@pytest.mark.parametrize("value", ["--example", "--help", "-h"])
def test_a_value_that_starts_with_a_hyphen_is_no_option(server: Any, value: str) -> None:
    results = [call_tool(server, "decide", results=value), call_tool(server, "expect", task=value, rows=5000)]
    assert all(result.is_error and value in result.content[0].text for result in results)
