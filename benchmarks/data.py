"""Time the data room: tokenising against the tokenizer's own encode_batch, and the loader.

python benchmarks/data.py [--megabytes 200] [--repeats 3]

The text is the Python source code of this machine, in documents of about 3 KB. Tokenising is
timed as the whole command, from its start to its end; encode_batch is timed alone, with the texts
in memory and the tokenizer loaded, on the same cores. Both take turns, and the best of each
counts. The processor seconds of each are printed too: they hold on a machine with other work.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT_CHARACTERS = 3000
SEQ_LEN, MICRO_BATCH_TOKENS, BATCH_TOKENS = 8192, 16384, 2**20

ENCODE_BATCH = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
for start in range(0, len(texts), 1000):
    batch = tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)
    tokens += sum(map(len, batch))
print(tokens, time.perf_counter() - wall, time.process_time() - cpu)
"""


def write_corpus(path: Path, megabytes: float) -> None:
    """Python files, the standard library first, cut into documents, up to a size."""
    folders = dict.fromkeys(sysconfig.get_paths()[key] for key in ("stdlib", "purelib"))
    left = megabytes * 1e6
    with open(path, "w", encoding="utf-8") as file:
        for source in (file for folder in folders for file in sorted(Path(folder).rglob("*.py"))):
            try:
                text = source.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            for start in range(0, len(text), DOCUMENT_CHARACTERS):
                document = text[start : start + DOCUMENT_CHARACTERS]
                left -= file.write(json.dumps({"text": document}) + "\n")
            if left <= 0:
                return


def prepare(corpus: Path, output: Path, *overrides: str) -> tuple[float, float]:
    """Wall and processor seconds of a whole run of launch/prepare_data.py."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "launch" / "prepare_data.py", f"input={corpus}",
         f"output={output}", *overrides],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def time_tokenising(folder: Path, megabytes: float, repeats: int) -> Path:
    """Print both rates and their ratio; returns the folder that was prepared last."""
    corpus, first = folder / "corpus.jsonl", folder / "first"
    write_corpus(corpus, megabytes)
    prepare(corpus, first, "tokenizer=train", "vocab_size=32000", "train_sample_mb=10")
    output = first
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    for number in range(repeats):
        output = folder / f"run{number}"
        ours.append(prepare(corpus, output, f"tokenizer={first}"))
        done = subprocess.run(
            [sys.executable, "-c", ENCODE_BATCH, first / "tokenizer.json", corpus],
            check=True, capture_output=True, text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "true"},
        )  # fmt: skip
        tokens, wall, cpu = map(float, done.stdout.split())
        theirs.append((wall, cpu))
    megabytes = corpus.stat().st_size / 1e6
    print(f"tokenising {megabytes:.0f} MB, {tokens / 1e6:.1f} M tokens, best of {repeats}")
    print(f"  cores: {len(os.sched_getaffinity(0))}, load {os.getloadavg()[0]:.1f} at the end")
    rates = []
    for name, timed in (("prepare_data (whole command)", ours), ("encode_batch alone", theirs)):
        wall, cpu = (min(column) for column in zip(*timed, strict=True))
        rates.append(tokens / wall)
        rate = f"{tokens / wall / 1e6:6.2f} M tokens/s"
        print(f"  {name:30} {rate}   {wall:6.1f} s   {cpu:6.1f} processor s")
    print(f"  ratio of the rates {rates[0] / rates[1]:.3f}")
    return output


def time_loader(prepared: Path, seconds: float) -> None:
    """Print what one loader gives in this process alone, planning and reading."""
    import torch

    from fulmen.data.config import SourceConfig
    from fulmen.data.loader import PackedLoader
    from fulmen.data.mixture import Shares
    from fulmen.data.shards import read_manifest

    torch.set_num_threads(1)
    manifest = read_manifest(prepared)
    loader = PackedLoader(
        {"code": SourceConfig(str(prepared))},
        seq_len=SEQ_LEN,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        batch_tokens=lambda tokens: BATCH_TOKENS,
        shares=lambda tokens: Shares({"code": 1.0}, None),
        seed=0,
        vocab_size=manifest["vocab_size"],
        prefetch_steps=0,
    )
    for _ in range(manifest["tokens"] // BATCH_TOKENS + 1):
        next(loader)  # one epoch, so that the shards are in memory
    steps = tokens = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        tokens += next(loader).num_tokens
        steps += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    average = manifest["tokens"] / manifest["documents"]
    padding = 1 - tokens / (steps * BATCH_TOKENS)
    print(f"loader, rows of {SEQ_LEN}, documents of {average:.0f} tokens on average, one core")
    print(f"  {tokens / wall / 1e6:.1f} M tokens/s by the clock")
    print(f"  {tokens / cpu / 1e6:.1f} M tokens a processor second; {padding:.2%} padding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200.0, help="size of the corpus")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the best counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = time_tokenising(Path(folder), arguments.megabytes, arguments.repeats)
        time_loader(prepared, seconds=5.0)


if __name__ == "__main__":
    main()
