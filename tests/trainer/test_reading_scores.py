"""Scores of answers, against values by hand, and records of the benchmarks that they are for."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.pictures import encoded, picture, write_jsonl
from support.seeing import seeing_config, write_conversations

from fulmen.trainer.reading.benchmarks import benchmark_questions, list_data
from fulmen.trainer.reading.prompts import PromptMaker, open_picture
from fulmen.trainer.reading.questions import Question
from fulmen.trainer.reading.scores import anls, chosen_option, exact_match, levenshtein, score


@pytest.mark.fast
def test_levenshtein_by_hand() -> None:
    for one, other, distance in [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
        ("intention", "execution", 5),
        ("same", "same", 0),
    ]:
        assert levenshtein(one, other) == distance
        assert levenshtein(other, one) == distance


@pytest.mark.fast
def test_anls_by_hand() -> None:
    for answer, truths, wanted in [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("  January  5 ", ["january 5"], 1.0),
        ("1234", ["1235"], 0.75),
        ("12", ["13"], 0.0),  # half of it is wrong: no longer a misreading
        ("123", ["124", "999"], 1 - 1 / 3),
        ("999", ["124", "999"], 1.0),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("no", [], 0.0),
        ("abcd", ["abcdefg"], 1 - 3 / 7),
        ("abcd", ["abcdefgh"], 0.0),
    ]:
        assert anls(answer, truths) == pytest.approx(wanted), answer
    assert exact_match(" a  b ", ["c", "a b"])
    assert not exact_match("A b", ["a b"])
    assert score("12", ["13", "12"]) == {"exact_match": 1.0, "anls": 1.0}


@pytest.mark.fast
def test_options_by_letter_or_text() -> None:
    options = ["a dog", "the Sun", "C", "dry ice"]
    for answer, letter in [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B. the Sun", "B"), ("the  sun", "B"), ("A", "A"),
        ("A) a cat", "A"), ("a dog", "A"), ("a cat", None), ("E", None), ("", None), ("c", "C"),
        ("the answer is B", None), ("<image>", None),
    ]:  # fmt: skip
        assert chosen_option(answer, options) == letter, answer
    assert score("dry ice", ("D",), options) == {"exact_match": 1.0}
    assert score("A", ("D",), options) == {"exact_match": 0.0}


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> PromptMaker:
    images = write_conversations(tmp_path_factory.mktemp("for_a_tokenizer"), count=8)
    fixed = PromptMaker.open(
        images / "tokenizer.json", seeing_config(images).model.vision, fixed=True
    )
    (seen,) = fixed.make("what?", [picture(200, 100)], chat=True).pictures
    assert seen.layout.num_tiles == 1
    return PromptMaker.open(images / "tokenizer.json", seeing_config(images).model.vision)


def questions_of(
    name: str, data: Any, maker: PromptMaker, instruction: str | None = None
) -> list[Question]:
    files = list_data(data)
    found = benchmark_questions(
        name, files, maker, max_records=None, max_new_tokens=9, instruction=instruction
    )
    return list(found)


def words_of(maker: PromptMaker, question: Question) -> str:
    shown = [token for token in question.make_prompt().ids if token != maker.ids.image]
    words: str = maker.tokenizer.decode(shown)
    return words


def test_docvqa_as_published(maker: PromptMaker, tmp_path: Path) -> None:
    page = encoded(picture(60, 80))
    rows = [
        {
            "questionId": str(number),
            "question": f"What is number {number}?",
            "image": {"bytes": page, "path": None},
            "docId": 7,
            "answers": [f"{number}", f"no. {number}"],
        }
        for number in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "validation-00000-of-00001.parquet")
    questions = questions_of("docvqa", str(tmp_path / "*.parquet"), maker)
    assert [question.truths for question in questions] == [
        (f"{number}", f"no. {number}") for number in range(3)
    ]
    assert questions[1].text == "What is number 1?"
    assert questions[1].stop_ids == maker.stop_ids
    assert words_of(maker, questions[1]) == (
        "user name=user\nWhat is number 1?\nAnswer the question using a single word or phrase.\n"
        "ai name=assistant\n"
    )
    (seen,) = questions[1].make_prompt().pictures
    assert seen.image.size == (60, 80)


def test_ai2d_as_published(maker: PromptMaker, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    record = {"question": "Which?", "options": ["egg", "larva"], "answer": "1", "image": "a.png"}
    write_jsonl(tmp_path / "x.jsonl", [record, record | {"answer": 0}])
    first, second = questions_of("ai2d", [str(tmp_path / "x.jsonl")], maker, instruction="")
    assert (first.truths, first.options, second.truths) == (("B",), ("egg", "larva"), ("A",))
    assert words_of(maker, first) == (
        "user name=user\nWhich?\nA. egg\nB. larva\nai name=assistant\n"
    )


def test_broken_records_are_named(maker: PromptMaker, tmp_path: Path) -> None:
    good = encoded(picture())
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    record = {"question": "q", "answers": ["a"], "image": "good.png"}
    path = tmp_path / "x.jsonl"
    for changes, message in [
        ({"image": "cut.png"}, "record 2: (truncated|undecodable): "),
        ({"image": "none.png"}, "record 2: missing_image: none.png"),
        ({"image": None}, "record 2: missing_image"),
        ({"answers": None}, "record 2: 'answers' is no list .* take another split"),
        ({"question": 3}, "record 2: 'question' is no text"),
    ]:
        write_jsonl(path, [record, record | changes])
        with pytest.raises(ValueError, match=rf"{path}, {message}"):
            questions_of("docvqa", str(path), maker)[1].make_prompt()
    write_jsonl(path, [{"question": "q", "options": ["a"], "answer": "1", "image": "good.png"}])
    with pytest.raises(ValueError, match="record 1: answer='1' is no place in 'options'"):
        questions_of("ai2d", str(path), maker)
    with pytest.raises(ValueError, match=r"data=.*/none\.parquet: no file found there"):
        list_data(str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match=r"good\.png: must end in one of"):
        list_data([str(tmp_path / "good.png")])


def test_prompts_of_image_files(maker: PromptMaker, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(60, 30)))
    image = open_picture(tmp_path / "a.png")
    first = maker.make("what is this?", [image], chat=True)
    assert first == maker.make("<image>what is this?", [image], chat=True)
    assert first.ids[0] == maker.ids.begin_turn
    plain = maker.make("a <image> is ", [image, image][:1], chat=False)
    (seen,) = plain.pictures
    assert plain.ids[seen.first : seen.first + seen.layout.num_tokens] == (
        [maker.ids.image] * seen.layout.num_tokens
    )
    assert maker.tokenizer.decode(plain.ids) == "a  is "
    assert seen.layout.num_tiles > 1
    with pytest.raises(ValueError, match="2 images in the text, but 1 given"):
        maker.make("<image> or <image>?", [image], chat=True)
    with pytest.raises(ValueError, match="thinner than one patch"):
        maker.make("what?", [Image.new("RGB", (2000, 1))], chat=True)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"image .*/b\.png is of no use, not_an_image"):
        open_picture(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"image .*/c\.png cannot be read: No such file"):
        open_picture(tmp_path / "c.png")
