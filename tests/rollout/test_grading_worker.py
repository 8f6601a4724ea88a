"""The forked child and its end, and the messages, without a pool."""

import faulthandler
import os
import signal
import threading
import time

import pytest

from nemo_ssopd.rollout.answers import equality_task
from nemo_ssopd.rollout.grading_worker import KILLED, Child, read_message, write_message


def _hostile_equality(answer: str, gold: str) -> bool:
    """Stands for math-verify: the answer says how to misbehave."""
    while answer == "hang":
        pass
    if answer == "uninterruptible":
        return 9 ** (9**9) == 0  # one C call: a Python signal handler would wait for its end
    faulthandler.disable()  # pytest's report of a segfault would look like a failure
    if answer in ("SIGSEGV", "SIGABRT", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, answer))
    if answer == "exit":
        os._exit(0)
    if answer == "memory":
        raise MemoryError
    if answer == "recursion":
        return _hostile_equality(answer, gold)
    return answer == gold


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("answer", "reason", "lives"),
    [
        ("42", "correct", True),
        ("41", "wrong", True),
        ("recursion", "wrong", True),
        ("hang", "timeout", False),
        ("uninterruptible", "timeout", False),
        ("SIGSEGV", "crash", False),
        ("SIGABRT", "crash", False),
        ("SIGKILL", KILLED, False),
        ("exit", "crash", False),
        ("memory", "memory", False),
    ],
)
def test_child_names_its_end(answer: str, reason: str, lives: bool) -> None:
    child = Child(equality_task(_hostile_equality), cpu_s=0.2)
    started = time.monotonic()
    assert child.ask({"answer": answer, "gold": "42"}) == ({"reason": reason}, lives)
    assert time.monotonic() - started < 10.0
    if lives:
        assert child.ask({"answer": "\ud800\x00", "gold": "\ud800\x00"}) == ({"reason": "correct"}, True)
        child.close()


def test_messages_of_any_text_and_of_megabytes_arrive_whole() -> None:
    sent = {"text": '\ud800\x00\n"' + "x" * 3_000_000, "row": {"nested": [1, None, 0.5]}}
    reading, writing = os.pipe()
    thread = threading.Thread(target=lambda: (write_message(writing, sent), os.close(writing)))
    thread.start()
    assert read_message(reading) == sent
    assert read_message(reading) is None
    thread.join()
    os.close(reading)
