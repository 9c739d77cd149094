"""What a benchmark starts ends with it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

# Only while it is imported, as in test_kernel_cases.py.
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import children  # noqa: E402

sys.path.remove(str(BENCHMARKS))

# As torchrun has its ranks; what ignores a signal hands that down.
STUBBORN = ["sh", "-c", "trap '' TERM; setsid sleep 60 & echo rank $!; wait"]


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PATIENCE_S", 0.2)


def has_ended(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_nothing_is_left_beyond_the_time_limit() -> None:
    status, said = children.run_child(STUBBORN, limit_s=1)
    assert status is None
    assert has_ended(int(said.split()[1]))


def test_nothing_is_left_at_sigterm(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    children.end_at_sigterm()
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    try:
        with pytest.raises(SystemExit) as end:
            children.run_child(STUBBORN)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + signal.SIGTERM
    assert has_ended(int(capsys.readouterr().err.split()[1]))


def test_status_and_words() -> None:
    script = "import sys; print('out'); sys.stdout.flush(); sys.exit('err')"
    assert children.run_child([sys.executable, "-c", script]) == (1, "out\nerr\n")
