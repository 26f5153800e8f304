"""Test the content of the report, and that data cannot change its structure."""

from __future__ import annotations

import re
from html import unescape

from rightrank.decision.run_answers import decide_if_possible, decide_run
from rightrank.report.answer import build_answers
from rightrank.report.html import build_figures, render_report
from rightrank.schema.events import Records
from tests.report.elements import Elements
from tests.report.runs import make_answered_run, make_run

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}\x00\x1b[31m\u202e\u2028end"


def render_page(records: Records) -> str:
    decision = decide_if_possible(records)
    return render_report(records, build_answers(records, decision), build_figures(records, decision))


def test_the_answer_comes_first_and_the_cost_last() -> None:
    records = make_run()
    decision = decide_run(records)
    text = Elements(render_page(records)).text
    start = text[: text.index("Performance against rank")]
    assert f"Rank {decision.rank}" in start
    assert decision.sentence in start
    end = text[text.rindex("Reproduce") :]
    assert "95% confidence" not in text
    assert "Cost: 8 trainings" in end


def test_what_comes_from_data_is_shown_as_text() -> None:
    records = make_run(model=NASTY)
    elements = Elements(render_page(records))
    shown = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}␀␛[31m��end"
    assert shown in elements.text
    assert [tag for tag, _ in elements.tags].count("script") == 0
    sources = [attributes["src"] for tag, attributes in elements.tags if tag == "img"]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not [tag for tag, attributes in elements.tags if "onerror" in attributes]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", render_page(records))


def test_the_policy_allows_no_script() -> None:
    page = render_page(make_run())
    policy = next(
        attributes["content"]
        for tag, attributes in Elements(page).tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy
    assert len(page.encode()) < 300_000


def test_the_box_is_code_whatever_the_model_s_name_is() -> None:
    records = make_answered_run()
    settings = records.started.settings | {"model": NASTY}
    records.started = records.started.model_copy(update={"settings": settings})
    code = re.search(r'<pre class="code">(.*?)</pre>', render_report(records, build_answers(records, None)), re.DOTALL)
    assert code is not None
    compile(unescape(code[1]), "box", "exec")
