"""Prompts and documents: exact lengths, and answers that stand in the text at the asked depth."""

import io
import json
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from rich.console import Console

from fulmen.data.config import PrepareConfig, RetrievalConfig
from fulmen.data.generate import generate
from fulmen.data.haystack import language_of
from fulmen.data.prepare import prepare
from fulmen.data.retrieval import KINDS, Language, Prose, Words, make_document, make_prompt
from fulmen.data.shards import PreparedSplit
from fulmen.data.tokenise import load_tokenizer, train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the haystack itself."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained = train_tokenizer(iter(texts()), vocab_size=2000, end_of_document="<end_of_document>")
    trained.save(str(path))
    return path


def texts() -> list[str]:
    names = ("textwrap", "argparse", "statistics", "this", "inspect")
    return [(STDLIB / f"{name}.py").read_text() for name in names]


@pytest.fixture(scope="module", params=["words", "text"])
def language(request: pytest.FixtureRequest, tokenizer: Path) -> Language:
    if request.param == "words":
        return Words(num_keys=200)
    return Prose(load_tokenizer(str(tokenizer)), texts())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("num_distractors", [0, 6])
def test_prompts(language: Language, kind: str, depth: float, num_distractors: int) -> None:
    length = 4001
    for seed in range(3):
        prompt = make_prompt(
            kind,
            language,
            np.random.default_rng(seed),
            length=length,
            depth=depth,
            num_distractors=num_distractors,
        )
        assert len(prompt.ids) + len(prompt.answer) == length
        assert prompt.ids == language.encode(prompt.text)
        assert prompt.answer == language.encode(prompt.answer_text)
        assert prompt.ids + prompt.answer == language.encode(prompt.text + prompt.answer_text)
        places = facts_of(language, kind, prompt.text, prompt.answer_text)
        first, last = min(places), max(places)
        before = len(language.encode(prompt.text[:first]))
        assert before / length == pytest.approx(prompt.depth, abs=0.03)
        # At the nearest end of a sentence, or of a piece of real text.
        assert prompt.depth == pytest.approx(
            depth, abs=0.02 if isinstance(language, Words) else 0.1
        )
        assert first <= last < len(prompt.text)


def facts_of(language: Language, kind: str, text: str, answer: str) -> list[int]:
    """Where in the text the facts stand that give the answer, found by reading the text."""
    if kind == "passage":
        if isinstance(language, Words):
            quoted = text.rpartition("quote ")[2]
            return [text.index(quoted + answer)]
        quoted = text.rpartition("Question:")[2].split('that says "')[1].split('"? Answer:')[0]
        one_line = " ".join(text.rpartition("Question:")[0].split())
        assert quoted + answer in one_line
        # Line ends are not in the quotation: find its words in the text as it is.
        begin = next(
            at
            for at in range(len(text))
            if text.startswith(quoted.split()[0], at)
            and " ".join(text[at : at + 4000].split()).startswith(quoted + answer)
        )
        return [begin]
    if isinstance(language, Words):
        asked = text.split()[-2 if kind == "tracking" else -1 :]
        values = answer.split()
        if kind == "needle":
            return [text.index(f"note {asked[-1]} {answer}. ")]
        if kind == "multi_value":
            pairs = [values[at : at + 2] for at in range(0, len(values), 2)]
            return [text.index(f"add {asked[-1]} {' '.join(pair)} . ") for pair in pairs]
        facts = [f"set {values[0]} {text.split('holders ')[1]}. "]
        facts += [f"copy {b} {a} . " for a, b in pairwise(values)]
        return [text.index(fact) for fact in facts]
    question = text.rpartition("Question: ")[2]
    values = answer.strip().split(", ")
    if kind == "tracking":
        value = question.split("assigned the value ")[1].split()[0]
        facts = [f"VAR {values[0]} = {value}\n"]
        facts += [f"VAR {b} = VAR {a}\n" for a, b in pairwise(values)]
        return [text.index(fact) for fact in facts]
    key = question.split("special magic ")[1].split(" number")[0]
    return [text.index(f"The special magic {key} number is: {value}.\n") for value in values]


def test_distractors_hide_other_keys() -> None:
    prompt = make_prompt(
        "needle", Words(), np.random.default_rng(0), length=2000, num_distractors=30
    )
    words = prompt.text.split()
    keys = [words[at + 1] for at, word in enumerate(words) if word == "note"]
    assert len(keys) == len(set(keys)) == 31
    assert words[-2] == "ask"
    assert words[-1] in keys


def test_facts_of_a_kind_come_in_order_below_the_first() -> None:
    language = Words()
    for seed in range(10):
        prompt = make_prompt(
            "tracking", language, np.random.default_rng(seed), length=3000, depth=0.4
        )
        places = facts_of(language, "tracking", prompt.text, prompt.answer_text)
        assert places == sorted(places)
        assert len(places) == 4


@pytest.mark.parametrize("kinds", [{kind: 1.0} for kind in KINDS] + [dict.fromkeys(KINDS, 1.0)])
def test_documents(language: Language, kinds: dict[str, float]) -> None:
    for length in (400, 3001):
        text = make_document(kinds, language, np.random.default_rng(length), length=length)
        assert len(language.encode(text)) == length - 1
    if isinstance(language, Words):
        check_words(text, kinds)


def check_words(text: str, kinds: dict[str, float]) -> None:
    """Each answer of a document follows from the facts before its question."""
    asked = 0
    before = ""
    # The haystack may end in a sentence of which only the full stop is left.
    for sentence in text.replace(". . ", ". ").split(" . "):
        mark, _, rest = sentence.partition(" ")
        words = rest.split()
        if mark == "ask":
            assert f"note {rest} . " in before
        elif mark == "all":
            for at in range(1, len(words), 2):
                assert f"add {words[0]} {' '.join(words[at : at + 2])} . " in before
        elif mark == "holders":
            assert f"set {words[2]} {words[0]} {words[1]} . " in before
            for a, b in pairwise(words[2:]):
                assert f"copy {b} {a} . " in before
        elif mark == "quote":
            assert f"{rest} . " in before
        asked += mark in ("ask", "all", "holders", "quote")
        before += sentence + " . "
    assert asked >= 1
    for kind, mark in (("needle", "note "), ("tracking", "set ")):
        assert kind in kinds or mark not in text


def test_the_answers_are_much_of_what_there_is_to_learn() -> None:
    """Haystacks repeat a small book, so the loss that can be learnt away is the answers'."""
    language = Words()
    rng = np.random.default_rng(0)
    documents = [make_document({"needle": 1.0}, language, rng, length=8192) for _ in range(30)]
    answers = sum(2 * text.count("ask ") for text in documents)
    assert answers / (30 * 8192) > 0.015
    distances = []
    for text in documents:
        words = text.split()
        fact = {words[at + 1]: at for at, word in enumerate(words) if word == "note"}
        distances += [at - fact[words[at + 1]] for at, word in enumerate(words) if word == "ask"]
    assert min(distances) > 0
    assert np.percentile(distances, 10) < 1500 < 5000 < np.percentile(distances, 90)


def test_too_little_room() -> None:
    with pytest.raises(ValueError, match="a prompt of 30 tokens has no room"):
        make_prompt("needle", Words(), np.random.default_rng(0), length=30, num_distractors=9)
    with pytest.raises(ValueError, match="not enough keys, values or passages"):
        make_prompt("needle", Words(num_keys=8), np.random.default_rng(0), length=900,
                    num_distractors=9)  # fmt: skip
    with pytest.raises(ValueError, match="kinds: poem is unknown"):
        make_prompt("poem", Words(), np.random.default_rng(0), length=900)


def test_the_language_of_a_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    words = Words(num_keys=77, num_fillers=30)
    words.tokenizer().save(str(tmp_path / "tokenizer.json"))
    found = language_of(load_tokenizer(str(tmp_path / "tokenizer.json")), [])
    assert isinstance(found, Words)
    assert len(found.keys) == 77
    text = make_document({"needle": 1.0}, words, np.random.default_rng(0), length=500)
    assert found.encode(text) == load_tokenizer(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert isinstance(language_of(load_tokenizer(str(tokenizer)), texts()), Prose)


def settings(output: Path, **changes: Any) -> RetrievalConfig:
    values: dict[str, Any] = {
        "output": str(output),
        "haystack": "words",
        "tokens": 40_000,
        "lengths": [[100, 400, 0.25], [400, 2000, 0.75]],
        "num_keys": 100,
        "num_workers": 1,
    }
    return RetrievalConfig(**(values | changes))


def documents_of(folder: Path) -> list[str]:
    raw = zstandard.ZstdDecompressor().stream_reader(
        (folder / "documents.jsonl.zst").read_bytes()
    ).read()  # fmt: skip
    return [json.loads(line)["text"] for line in raw.decode().splitlines()]


@pytest.mark.parametrize("haystack", ["words", "text"])
def test_generated_and_prepared(tmp_path: Path, tokenizer: Path, haystack: str) -> None:
    config = settings(tmp_path / "made", haystack=haystack, tokenizer=str(tokenizer))
    config.input = [str(STDLIB / "textwrap.py"), str(STDLIB / "inspect.py")]
    if haystack == "words":
        config.tokenizer = str(tmp_path / "made" / "tokenizer.json")
    total = generate(config, console=QUIET)
    manifest = prepare(
        PrepareConfig(
            input=str(tmp_path / "made"), output=str(tmp_path / "prepared"),
            tokenizer=str(config.tokenizer), validation_fraction=0.0, num_workers=1,
        ),
        console=QUIET,
    )  # fmt: skip
    split = PreparedSplit(tmp_path / "prepared", "train", name="x", vocab_size=10**5)
    lengths = np.array(split.lengths(np.arange(split.num_documents)))
    # What preparing counts is what was asked for: every length is exact.
    assert manifest["tokens"] == lengths.sum() == total
    assert 40_000 <= total < 42_000
    assert lengths.min() >= 100
    assert lengths.max() <= 2000
    assert lengths[lengths < 400].sum() / total == pytest.approx(0.25, abs=0.05)
    assert split.histogram is not None
    assert sum(row["tokens"] for row in split.histogram) == total


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same(tmp_path: Path) -> None:
    for workers in (1, 2):
        generate(settings(tmp_path / str(workers), num_workers=workers), console=QUIET)
    one, two = ((tmp_path / name / "documents.jsonl.zst").read_bytes() for name in "12")
    assert one == two
    generate(settings(tmp_path / "other", seed=1), console=QUIET)
    assert not set(documents_of(tmp_path / "other")) & set(documents_of(tmp_path / "1"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"haystack": "hay"}, "haystack=hay must be text or words"),
        ({"haystack": "text"}, "tokenizer: give a tokenizer.json"),
        ({"haystack": "text", "tokenizer": "nowhere"}, "tokenizer=nowhere: .*does not exist"),
        ({"lengths": [[5, 100, 1]]}, r"lengths=\[\[5, 100, 1\]\]: each must be"),
        ({"lengths": [[100, 50, 1]]}, "16 <= least <= most"),
        ({"lengths": [100]}, "each must be"),
        ({"lengths": []}, "lengths is empty"),
        ({"kinds": ["poem"]}, r"kinds=\['poem'\]: give one or more of needle, multi_value"),
        ({"kinds": []}, r"kinds=\[\]: give one or more"),
        ({"tokens": 0}, "tokens=0 must be"),
        ({"num_keys": 1}, "num_keys=1 must be 8 or more"),
        ({"num_workers": -1}, "num_workers=-1 must be"),
    ],
)
def test_wrong_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(settings(tmp_path / "out", **changes), console=QUIET)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        generate(settings(tmp_path), console=QUIET)
