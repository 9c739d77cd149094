"""Pictures that a model has read, with what it said, as a part of a page without other files."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fulmen.trainer.reading.examples import FOLDER, read_examples

PREFIX = "reading/"
"""Of the rows in metrics.jsonl."""
CARDS_STYLE = """
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
.card { border: 1px solid var(--line); border-left: 4px solid #d6556b; border-radius: 6px;
  padding: .75rem 1rem; overflow-wrap: anywhere; }
.card.right { border-left-color: #2fa36b; }
.card img { display: block; max-width: 100%; margin-bottom: .5rem; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .75rem; margin: 0; }
.card dt { color: var(--soft); } .card dd { margin: 0; white-space: pre-line; }
"""


def score_names(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Keys of reading in rows of metrics, with names for people."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(PREFIX))
    words = {"exact_match": "exact match", "anls": "ANLS"}
    parts = {key: key.removeprefix(PREFIX).rpartition("/") for key in keys}
    return {key: f"{source}, {words.get(name, name)}" for key, (source, _, name) in parts.items()}


def picture_cards(output: Path) -> list[str]:
    """For each source a heading and the newest examples that are kept in a folder; HTML."""
    newest: dict[str, list[dict[str, Any]]] = {}
    for row in read_examples(output):
        rows = newest.setdefault(row["source"], [])
        if rows and row["step"] > rows[0]["step"]:
            rows.clear()
        rows.append(row)
    parts = []
    for source, rows in newest.items():
        title = f"Read in images: {source}, step {rows[0]['step']:,}"
        cards = "".join(_card(output / FOLDER, row) for row in rows)
        parts.append(f'<h2>{html.escape(title)}</h2><div class="cards">{cards}</div>')
    return parts


def _card(folder: Path, row: dict[str, Any]) -> str:
    verdict = "right" if row["right"] else "wrong"
    pictures = "".join(_picture(folder / name) for name in row["images"])
    said = {
        "question": row["question"],
        "answer": row["answer"],
        "truth": " | ".join(row["truths"]),
        "": verdict,
    }
    lines = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in said.items())
    return f'<div class="card {verdict}">{pictures}<dl>{lines}</dl></div>'


def _picture(path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'
