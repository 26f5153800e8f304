"""The page on which a person judges blind pairs: one file that opens from disk and sends nothing anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files

from rightrank.report.html import script_hash, script_json


def judge_page(pairs: Sequence[Mapping[str, str]]) -> str:
    """The page for these pairs, each with `id`, `prompt`, `a` and `b`."""
    script = files("rightrank.plugins.judge").joinpath("judge.js").read_text(encoding="utf-8").strip("\n")
    data = script_json(list(pairs))
    policy = f"default-src 'none'; script-src '{script_hash(script)}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>Which answer is better?</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark; }}
.answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid; border-radius: .4rem; padding: .8rem; margin: 0; }}
button {{ font: inherit; padding: .5rem 1rem; margin: 1rem .5rem 0 0; }}
</style>
</head>
<body>
<main>
<h1>Which answer is better?</h1>
<p><label>Your name <input id="judge" autocomplete="off" maxlength="60"></label> <span id="progress" role="status"></span></p>
<section id="pair" aria-live="polite">
<h2>Prompt</h2><pre id="prompt"></pre>
<div class="answers"><div><h2>A</h2><pre id="a"></pre></div><div><h2>B</h2><pre id="b"></pre></div></div>
<p><button id="choose-a">A is better (1)</button><button id="choose-b">B is better (2)</button><button id="choose-tie">No difference (3)</button><button id="back">Back</button></p>
</section>
<p><button id="save">Save the choices</button> Give the file to <code>rightrank judge RUN --collect FILE</code>.</p>
</main>
<script type="application/json" id="pairs">{data}</script>
<script>{script}</script>
</body>
</html>
"""
