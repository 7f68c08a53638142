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
from collections.abc import Sequence
from html import escape
from typing import Any

from .recommend import loaded, opened, run_options
from .service import Answer, Service

HOST = "127.0.0.1"
FONTS = (["system-ui", "sans-serif"], ["ui-monospace", "monospace"])  # the theme's own would be downloaded


def table(name: str, columns: dict[str, list[str]]) -> str:
    """An HTML table. columns: the HTML of the cells by heading."""
    import pandas  # comes with gradio

    return pandas.DataFrame(columns).to_html(index=False, escape=False, border=0, table_id=name, justify="left")


def meter(share: float, text: str) -> str:
    """A bar for a share between 0 and 1, followed by the text."""
    return f'<meter value="{share:.3f}"></meter> {text}'


def ranking_html(answer: Answer, sequence_kind: str) -> str:
    """The scored candidates as HTML, best first."""
    shown = {
        "#": [str(r.rank) for r in answer.ranked],
        "title": [escape(r.title) for r in answer.ranked],
        "probability": [meter(r.probability, f"{r.probability:.1%}") for r in answer.ranked],
        f"{sequence_kind} rank": [str(r.sequence_rank) for r in answer.ranked],
    }
    notes = "".join(f"<p>{escape(note)}</p>" for note in answer.notes)
    history = escape(" · ".join(answer.history))
    return f"<h3>What comes next</h3><p>After {history}</p>{notes}{table('ranking', shown)}"


def gate_html(answer: Answer) -> str:
    experts = [f"expert {e}" for e in range(1, len(answer.gate) + 1)]
    weights = [meter(weight, f"{weight:.3f}") for weight in answer.gate]
    shown = table("gate", {"the gate": experts, "weight": weights})
    return f"<h3>Expert weights</h3><p>{escape(answer.gate_source)}</p>{shown}"


def respond(service: Service, titles: Sequence[str] | None) -> tuple[str, str]:
    """(ranking, gate) as HTML; if the titles cannot be used, the ranking says why."""
    try:
        answer = service.answer(titles or [])
    except ValueError as error:
        lines = "<br>".join(map(escape, str(error).splitlines()))
        return f'<p role="alert">{lines}</p>', ""
    return ranking_html(answer, service.sequence_kind), gate_html(answer)


def build(service: Service) -> Any:
    """Builds the page, a gradio.Blocks."""
    import gradio as gr

    how = (
        f"{service.sequence_kind} names a shortlist, and the language model, its experts weighed by the gate, ranks it."
    )
    with gr.Blocks(title="What comes next?", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# What comes next?\n{service.label}. {how}")
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
                gate = gr.HTML()
                examples = [[history] for history in service.histories()]
                gr.Examples(examples, [picked], label="The latest five of some users", elem_id="examples")
            with gr.Column(scale=3):
                ranking = gr.HTML("The ranking appears here.", elem_id="answer")
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
    page = build(loaded(*opened(options.run, options.root)))
    theme = gr.themes.Default(font=FONTS[0], font_mono=FONTS[1])
    shown = {"theme": theme, "footer_links": [], "ssr_mode": False, "quiet": True}
    _, url, _ = page.launch(server_name=HOST, server_port=options.port, share=False, prevent_thread_lock=True, **shown)
    print(f"the page: {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
