"""What people see: plain lines in a pipe, a bar on a terminal, and no text that steers it."""

import io
import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from tilewright.tuner.campaign.progress import ENDLESS_TRIALS, Effort, Progress, bar_lines
from tilewright.tuner.cli import main
from tilewright.tuner.report.terminal import Heading, plain, print_lines
from tilewright.tuner.report.text import table

ESCAPE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]\u202e\r\n"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    stream = Tty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout", stream)
    print_lines(lines)
    return stream.getvalue()


@given(st.text())
def test_nothing_that_is_printed_can_steer_a_terminal(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e]", plain(text))
    for line in table(("key", "what"), [("a", text), (text, "b")]):
        assert "\x1b" not in line
        assert "\n" not in line


def test_text_of_a_database_is_neither_markup_nor_control_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_lines([ESCAPE])
    expected = "\ufffd[2J\ufffd]0;owned\ufffd[bold red]x[/]\ufffd\ufffd\ufffd"
    assert capsys.readouterr().out == f"{expected}\n"
    assert on_terminal([ESCAPE], monkeypatch) == f"{expected}\n"


def test_a_mistake_is_told_without_its_control_codes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["show", "--db", str(tmp_path / "\x1b[2J.db")]) == 1
    assert "\ufffd[2J.db" in capsys.readouterr().err


def test_heads_are_bold_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = table(("key", "n"), [("a", "1")])
    assert [type(line) for line in lines] == [Heading, str]
    print_lines(lines)
    assert capsys.readouterr().out == "key  n\na    1\n"
    assert on_terminal(lines, monkeypatch) == "\x1b[1mkey  n\x1b[0m\na    1\n"
    monkeypatch.setenv("TERM", "dumb")
    stream = Tty()
    monkeypatch.setattr("sys.stdout", stream)
    print_lines(lines)
    assert stream.getvalue() == "key  n\na    1\n"


def test_long_lines_are_broken_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    path = "/a/path/that/is/longer/than/twenty"
    said = on_terminal(["words that do not fit in a line", f"  in {path}", "short"], monkeypatch)
    assert said.splitlines() == ["words that do not", "  fit in a line", "  in", f"    {path}", "short"]


def test_a_pipe_gets_no_codes_even_if_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    print_lines([Heading("key"), "x" * 300])
    assert capsys.readouterr().out == "key\n" + "x" * 300 + "\n"
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.begin(8, 1e9)
        progress.problem("moe_gemm up tokens=1")
        progress.built(3)
        progress.searched()
        progress.built(3)
        progress.say("hello")
    assert re.fullmatch(r"\[ *\ds\] hello\n", stream.getvalue())


def test_wide_characters_take_their_columns() -> None:
    lines = table(("name", "n"), [("宽", "1"), ("abcd", "22")])
    assert {cell_len(line) for line in lines} == {8}
    rows = [("宽宽宽", "1", "left")]
    assert len(table(("name", "n", "word"), rows, width=15)) == 2
    assert len(table(("name", "n", "word"), rows, width=14)) == 5  # in two parts


def effort(done: int, trials: int, begin: float = 0.0, deadline: float = 100.0, earlier: int = 0) -> Effort:
    made = Effort(trials, deadline, begin)
    made.counted("a", earlier)
    made.counted("a", done)
    return made


def test_time_left_is_what_the_trials_of_this_run_took_or_what_the_clock_allows() -> None:
    assert effort(0, 8).left_s(10.0) == 90.0
    assert effort(2, 8).left_s(10.0) == 30.0
    assert effort(2, 80).left_s(10.0) == 90.0
    assert effort(6, 8, earlier=4).left_s(10.0) == 10.0
    assert effort(8, 8).left_s(10.0) == 0.0
    assert effort(3, ENDLESS_TRIALS).left_s(10.0) == 90.0
    assert effort(2, 8).left_s(200.0) == 0.0
    assert Effort(0, float("inf")).left_s(1.0) is None


def test_the_bar_is_as_full_as_the_trials_or_the_time() -> None:
    assert effort(2, 8).share(10.0) == 0.25
    assert effort(2, 8).share(50.0) == 0.5
    assert effort(9, 8).share(50.0) == 1.0
    several = effort(4, 16)
    several.counted("b", 4)
    assert several.share(1.0) == 0.5


@given(columns=st.integers(1, 200), done=st.integers(0, 3000), text=st.text(max_size=100))
def test_the_bar_fits_every_terminal(columns: int, done: int, text: str) -> None:
    console = Console(file=io.StringIO(), width=columns, force_terminal=True)
    lines = console.render_lines(bar_lines(plain(text), effort(done, 3000), 10.0, columns), pad=False)
    assert len(lines) == 2
    assert all(sum(piece.cell_length for piece in line) <= columns for line in lines)


def test_the_bar_says_how_far_it_is_and_how_long_it_takes() -> None:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as said:
        console.print(bar_lines("moe_gemm up  best 3 us", effort(2, 8), 10.0, 80))
    first, second = said.get().splitlines()
    assert first.strip() == "moe_gemm up  best 3 us"
    assert "2/8 trials  0:30 left" in second
    assert second.index("2/8") == 41
    assert second.count("━") == 10


_TUNES = """
    import signal, sys, time
    from tilewright.tuner.campaign.progress import Progress
    try:
        with Progress(sys.stderr) as progress:
            progress.begin(8, time.monotonic() + 60)
            progress.problem("moe_gemm up tokens=1")
            progress.say("a first line")
            progress.built(3)
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
"""


def test_the_bar_is_there_while_a_search_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Tty()
    with Progress(stream) as progress:
        progress.begin(8, 1e9)
        progress.built(1)
        assert stream.getvalue() == ""
        progress.problem("moe_gemm up tokens=1")
        assert "0/8 trials" in stream.getvalue()
        progress.searched()
        before = stream.getvalue()
        progress.built(3)
        assert stream.getvalue() == before


def test_ctrl_c_takes_the_bar_away_and_leaves_the_cursor() -> None:
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(_TUNES)]
    subprocess.run(command, stderr=theirs, env=environment, check=True, timeout=120)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 1 << 16)
        except OSError:
            break
    os.close(ours)
    text = said.decode()
    assert "building: 3 done" in text
    assert "0/8 trials" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    after_bar = text[text.rindex("left") :]
    assert after_bar.count("\x1b[2K") >= 2  # both of its lines are cleared
    assert after_bar.rstrip().endswith("interrupted")


def test_sources_go_into_a_pipe_byte_for_byte(tmp_path: Path) -> None:
    code = "from tilewright.tuner.report.terminal import print_source; print_source('a\\tb\\x1b\\n\\nc')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=tmp_path) == b"a\tb\x1b\n\nc"
