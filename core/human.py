"""A person at a terminal as the judge."""
import math
import os
import random
import time

from core.cli import printable
from core.records import InputError, dumps
from core.tokens import question_of


def ask_person(questions, open_log, seconds, seed):
    """Ask on the controlling terminal which of two answers is better, each pair in a random order.

    questions: [(key, prompt, a, b)]. open_log(): a BatchLog with batches of one result,
    [key, prob_ab, prob_ba, seconds taken, order shown]; it is returned. No answer within `seconds`
    counts as 0.5. Raises KeyboardInterrupt when the person leaves; the answers so far are kept.
    Raises InputError without a terminal.
    """
    import select
    import termios
    import tty
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        if not questions:
            return open_log()
        raise InputError("--judge human needs a terminal") from None
    log = open_log()

    def show(text):
        os.write(terminal, text.encode())

    def key(timeout):
        ready = select.select([terminal], [], [], timeout)[0]
        pressed = os.read(terminal, 64).lower() if ready else b"none"
        if pressed in (b"", b"q", b"\x04"):
            raise KeyboardInterrupt
        return pressed.decode("ascii", "replace")      # an arrow key is several characters, not A

    def answer():
        """(key pressed, or anything else when time is up; seconds taken)"""
        start, pressed = time.monotonic(), ""
        show("\n")
        while pressed not in ("a", "b"):
            left = seconds - (time.monotonic() - start)
            if left <= 0:
                show("\r\033[KTime is up. Any key for the next pair, q to leave. ")
                key(None)
                break
            clock = f"{math.ceil(left) // 60}:{math.ceil(left) % 60:02d}"
            show("\r\033[KWhich is better, A or B? q leaves; the answers so far are kept. "
                 f"{clock} ")
            pressed = key(min(left, 1))
        return pressed, round(min(time.monotonic() - start, seconds), 2)

    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        width = max(20, min(100, os.get_terminal_size(terminal).columns - 4))
        for number in range(log.batches_done, len(questions)):
            id_, prompt, a, b = questions[number]
            order = random.Random(dumps([seed, id_])).choice(["ab", "ba"])
            one, two = (a, b) if order == "ab" else (b, a)
            show(f"\033[2J\033[Hpair {number + 1} of {len(questions)}\n\n")
            show("\n".join(wrapped(question_of(prompt), width)) + "\n")
            for letter, text in (("A", one), ("B", two)):
                # the bar: an answer may hold a text that looks like the heading of another answer
                show(f"\n\033[1m--- {letter} ---\033[0m\n| "
                     + "\n| ".join(wrapped(text, width)) + "\n")
            termios.tcflush(terminal, termios.TCIFLUSH)     # a key pressed twice is one answer
            pressed, took = answer()
            second = {"a": 0.0, "b": 1.0}.get(pressed, 0.5)     # P(the second one shown is better)
            prob_b = second if order == "ab" else 1 - second
            log.append([[id_, prob_b, 1 - prob_b, took, order]])
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        show("\n")
        os.close(terminal)
    return log


def wrapped(text, width):
    """The lines of a text for a terminal, at most `width` characters each."""
    import textwrap
    lines = printable(text).strip().split("\n")
    return [part for line in lines for part in textwrap.wrap(line, width) or [""]]
