"""Our models for the lm-evaluation-harness (package lm_eval, an extra)."""

from collections.abc import Callable
from typing import Any, TypeVar

from tqdm import tqdm

from fulmen.trainer.likelihood import TextScorer

INSTALL = "pip install lm_eval"
MAX_NEW_TOKENS = 256
"""Where a task does not say."""
Answer = TypeVar("Answer")


def harness_model(scorer: TextScorer) -> Any:
    """An `lm_eval.api.model.LM` that asks `scorer`; `ValueError` with the line that installs it."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ValueError(f"lm_eval cannot be imported ({error}): {INSTALL}") from None

    class FulmenLM(LM):
        """One request at a time, without truncation: a context may be as long as memory allows."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return answer_all("loglikelihood", requests, scorer.loglikelihood)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return answer_all("loglikelihood_rolling", requests, scorer.rolling)

        def generate_until(self, requests: list[Any]) -> list[str]:
            def generate(context: str, options: dict[str, Any]) -> str:
                if options.get("do_sample") and options.get("temperature"):
                    raise ValueError("a task asks for sampling; fulmen's adapter decodes greedily")
                until = options.get("until") or []
                return scorer.generate_until(
                    context,
                    [until] if isinstance(until, str) else until,
                    max_new_tokens=options.get("max_gen_toks", MAX_NEW_TOKENS),
                )

            return answer_all("generate_until", requests, generate)

    model = FulmenLM()

    def answer_all(kind: str, requests: list[Any], ask: Callable[..., Answer]) -> list[Answer]:
        answers = []
        for request in tqdm(requests, desc=kind, disable=None):
            answers.append(ask(*request.args))
            # Keeps it where the harness was told to keep answers (use_cache).
            model.cache_hook.add_partial(kind, request.args, answers[-1])
        return answers

    return model
