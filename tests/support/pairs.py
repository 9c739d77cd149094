"""The smallest runs on pairs: some answers about pictures, some about text alone."""

from pathlib import Path

from fulmen.data.config import SourceConfig
from fulmen.trainer.config import RunConfig
from support.pictures import encoded, picture, prepare, write_jsonl
from support.seeing import tiny_vision
from support.tiny import tiny_config


def prepare_pairs(folder: Path) -> Path:
    """`folder` with two sources: 70 `pairs` with 0 to 2 pictures, and a `chat` of 60 texts.

    A fifth of each is held out.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True)
    pairs, chat = [], []
    for number in range(70):
        names = [f"{number}-{place}.png" for place in range(number % 3)]
        for place, name in enumerate(names):
            size = 20 + number * 7 % 40, 20 + (number + place) * 13 % 40
            (raw / name).write_bytes(encoded(picture(*size, seed=10 * number + place)))
        question = f"what is {number} " + "<image>" * len(names)
        chosen = f"it is {number}, no more and no less"[: 12 + number % 20]
        pairs.append(
            {
                "prompt": question,
                "chosen": chosen,
                "rejected": f"{number * 37 % 60} or so",
                "images": names,
            }
        )
        turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": chosen}]
        chat.append({"messages": turns})
    (raw / "chat").mkdir()
    write_jsonl(raw / "x.jsonl", pairs)
    write_jsonl(raw / "chat" / "x.jsonl", chat[:60])
    prepare(str(raw / "x.jsonl"), folder / "pairs", validation_fraction=0.2, max_tokens=192)
    prepare(
        str(raw / "chat"),
        folder / "chat",
        validation_fraction=0.2,
        max_tokens=192,
        tokenizer=str(folder / "pairs"),
    )
    return folder


def preference_config(folder: Path, *, max_steps: int = 4) -> RunConfig:
    """DPO on `pairs`: two micro-batches of two rows a step."""
    config = tiny_config(folder / "pairs", max_steps=max_steps)
    config.objective = "preference"
    config.data.sources = {
        "pairs": SourceConfig(str(folder / "pairs")),
        "chat": SourceConfig(str(folder / "chat"), 0.0),
    }
    config.data.seq_len, config.data.global_batch_tokens = 192, 768
    config.trainer.micro_batch_tokens = 384
    config.evaluation.every_steps, config.evaluation.max_tokens = 2, 1200
    config.checkpoint.every_steps = 2
    config.model.vision = tiny_vision(folder / "pairs")
    return config
