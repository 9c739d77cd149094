"""Preparing: every kind of file, malformed lines by name, and runs that were interrupted."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from fulmen.data import prepare as prepare_module
from fulmen.data.config import PrepareConfig
from fulmen.data.prepare import prepare
from fulmen.data.shards import PreparedSplit
from fulmen.data.tokenise import EncodedChunk, load_tokenizer

TEXTS = [f"document {number}: the quick brown fox" + " jumps" * number for number in range(40)]
ODD_TEXTS = [
    "h\u00e9llo \u2028 w\u00f6rld\x85 \U0001f600",
    "a\rb\r\nc\n\n",
    " \t",
    "<end_of_document>",
]


def run(path: Path, output: Path, tokenizer: Path | str, **options: Any) -> dict[str, Any]:
    settings = {"validation_fraction": 0.0, "num_workers": 1} | options
    config = PrepareConfig(
        input=str(path), output=str(output), tokenizer=str(tokenizer), **settings
    )
    return prepare(config, console=Console(file=io.StringIO(), width=200))


def texts_of(output: Path, split: str = "train") -> list[str]:
    opened = PreparedSplit(output, split, name="x", vocab_size=2**20)
    tokenizer = load_tokenizer(str(output / "tokenizer.json"))
    end = json.loads((output / "manifest.json").read_text())["end_of_document"]["id"]
    texts = []
    for number in range(opened.num_documents):
        ids = opened.document(number).tolist()
        assert ids[-1] == end
        assert end not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return texts


def rejected_of(output: Path) -> list[tuple[str, int, str]]:
    lines = (output / "rejected.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(Path(one["file"]).name, one["line"], one["reason"]) for one in records]


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path: Path, texts: list[str]) -> None:
    """The texts in the format that the file's name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(as_jsonl(texts[:9])) + gzip.compress(as_jsonl(texts[9:])))
    elif path.suffix == ".zst":
        frames = [zstandard.compress(as_jsonl(part)) for part in (texts[:9], texts[9:])]
        path.write_bytes(b"".join(frames))
    else:
        path.write_bytes(as_jsonl(texts))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "odd [1] name.parquet"])
def test_round_trip(tmp_path: Path, tokenizer_file: Path, name: str) -> None:
    write(tmp_path / name, TEXTS + ODD_TEXTS)
    manifest = run(tmp_path / name, tmp_path / "out", tokenizer_file)
    assert texts_of(tmp_path / "out") == TEXTS + ODD_TEXTS
    assert manifest["documents"] == len(TEXTS + ODD_TEXTS)
    assert manifest["rejected"] == manifest["empty"] == 0
    assert manifest["dtype"] == "uint16"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "rejected.jsonl",
        "tokenizer.json",
        "train-00000.bin",
        "train-00000.idx",
    ]


def test_lengths_are_measured_and_printed(tmp_path: Path, tokenizer_file: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    printed = io.StringIO()
    config = PrepareConfig(
        input=str(tmp_path / "a.jsonl"), output=str(tmp_path / "out"), num_workers=1,
        tokenizer=str(tokenizer_file), validation_fraction=0.4, shard_tokens=200,
    )  # fmt: skip
    manifest = prepare(config, console=Console(file=printed, width=200))
    for name, entry in manifest["splits"].items():
        split = PreparedSplit(tmp_path / "out", name, name="x", vocab_size=2**20)
        assert split.histogram == entry["lengths"]
        assert sum(row["documents"] for row in entry["lengths"]) == split.num_documents > 1
        assert sum(row["tokens"] for row in entry["lengths"]) == split.num_tokens
        lengths = split.lengths(np.arange(split.num_documents))
        for row in entry["lengths"]:
            held = [one for one in lengths if row["from"] <= one < 2 * row["from"]]
            assert [row["documents"], row["tokens"]] == [len(held), sum(held)]
            line = f"{row['from']:,} to {2 * row['from'] - 1:>10,} tokens: "
            assert f"{line}{row['documents']:>12,} documents" in printed.getvalue()


def test_text_files_and_lines(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = tmp_path / "text"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_bytes(b"\xef\xbb\xbffirst\nline two\r\n\nend")
    (folder / "sub" / "b.py").write_text("print()\n")
    (folder / "c.bin").write_text("left out: another ending")
    (folder / ".hidden.md").write_text("left out: hidden")
    (folder / "d.txt").write_text("")
    run(folder, tmp_path / "files", tokenizer_file)
    assert texts_of(tmp_path / "files") == ["first\nline two\r\n\nend", "print()\n"]
    manifest = run(folder, tmp_path / "lines", tokenizer_file, document_per="line")
    assert texts_of(tmp_path / "lines") == ["first", "line two", "end", "print()"]
    assert manifest["empty"] == 1
    run(folder / "*.bin", tmp_path / "glob", tokenizer_file)
    assert texts_of(tmp_path / "glob") == ["left out: another ending"]


def test_mixed_kinds_in_path_order(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "b.jsonl", ["two", "three"])
    write(folder / "d.parquet", ["five"])
    for name, text in (("a.txt", "one"), ("c.txt", "four"), ("e.txt", "six")):
        (folder / name).write_text(text)
    run(folder, tmp_path / "out", tokenizer_file)
    assert texts_of(tmp_path / "out") == ["one", "two", "three", "four", "five", "six"]


def test_malformed_lines_are_named(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [
        b'{"text": "good one"}',
        b'{"text": "cut of',
        b"",
        b'{"text": "bad \xff byte"}',
        b'{"txt": "no field"}',
        b'{"text": 5}',
        b'["a list"]',
        b'{"text": "half a pair \\ud800"}',
        b"[" * 100_000,
        b'{"text": "good two"}',
        b'{"text": null}',
    ]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.txt").write_bytes(b"line 1\nline 2\nbad \xfe here")
    pq.write_table(pa.table({"text": ["good three", None]}), folder / "c.parquet")
    manifest = run(folder, tmp_path / "out", tokenizer_file, max_rejected_fraction=0.8)
    assert texts_of(tmp_path / "out") == ["good one", "good two", "good three"]
    rejected = rejected_of(tmp_path / "out")
    places = [(file, line) for file, line, _ in rejected]
    assert places == [("a.jsonl", line) for line in (2, 4, 5, 6, 7, 8, 9, 11)] + [
        ("b.txt", 3),
        ("c.parquet", 2),
    ]
    wanted = ["bad JSON", "UTF-8", "no field 'text'", "is int", "JSON list", "surrogate"]
    wanted += ["bad JSON", "is NoneType", "UTF-8", "is null"]
    for (_, _, reason), part in zip(rejected, wanted, strict=True):
        assert part in reason
    assert (manifest["documents"], manifest["rejected"], manifest["empty"]) == (3, 10, 1)
    with pytest.raises(ValueError, match=r"10 of 13 .* max_rejected_fraction=0.5: see .*rejected"):
        run(folder, tmp_path / "strict", tokenizer_file)
    assert not (tmp_path / "strict" / "manifest.json").exists()
    run(folder, tmp_path / "strict", tokenizer_file, max_rejected_fraction=0.8)
    assert texts_of(tmp_path / "strict") == texts_of(tmp_path / "out")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, tokenizer_file: Path, name: str) -> None:
    write(tmp_path / name, TEXTS * 50)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:40] + b"\0" * 40 + data[80:-20])
    with pytest.raises(ValueError, match=f"{name} is (damaged|not a readable)"):
        run(tmp_path / name, tmp_path / "out", tokenizer_file)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_ends_early_is_named(tmp_path: Path, tokenizer_file: Path, name: str) -> None:
    write(tmp_path / name, TEXTS * 50)
    data = (tmp_path / name).read_bytes()
    for end in (len(data) - 1, len(data) // 2, data.index(data[:4], 1) + 3):
        (tmp_path / name).write_bytes(data[:end])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            run(tmp_path / name, tmp_path / f"out_{end}", tokenizer_file)


def test_parquet_without_rows_and_with_bytes_that_are_no_text(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    schema = pa.schema([("text", pa.string())])
    pq.write_table(schema.empty_table(), folder / "a.parquet")
    with pq.ParquetWriter(folder / "b.parquet", schema) as writer:
        writer.write_table(schema.empty_table())
        values = pa.array([b"good one", b"bad \xff byte", None, b"good two"])
        writer.write_table(pa.table({"text": values.view(pa.string())}))
    run(folder, tmp_path / "out", tokenizer_file, max_rejected_fraction=0.8)
    assert texts_of(tmp_path / "out") == ["good one", "good two"]
    rejected = rejected_of(tmp_path / "out")
    assert [(file, row) for file, row, _ in rejected] == [("b.parquet", 2), ("b.parquet", 3)]
    assert "invalid UTF-8 at byte 4" in rejected[0][2]


def test_a_tokenizer_is_trained_on_words_without_end(tmp_path: Path) -> None:
    """In seconds: whole, a word of a million letters takes the square of that."""
    write(tmp_path / "a.jsonl", ["x" * 1_000_000, *TEXTS])
    run(tmp_path / "a.jsonl", tmp_path / "out", "train", vocab_size=280)
    assert texts_of(tmp_path / "out") == ["x" * 1_000_000, *TEXTS]


def test_trained_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS + ODD_TEXTS)
    files = []
    for name in ("one", "two"):
        manifest = run(tmp_path / "a.jsonl", tmp_path / name, "train", vocab_size=280)
        files.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert files[0] == files[1]
    assert manifest["vocab_size"] == 280
    assert manifest["end_of_document"] == {"token": "<end_of_document>", "id": 0}
    assert texts_of(tmp_path / "one") == TEXTS + ODD_TEXTS
    # The folder can be given as the tokenizer of another source.
    run(tmp_path / "a.jsonl", tmp_path / "three", tmp_path / "one")
    assert (tmp_path / "three" / "tokenizer.json").read_bytes() == files[0]


def test_the_tokenizer_is_trained_on_a_part_of_each_file(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.jsonl", [f"{name}{number} " * 100 for number in range(4000)])
    files = prepare_module.list_input(
        [str(tmp_path)], suffixes=[".jsonl"], document_per="file", output=tmp_path / "x"
    )
    config = PrepareConfig(train_sample_mb=0.4)
    texts = list(prepare_module._sample_texts(config, files))
    assert {text[0] for text in texts} == set("abcd")
    assert 400_000 <= sum(map(len, texts)) < 402_000 < sum(file.size_bytes for file in files)


def test_validation_split_follows_the_text(tmp_path: Path, tokenizer_file: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS * 2)
    write(tmp_path / "b.jsonl", list(reversed(TEXTS)))
    held = []
    for name in "ab":
        path, output = tmp_path / f"{name}.jsonl", tmp_path / name
        run(path, output, tokenizer_file, validation_fraction=0.3)
        train, valid = texts_of(output), texts_of(output, "valid")
        assert not set(train) & set(valid)
        assert sorted(set(train + valid)) == sorted(TEXTS)
        held.append(set(valid))
    assert held[0] == held[1]
    assert 4 <= len(held[0]) <= 20


def test_wide_ids(tmp_path: Path, tokenizer_file: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(str(tokenizer_file))
    before = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(f"<extra {n}>") for n in range(2**16)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "a.jsonl", TEXTS)
    manifest = run(tmp_path / "a.jsonl", tmp_path / "out", tmp_path)
    assert manifest["dtype"] == "uint32"
    assert manifest["vocab_size"] == before + 2**16
    assert texts_of(tmp_path / "out") == TEXTS


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "text"])
def test_interrupted_anywhere_the_bytes_are_the_same(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    texts = [f"{number}: {text}" for number in range(30) for text in TEXTS]
    if name == "text":
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts[:300]):
            (tmp_path / name / f"{number:03d}.txt").write_text(text)
    else:
        write(tmp_path / name, texts)
    monkeypatch.setattr("fulmen.data.reading.CHUNK_BYTES", 4000)
    monkeypatch.setattr("fulmen.data.reading._PARQUET_ROWS", 50)
    options: dict[str, Any] = {"shard_tokens": 1500, "validation_fraction": 0.2}
    run(tmp_path / name, tmp_path / "whole", tokenizer_file, **options)
    whole = contents(tmp_path / "whole")
    assert len([file for file in whole if file.endswith(".bin")]) >= 8

    real = prepare_module.encode_chunks
    for stop_after in (0, 1, 3, 2, 5):
        with monkeypatch.context() as patch:

            def stopping(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, EncodedChunk]]:
                for number, result in enumerate(real(*args, **kwargs)):
                    if number == stop_after:  # noqa: B023
                        raise KeyboardInterrupt
                    yield result

            patch.setattr(prepare_module, "encode_chunks", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / name, tmp_path / "cut", tokenizer_file, **options)
        assert not (tmp_path / "cut" / "manifest.json").exists()
        # Chunks of another size, and a torn file, change nothing.
        monkeypatch.setattr("fulmen.data.reading.CHUNK_BYTES", 1000 * (stop_after + 1))
        (tmp_path / "cut" / ".progress" / "train-00001.bin.tmp").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"begun with other settings: shard_tokens \(1500 there"):
        run(tmp_path / name, tmp_path / "cut", tokenizer_file, **(options | {"shard_tokens": 9}))
    kept = sorted((tmp_path / "cut" / ".progress").glob("shard-*.json"))
    assert kept
    before = (tmp_path / "cut" / "train-00000.bin").stat().st_ino
    run(tmp_path / name, tmp_path / "cut", tokenizer_file, **options)
    assert contents(tmp_path / "cut") == whole
    assert (tmp_path / "cut" / "train-00000.bin").stat().st_ino == before, "kept, not redone"


def test_finished_output(tmp_path: Path, tokenizer_file: Path) -> None:
    source = tmp_path / "a.jsonl"
    write(source, TEXTS)
    run(source, tmp_path / "out", tokenizer_file)
    (tmp_path / "out" / ".progress").mkdir()  # killed between the manifest and the tidying
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")}
    run(source, tmp_path / "out", tokenizer_file, num_workers=2, max_rejected_fraction=0.1)
    assert not (tmp_path / "out" / ".progress").exists()
    message = r"other settings: validation_fraction \(0.0 there, 0.5 now\): choose another output"
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", tokenizer_file, validation_fraction=0.5)
    write(source, TEXTS[1:])
    with pytest.raises(ValueError, match=r"other settings: input_bytes"):
        run(source, tmp_path / "out", tokenizer_file)
    write(source, TEXTS)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00000.bin is missing or has another size"):
        run(source, tmp_path / "out", tokenizer_file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "nowhere/*.txt"}, r"input=nowhere/\*.txt: no file found"),
        ({"input": ""}, "input is empty"),
        ({"tokenizer": "nowhere"}, r"tokenizer=nowhere: nowhere does not exist: .*tokenizer=train"),
        ({"end_of_document": "</s>"}, r"no token end_of_document=</s>: .*are <end_of_document>"),
        ({"document_per": "page"}, "document_per=page must be file or line"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be"),
        ({"max_rejected_fraction": 2.0}, "max_rejected_fraction=2.0 must be"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be"),
        ({"num_workers": -1}, "num_workers=-1 must be"),
        ({"tokenizer": "train", "vocab_size": 256}, "vocab_size=256 must be 257"),
        ({"tokenizer": "train", "train_sample_mb": 0.0}, "train_sample_mb=0.0 must be"),
        ({"text_field": "body"}, r"a.parquet has no column text_field=body; it has: text, n"),
        ({"text_field": "n"}, r"a.parquet: column text_field=n is int64, not string"),
        ({"output": "/dev/null/x"}, r"output=/dev/null/x cannot be written"),
    ],
)
def test_wrong_settings(
    tmp_path: Path, tokenizer_file: Path, options: dict[str, Any], message: str
) -> None:
    write(tmp_path / "a.parquet", TEXTS)
    settings: dict[str, Any] = {
        "input": str(tmp_path / "a.parquet"),
        "output": str(tmp_path / "out"),
        "tokenizer": str(tokenizer_file),
        "num_workers": 1,
    }
    with pytest.raises(ValueError, match=message):
        prepare(PrepareConfig(**(settings | options)), console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(tmp_path: Path, tokenizer_file: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_file)
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


def test_nothing_but_empty_documents(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "b").mkdir()
    for name in ("out", "b"):
        with pytest.raises(ValueError, match="no document that is not empty"):
            run(tmp_path / "a.jsonl", tmp_path / name, tokenizer_file)
    assert not (tmp_path / "out").exists()
    assert contents(tmp_path / "b") == {}
    write(tmp_path / "a.jsonl", TEXTS)
    run(tmp_path / "a.jsonl", tmp_path / "b", tokenizer_file)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"bad.json is not a tokenizer.json that can be read"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "bad.json")
    assert not (tmp_path / "out").exists()


def test_several_processes_write_the_same_bytes(tmp_path: Path, tokenizer_file: Path) -> None:
    write(tmp_path / "a.jsonl", [text * 40 for text in TEXTS * 20])
    for name, workers in (("one", 1), ("two", 2)):
        output = tmp_path / name
        run(tmp_path / "a.jsonl", output, tokenizer_file, num_workers=workers, shard_tokens=50_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
