"""What only a real process shows: imports, signals, closed pipes, tracebacks."""

import json
import os
import signal
import subprocess
import sys

import pytest

import secateur
from forking import Forked
from process_jobs import break_opening, save_slowly
from secateur import api
from secateur.cli import main
from secateur.runs.signals import StopRequest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **options
    )


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], ("torch", "transformers")),
        (["--version"], ("torch", "transformers")),
        (["prune", "--help"], ("torch", "transformers")),
        (["methods"], ("transformers",)),
        (["describe", "flap"], ("transformers",)),
        (["prune", "m", "--method", "flpa", "--out", "x"], ("transformers",)),
    ],
)
def test_light_commands_import_nothing_heavy(arguments, heavy):
    code = f"""
import sys, atexit
from secateur.cli import main
from secateur.runs.signals import StopRequest
atexit.register(lambda: print([n for n in {heavy} if n in sys.modules], file=sys.stderr))
main({arguments})
"""
    assert python(code).stderr.splitlines()[-1] == "[]"


def test_module_runs_as_a_command():
    run = subprocess.run(
        [sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert (run.returncode, run.stdout) == (0, f"secateur {secateur.__version__}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_interrupts_at_once_and_the_run_goes_on_later(cli, number, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = ["prune", str(tiny_checkpoint), "--method", "magnitude", "--out", str(out), "--no-report", "--quiet"]
    with Forked(arguments, before=save_slowly) as process:
        assert process.stderr.readline() == "saving\n"
        process.send_signal(number)
        assert process.stderr.readline() == "stopping after this block; once more stops at once\n"
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert rest == f"stopped; {out}.run holds what is done: the same command with --resume goes on from there\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]
    resumed = cli(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_signal_while_a_line_is_written_is_told_too(tmp_path, monkeypatch):
    with (tmp_path / "err").open("w", encoding="utf8") as stream:

        class Busy:
            fileno = stream.fileno

            def write(self, text):
                # what a stream says to a handler that ran while it was writing
                raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

        monkeypatch.setattr(sys, "stderr", Busy())
        request = StopRequest()
        request(signal.SIGINT, None)
    assert request.made
    assert (tmp_path / "err").read_text() == "stopping after this block; once more stops at once\n"


def test_a_reader_that_leaves_is_no_error():
    code = """
import sys, time
from secateur.cli import main
from secateur.runs.signals import StopRequest
time.sleep(1)
main(["methods", "--json"])
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_bug_shows_its_traceback():
    with Forked(["inspect", "m"], before=break_opening) as process:
        rest = process.stderr.read()
        assert process.wait() == 1
    assert "Traceback" in rest and "ZeroDivisionError: a bug" in rest


def test_streams_of_a_real_run(tiny_checkpoint, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "secateur", "prune", str(tiny_checkpoint), "--method", "wanda", "--sparsity", "0.5",
         "--samples", "2", "--length", "32", "--out", str(tmp_path / "out"), "--json"],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["method"] == "wanda"
    assert "2/2" in run.stderr


def test_bare_command_shows_help(cli):
    run = cli()
    assert run.code == 0 and "Commands:" in run.out


def test_unknown_command_suggests_the_nearest(cli):
    run = cli("prnue")
    assert run.code == 2 and "prune" in run.err and run.err.count("\n") == 1


def test_signal_handler_is_put_back(cli):
    before = signal.getsignal(signal.SIGTERM)
    cli("--version")
    assert signal.getsignal(signal.SIGTERM) is before


def test_json_has_no_nan(cli, monkeypatch, tiny_checkpoint):
    from secateur.evaluation import Table
    from secateur.report import Metric

    monkeypatch.setattr(api, "evaluate", lambda *a, **k: Table([Metric("m", "", {"tiny": float("nan")})], ["tiny"]))
    document = json.loads(cli("evaluate", tiny_checkpoint, "--json").out, parse_constant=pytest.fail)
    assert document["metrics"][0]["values"] == {"tiny": None}


def test_works_outside_the_main_thread():
    import threading

    codes = []

    def work():
        try:
            main(["--version"])
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]
