"""Serves a page on this machine that recommends as `recommend.py` does: pick titles, see ranking and expert weights.

    pip install -e '.[bench,page]'
    python examples/sequential_recommendation/page.py
    python examples/sequential_recommendation/page.py --run FOLDER --port 8000

The page listens on 127.0.0.1 alone, loads nothing from other machines and sends no usage reports.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __spec__ is None:  # run by path: start again as the package's module, so that its imports work
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module("sequential_recommendation.page", run_name="__main__", alter_sys=True)
    sys.exit()

import argparse
import os
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .recommend import loaded, opened, quiet, run_options
from .service import Answer, Service

HOST = "127.0.0.1"
FONTS = (["system-ui", "sans-serif"], ["ui-monospace", "monospace"])  # the theme's own would be downloaded
STYLE = """
.answer {overflow-x: auto}
.answer table {width: 100%; border-collapse: collapse; border: 0 !important; margin: .4rem 0 !important}
.answer th, .answer td {padding: .28rem .5rem !important; border: 0 !important; text-align: left; white-space: nowrap;
  vertical-align: middle}
.answer tr {border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important}
.answer th {font-weight: 600; font-size: .85em; white-space: normal}
.answer th, .answer p {color: var(--body-text-color); opacity: .7}
.answer td.number, .answer th.number {text-align: right; font-variant-numeric: tabular-nums}
.answer td.title {white-space: normal; width: 55%}
.answer .track {display: inline-block; width: clamp(2rem, 7vw, 9rem); height: .7rem; margin-right: .5rem;
  border-radius: 3px; background: var(--border-color-primary); vertical-align: middle; overflow: hidden}
.answer .bar {display: block; height: 100%; background: var(--color-accent)}
.answer .share {display: inline-block; min-width: 3.4rem; text-align: right; font-variant-numeric: tabular-nums}
.answer h3 {margin: 0}
.answer p {margin: .3rem 0}
.answer .alert {padding: .7rem .9rem; border-left: 4px solid #dc2626; white-space: pre-line; color: #991b1b;
  background: #fee2e2}
#examples button {text-align: left; justify-content: flex-start}
"""
HOW = "{kind} names a shortlist, and the language model, its experts weighed by the gate, ranks it."
EMPTY = '<div class="answer"><p>The ranking appears here.</p></div>'


def bar(share: float, text: str) -> str:
    """A bar for a share between 0 and 1, followed by the text."""
    return (
        f'<span class="track"><span class="bar" style="width:{100 * share:.1f}%"></span></span>'
        f'<span class="share">{text}</span>'
    )


def table(head: Iterable[tuple[str, str]], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table. head: (CSS class, text) of each column. rows: the columns' HTML."""
    columns = list(head)
    top = "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{cell}</td>' for (kind, _), cell in zip(columns, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def ranking_html(answer: Answer, sequence_kind: str) -> str:
    """The scored candidates as HTML, best first."""
    rows = (
        (str(r.rank), escape(r.title), bar(r.probability, f"{r.probability:.1%}"), str(r.sequence_rank))
        for r in answer.ranked
    )
    head = (("number", "#"), ("title", "title"), ("share", "probability"), ("number", f"{sequence_kind} rank"))
    notes = "".join(f"<p>{escape(note)}</p>" for note in answer.notes)
    after = f"<p>After {escape(' · '.join(answer.history))}</p>"
    return f'<div class="answer" id="ranking"><h3>What comes next</h3>{after}{notes}{table(head, rows)}</div>'


def gate_html(answer: Answer) -> str:
    rows = ((f"expert {e}", bar(weight, f"{weight:.3f}")) for e, weight in enumerate(answer.gate, 1))
    chart = table((("", "the gate"), ("share", "weight")), rows)
    return f'<div class="answer" id="gate"><h3>Expert weights</h3><p>{escape(answer.gate_source)}</p>{chart}</div>'


def alert(message: str) -> str:
    return f'<div class="answer"><div class="alert" role="alert">{escape(message)}</div></div>'


def respond(service: Service, titles: Sequence[str] | None) -> tuple[str, str]:
    """(ranking, gate) as HTML for the titles picked. If something is wrong with them, an alert replaces the ranking."""
    try:
        answer = service.answer(titles or [])
    except ValueError as error:
        return alert(str(error)), ""
    return ranking_html(answer, service.sequence_kind), gate_html(answer)


def build(service: Service) -> Any:
    """Builds the page, a gradio.Blocks."""
    import gradio as gr

    with gr.Blocks(title="What comes next?", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# What comes next?\n{service.label}. {HOW.format(kind=service.sequence_kind)}")
        with gr.Row():
            with gr.Column(scale=2):
                picked = gr.Dropdown(
                    service.titles.known,
                    multiselect=True,
                    allow_custom_value=True,  # so that a name in other case or without accents reaches `Titles.find`
                    label="Titles somebody liked, oldest first",
                    info="Type to search, Enter to take. 3 to 10 are best. Accents and case do not matter.",
                    elem_id="titles",
                )
                ask = gr.Button("Recommend", variant="primary", elem_id="ask")
                gate = gr.HTML(padding=False)
                examples = [[history] for history in service.histories()]
                gr.Examples(examples, [picked], label="The latest five of some users", elem_id="examples")
            with gr.Column(scale=3):
                ranking = gr.HTML(EMPTY, padding=False)
        ask.click(lambda titles: respond(service, titles), [picked], [ranking, gate], api_name="recommend")
    return page


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_options(parser)
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it at import
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        sys.exit(f"page.py needs gradio ({error}): pip install -e '.[bench,page]'")
    quiet()
    page = build(loaded(*opened(options.run, options.root)))
    theme = gr.themes.Default(font=FONTS[0], font_mono=FONTS[1])
    shown = {"theme": theme, "css": STYLE, "footer_links": [], "ssr_mode": False, "quiet": True}
    _, url, _ = page.launch(server_name=HOST, server_port=options.port, share=False, prevent_thread_lock=True, **shown)
    print(f"the page: {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
