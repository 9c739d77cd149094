"""Learning rate and batch size; the figures are Text-01's published ones."""

import pytest
from support.tiny import compose_config, text01_data

from fulmen.trainer.config import (
    PhaseConfig,
    RampConfig,
    RunConfig,
    ScheduleConfig,
)
from fulmen.trainer.schedule import batch_tokens, learning_rate, total_tokens

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def text01() -> RunConfig:
    return compose_config(["recipe=text01", *text01_data("nowhere")])


@pytest.mark.parametrize(
    ("step", "tokens", "expected"),
    [
        (0, 0, 4.0e-7),  # 2e-4 / 500
        (249, 249 * 16_777_216, 1.0e-4),
        (498, 498 * 16_777_216, 1.996e-4),
        (499, 499 * 16_777_216, 2.0e-4),
        (500, 500 * 16_777_216, 2.0e-4),
        (10**5, 7_200_000_000_000 - 1, 2.0e-4),
        (10**5, 7_200_000_000_000, 1.3e-4),
        (10**5, 10_400_000_000_000 - 1, 1.3e-4),
        (10**5, 10_400_000_000_000, 1.3e-4),
        (10**5, 10_650_000_000_000, 9.01026e-5),  # 1.3e-4^(3/4) * 3e-5^(1/4)
        (10**5, 10_900_000_000_000, 6.24500e-5),  # the geometric mean
        (10**5, 11_400_000_000_000 - 1, 3.0e-5),
        (10**5, 11_400_000_000_000, 3.0e-5),
        (10**5, 20_000_000_000_000, 3.0e-5),
    ],
)
def test_text01_learning_rate(text01: RunConfig, step: int, tokens: int, expected: float) -> None:
    rate = learning_rate(text01.optim.lr, text01.schedule, step=step, tokens=tokens)
    assert rate == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "mebitokens"),
    [
        (0, 16),
        (69_000_000_000 - 1, 16),
        (69_000_000_000, 32),
        (790_000_000_000 - 1, 32),
        (790_000_000_000, 64),
        (4_700_000_000_000 - 1, 64),
        (4_700_000_000_000, 128),
        (11_399_999_999_999, 128),
    ],
)
def test_text01_batch_ramp(text01: RunConfig, tokens: int, mebitokens: int) -> None:
    assert batch_tokens(text01, tokens) == mebitokens * 2**20


def test_text01_ends_after_its_published_tokens(text01: RunConfig) -> None:
    assert total_tokens(text01) == 11_400_000_000_000
    text01.trainer.max_tokens = 5
    assert total_tokens(text01) == 5


def test_warm_up_multiplies_whatever_phase_it_falls_into() -> None:
    schedule = ScheduleConfig(
        warmup_steps=10,
        phases=[PhaseConfig(tokens=100, lr_factor=0.5), PhaseConfig(tokens=100, lr_factor=0.2)],
    )
    assert learning_rate(1.0, schedule, step=4, tokens=0) == pytest.approx(0.25)
    assert learning_rate(1.0, schedule, step=4, tokens=150) == pytest.approx(0.1)
    assert learning_rate(1.0, schedule, step=9, tokens=0) == pytest.approx(0.5)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    schedule = ScheduleConfig(phases=[PhaseConfig(tokens=100, lr_factor=1.0)])
    assert learning_rate(3.0, schedule, step=0, tokens=0) == 3.0


def test_an_exponential_phase_falls_by_an_equal_ratio_per_token() -> None:
    schedule = ScheduleConfig(
        phases=[
            PhaseConfig(tokens=100, lr_factor=1.0),
            PhaseConfig(tokens=40, lr_factor=0.0625, decay="exponential"),
            PhaseConfig(tokens=10, lr_factor=0.03125, decay="exponential"),
        ]
    )
    rates = [learning_rate(1.0, schedule, step=9, tokens=t) for t in range(100, 141, 10)]
    assert rates == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.0625])
    assert learning_rate(1.0, schedule, step=9, tokens=145) == pytest.approx(0.0625 / 2**0.5)
    assert learning_rate(1.0, schedule, step=9, tokens=10**9) == pytest.approx(0.03125)


def test_a_ramp_may_also_shrink_the_batch() -> None:
    config = RunConfig()
    config.data.global_batch_tokens = 64
    config.schedule.batch_ramp = [RampConfig(10, 32), RampConfig(20, 128)]
    assert [batch_tokens(config, tokens) for tokens in (0, 9, 10, 19, 20)] == [64, 64, 32, 32, 128]
