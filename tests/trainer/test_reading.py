"""Questions about held-out images: prompts, greedy answers on any mesh, scores, examples."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.seeing import seeing_config, write_conversations
from support.tiny import tiny_config
from support.worlds import run_world
from torch import Tensor

from fulmen.data.loader import evaluation_batches
from fulmen.data.shards import PreparedSplit
from fulmen.models.config import MoEConfig
from fulmen.models.init import init_model
from fulmen.models.vl import build_model
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import RunConfig, check_config
from fulmen.trainer.inputs import model_inputs
from fulmen.trainer.loop import Trainer
from fulmen.trainer.prefill import Reader
from fulmen.trainer.prompt_images import PromptImages
from fulmen.trainer.reading.config import ReadingConfig
from fulmen.trainer.reading.examples import read_examples
from fulmen.trainer.reading.questions import Question
from fulmen.trainer.reading.sources import held_out_questions, open_splits

TILE = 28


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("conversations"), answer="it is {}")


def ask(images: Path, *, max_documents: int = 100, max_answer_tokens: int = 40) -> list[Question]:
    config = seeing_config(images)
    _, questions = held_out_questions(
        config.data.sources,
        [],
        config.model,
        max_documents=max_documents,
        max_answer_tokens=max_answer_tokens,
    )
    return questions["text"]


def read_last(reader: Reader, question: Question, *, passes: int = 0) -> Tensor:
    """Logits behind a question."""
    prompt = question.make_prompt()
    seen = PromptImages.of(prompt.pictures, tile_size=TILE, rank=reader.rank, ranks=reader.ranks)
    ids = torch.tensor(prompt.ids)
    return reader.read(ids, images=seen, passes=passes)[0][-1]


def test_questions_of_held_out_documents(images: Path) -> None:
    questions = ask(images)
    assert len(questions) > 5
    for question in questions:
        number = int(question.text.split("what is ")[1].split()[0])
        assert question.text == f"what is {number} " + "<image>" * (number % 4)
        assert question.truths == (f"it is {number}",)
        prompt = question.make_prompt()
        assert len(prompt.pictures) == number % 4 > 0
        assert all(prompt.ids[picture.first] == 1 for picture in prompt.pictures)
    assert len(ask(images, max_documents=3)) == 3
    with pytest.raises(ValueError, match="answer of max_answer_tokens=2 or fewer"):
        ask(images, max_answer_tokens=2)


def test_pieces_equal_the_packed_pass(images: Path, one_rank: torch.device) -> None:
    config = seeing_config(images)
    model = build_model(config.model, MoEConfig())
    init_model(model, config.model, seed=1)
    model.requires_grad_(False).eval()
    split = PreparedSplit(images, "valid", name="text", vocab_size=1000)
    mesh = build_mesh(ParallelConfig(), one_rank)
    questions = {tuple(question.make_prompt().ids): question for question in ask(images)}
    compared = 0
    for batch in evaluation_batches(
        split, seq_len=256, micro_batch_tokens=256, max_tokens=10_000, dp_rank=0, dp_size=1
    ):
        inputs = model_inputs(batch, mesh, config.model.vision) | {"labels": None}
        logits = model(**inputs)[0]
        for first, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            document = tuple(batch.input_ids[0, first:end].tolist())
            for ids, question in questions.items():
                if document[: len(ids)] != ids:
                    continue
                wanted = logits[first + len(ids) - 1]
                for chunk_tokens in (7, 1000):
                    got = read_last(Reader(model, chunk_tokens=chunk_tokens), question)
                    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
                compared += 1
    assert compared == len(questions)


def read_on_mesh(
    device: torch.device, config: RunConfig, folder: Path
) -> tuple[dict[str, float], Tensor]:
    """Scores of initial weights, and logits behind each question."""
    folder.mkdir(exist_ok=True)
    mesh = build_mesh(config.parallel, device)
    trainer = Trainer(config, mesh, folder)
    reading = trainer.reading
    assert reading is not None
    scores = reading.scores(step=7)
    # Rows read different questions at a time, in different numbers of pieces.
    trainer.model.eval()
    reader = Reader(trainer.model, chunk_tokens=16, mesh=mesh)
    questions = reading.questions["text"]
    turned = questions[mesh.dp_rank :] + questions[: mesh.dp_rank]
    passes = 1 + max(reader.passes(len(one.make_prompt().ids), num_logits=1) for one in questions)
    logits = torch.stack([read_last(reader, question, passes=passes) for question in turned])
    trainer.close()
    return scores, logits.roll(mesh.dp_rank, 0)


@pytest.mark.slow
def test_equal_on_any_mesh(images: Path, tmp_path: Path, one_rank: torch.device) -> None:
    config = seeing_config(images)
    config.evaluation.reading = ReadingConfig(every_steps=1, max_documents=3, examples=3)
    scores, logits = read_on_mesh(one_rank, config, tmp_path / "one")
    assert scores.keys() == {"reading/text/exact_match", "reading/text/anls"}
    config.parallel = ParallelConfig(cp=2, ep=2, zero_stage=3)
    for found in run_world(read_on_mesh, 4, config, tmp_path / "four"):
        assert found[0] == scores
        torch.testing.assert_close(found[1], logits, rtol=1e-5, atol=1e-5)
    examples = read_examples(tmp_path / "one")
    assert examples == read_examples(tmp_path / "four")
    assert [(row["step"], row["source"]) for row in examples] == [(7, "text")] * 3
    assert len({row["answer"] for row in examples}) > 1
    for row in examples:
        assert row["truths"][0].startswith("it is ")
        assert row["right"] == (row["answer"].strip() in row["truths"])
        for name in row["images"]:
            assert Image.open(tmp_path / "four" / "reading" / name).size[0] >= 20


def test_bad_keys_are_named(images: Path, tiny_data: Path) -> None:
    for changes, message in [
        ({"every_steps": 0}, "evaluation.reading.every_steps=0"),
        ({"sources": ["none"]}, "evaluation.reading.sources=none: data.sources has text"),
        ({"max_documents": 0}, "evaluation.reading.max_documents=0"),
        ({"max_answer_tokens": 0}, "evaluation.reading.max_answer_tokens=0"),
        ({"examples": -1}, "evaluation.reading.examples=-1"),
    ]:
        config = seeing_config(images)
        config.evaluation.reading = ReadingConfig(**changes)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            check_config(config, 1)
    with pytest.raises(ValueError, match=r"no source of data\.sources holds out conversations"):
        open_splits(tiny_config(tiny_data).data.sources, [], 1000)
