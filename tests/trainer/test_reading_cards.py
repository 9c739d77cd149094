"""Examples of reading: kept with their images, replaced when a run does steps again, and shown."""

import json
from pathlib import Path

import pytest
from PIL import Image
from support.pictures import picture

from fulmen.models.image_layout import image_layout
from fulmen.trainer.metrics import JsonlSink
from fulmen.trainer.prompt_images import Picture
from fulmen.trainer.reading.answers import Answer
from fulmen.trainer.reading.cards import picture_cards
from fulmen.trainer.reading.examples import MAX_SIDE, keep_examples, read_examples
from fulmen.trainer.reading.prompts import Prompt
from fulmen.trainer.reading.questions import Question
from fulmen.trainer.report import write_report


def answer(text: str, truth: str, *, name: str = "3-9") -> Answer:
    image = picture(800, 300)

    def make_prompt() -> Prompt:
        return Prompt([1], (Picture(0, image_layout(*image.size), image),) * 2)

    question = Question(name, "what <b>is</b> it?", (truth,), 9, frozenset(), make_prompt)
    return Answer(question, text, {"exact_match": float(text == truth), "anls": 0.5})


@pytest.mark.fast
def test_newer_examples_replace_those_of_steps_done_again(tmp_path: Path) -> None:
    keep_examples(tmp_path, 10, "words", [answer("a", "b")])
    keep_examples(tmp_path, 20, "words", [answer("c", "b"), answer("b", "b", name="4-1")])
    keep_examples(tmp_path, 20, "digits/held", [answer("1", "2")])
    keep_examples(tmp_path, 20, "words", [answer("d", "b")])
    rows = read_examples(tmp_path)
    assert [(row["step"], row["source"], row["answer"]) for row in rows] == [
        (10, "words", "a"), (20, "digits/held", "1"), (20, "words", "d"),
    ]  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "reading").glob("*.png"))
    assert names[:3] == ["digits_held-3-9-0.png", "digits_held-3-9-1.png", "words-3-9-0.png"]
    keep_examples(tmp_path, 5, "words", [])
    assert [row["source"] for row in read_examples(tmp_path)] == ["digits/held"]


@pytest.mark.fast
def test_the_report_shows_the_newest_pictures(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)
    sink.log_scores(10, 1000, {"reading/words/exact_match": 0.25, "reading/words/anls": 0.5})
    sink.log_scores(20, 2000, {"reading/words/exact_match": 0.75, "reading/words/anls": 0.875})
    sink.close(failed=False)
    assert picture_cards(tmp_path) == []
    keep_examples(tmp_path, 10, "words", [answer("old", "b")])
    keep_examples(tmp_path, 20, "words", [answer("<b", "b"), answer("b", "b", name="4-1")])
    page = write_report(tmp_path).read_text()
    assert "Read in images: words, step 20" in page
    assert page.count("data:image/png;base64,") == 4
    assert page.count('class="card right"') == page.count('class="card wrong"') == 1
    assert "what &lt;b&gt;is&lt;/b&gt; it?" in page
    assert "&lt;b</dd>" in page
    assert "old" not in page.split("Read in images")[1]
    assert "Final reading of words, exact match</th><td>75.0%" in page
    assert "Final reading of words, ANLS</th><td>87.5%" in page
    assert 'aria-label="Reading of held-out images"' in page
    (shown,) = {json.dumps(row["images"]) for row in read_examples(tmp_path) if row["step"] == 10}
    with Image.open(tmp_path / "reading" / json.loads(shown)[0]) as small:
        assert small.size == (MAX_SIDE, MAX_SIDE * 300 // 800)
