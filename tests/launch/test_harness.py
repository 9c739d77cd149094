"""The adapter for lm-evaluation-harness: numbers against one pass, and the package where it is."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.tiny import tiny_config, tiny_model
from support.worlds import run_world
from torch import Tensor

from fulmen.data.tokenise import load_tokenizer
from fulmen.launch.harness import HarnessConfig, evaluate
from fulmen.models.config import MoEConfig
from fulmen.models.init import init_model
from fulmen.models.text import TextModel
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.harness import harness_model
from fulmen.trainer.likelihood import TextScorer
from fulmen.trainer.prefill import Reader
from fulmen.trainer.run import run

END_ID = 0
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def scorer(tiny_data: Path) -> TextScorer:
    config = tiny_model()
    model = TextModel(config, MoEConfig())
    init_model(model, config, seed=2)
    model.requires_grad_(False).eval()
    reader = Reader(model, chunk_tokens=5)
    return TextScorer(reader, load_tokenizer(str(tiny_data / "tokenizer.json")), end_id=END_ID)


def log_probabilities(scorer: TextScorer, ids: list[int]) -> Tensor:
    return torch.log_softmax(scorer.reader.model(torch.tensor([ids]))[0].double(), -1)


@pytest.mark.parametrize("context", ["abc def ", "abc def", "", "  "])
def test_loglikelihood(scorer: TextScorer, context: str) -> None:
    continuation = " gh ab" if context == "abc def" else "gh ab"
    found, is_greedy = scorer.loglikelihood(context, continuation)
    before = scorer.encode(context.rstrip())
    whole = scorer.encode(context + continuation)
    ids = whole if before else [END_ID, *whole]
    rows = log_probabilities(scorer, ids[:-1])
    first = len(before) or 1
    wanted = sum(rows[place - 1, ids[place]] for place in range(first, len(ids)))
    assert found == pytest.approx(float(wanted), rel=1e-5)
    best = rows[first - 1 :].argmax(-1).tolist()
    assert is_greedy == (best == ids[first:])


def test_greedy_is_told(scorer: TextScorer) -> None:
    for text in ("abc", "de fgh", "ba"):
        made = scorer.generate_until(text, [], max_new_tokens=3)
        if scorer.encode(text + made)[: len(scorer.encode(text))] == scorer.encode(text):
            total, is_greedy = scorer.loglikelihood(text, made)
            assert total < 0
            assert is_greedy == (len(scorer.encode(text + made)) == len(scorer.encode(text)) + 3)


def test_answers_of_one_token_share_a_pass(scorer: TextScorer) -> None:
    read, count = scorer.reader.read, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return read(*args, **options)

    choices = [text for text in [" a", " b", " c", " d"] if _adds_one_token(scorer, "gh", text)]
    assert len(choices) >= 2
    apart = []
    for choice in choices:
        scorer.loglikelihood("other", " ab")
        apart.append(scorer.loglikelihood("gh", choice))
    with mock.patch.object(scorer.reader, "read", counted):
        assert [scorer.loglikelihood("gh", choice) for choice in choices[::-1]] == apart[::-1]
    assert count == 0  # the last one before was of the same context
    assert len(set(apart)) == len(choices)


def _adds_one_token(scorer: TextScorer, context: str, text: str) -> bool:
    before, whole = scorer.encode(context), scorer.encode(context + text)
    return len(whole) == len(before) + 1 and whole[: len(before)] == before


def test_nothing_is_certain(scorer: TextScorer) -> None:
    assert scorer.loglikelihood("abc def", "") == (0.0, True)


def test_rolling(scorer: TextScorer) -> None:
    text = "abc def gh ab " * 5
    ids = [END_ID, *scorer.encode(text)]
    rows = log_probabilities(scorer, ids[:-1])
    wanted = sum(rows[place, token] for place, token in enumerate(ids[1:]))
    assert scorer.rolling(text) == pytest.approx(float(wanted), rel=1e-5)
    assert scorer.rolling("") == 0.0


def test_generation_stops(scorer: TextScorer) -> None:
    whole = scorer.generate_until("abc de", [], max_new_tokens=12)
    assert len(whole) > 4
    stop = whole[3:5]
    cut = scorer.generate_until("abc de", ["never", stop], max_new_tokens=12)
    assert cut == whole[: whole.find(stop)]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    """`lm_eval.api.model` with the parts of `LM` that the adapter relies on."""
    kept: list[tuple[str, Any, Any]] = []

    class LM:
        def __init__(self) -> None:
            self.cache_hook = SimpleNamespace(add_partial=lambda *args: kept.append(args))

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]
    return kept


def test_the_adapter_answers_in_order(
    scorer: TextScorer, stand_in: list[tuple[str, Any, Any]]
) -> None:
    model = harness_model(scorer)
    pairs = [("abc", " de"), ("", "gh"), ("abc", " ab")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    assert model.loglikelihood(requests) == [scorer.loglikelihood(*pair) for pair in pairs]
    texts = [SimpleNamespace(args=(text,)) for text in ("abc de", "gh")]
    assert model.loglikelihood_rolling(texts) == [scorer.rolling("abc de"), scorer.rolling("gh")]
    asked = [SimpleNamespace(args=("abc", {"until": "zz", "max_gen_toks": 4}))]
    assert model.generate_until(asked) == [scorer.generate_until("abc", ["zz"], max_new_tokens=4)]
    assert [kind for kind, *_ in stand_in].count("loglikelihood") == 3
    sampled = [SimpleNamespace(args=("abc", {"do_sample": True, "temperature": 0.7}))]
    with pytest.raises(ValueError, match="sampling"):
        model.generate_until(sampled)


def test_a_missing_package_is_named(scorer: TextScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match="pip install lm_eval"):
        harness_model(scorer)


def train(device: torch.device, config: RunConfig) -> Path:
    return run(config, build_mesh(config.parallel, device), "tiny")


TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.fast
def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} is not a whole checkpoint"):
        evaluate(HarnessConfig(checkpoint=str(tmp_path), tasks=["letters"], output="x"))


@pytest.mark.skipif(not HAS_HARNESS, reason="lm_eval is not installed: pip install lm_eval")
def test_the_harness_runs_on_a_run(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_data, max_steps=1)
    config.run_root, config.run_id = str(tmp_path), "trained"
    (folder,) = run_world(train, 1, config)
    questions = [{"question": "abc", "choices": [" de", " fg"], "answer": n % 2} for n in range(6)]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK.format(data=data))
    evaluate(
        HarnessConfig(run=str(folder), tasks=["letters"], include_path=str(tmp_path / "tasks"))
    )
    results = json.loads((folder / "evaluation" / "step_1" / "harness.json").read_text())
    assert results["results"]["letters"]["acc,none"] == 0.5  # it prefers one of two each time
    assert "letters" in capsys.readouterr().out
