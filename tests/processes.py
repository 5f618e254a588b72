"""Processes that need not import PyTorch again, which costs a processor four seconds every time.

A server imports the scripts once. A process is a fork of it that goes on as a fresh interpreter
would: it runs a file, or code after -c, with its own arguments and output, and signals end it with
the same exit codes. tests/test_scripts.py and tests/test_parallel.py start fresh ones as well.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from subprocess import TimeoutExpired

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])


class Process:
    """As `subprocess.Popen([sys.executable, *argv], text=True, cwd=cwd)`, in a session of its own.

    Its output goes to files, to `log` if that is given; `said` and `errors` read them at any time.
    With `ranks`, the process is what torchrun is: it starts so many of them.
    """

    def __init__(
        self, *argv: object, cwd: str | Path = ".", ranks: int = 0, log: Path | None = None
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.err = (log or Path(self.folder.name, name) for name in ("out", "err"))
        given = [str(value) for value in argv], os.path.abspath(cwd), ranks
        self.process = SERVER.Process(target=_start, args=(*given, self.out, self.err))
        _start_server()
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def said(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def errors(self) -> str:
        return self.err.read_text() if self.err.exists() else ""

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float | None = 120) -> int:
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutExpired("a process", timeout, self.said(), self.errors())
        return self.returncode

    def communicate(self, timeout: float | None = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.said(), self.errors()


def _start_server() -> None:
    """Start the server where it finds preloaded.py; it says nothing of a module that it lacks."""
    before = os.getcwd()
    os.chdir(Path(__file__).parent)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(before)


def _start(argv: list[str], cwd: str, ranks: int, out: Path, err: Path) -> None:
    os.setsid()
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # the platform's, not this server's
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if ranks:
        _torchrun(ranks, argv)
    else:
        _run(*argv)


def _run(script: str, *argv: str) -> None:
    sys.argv = [script, *argv]
    if script == "-c":
        sys.argv = ["-c", *argv[1:]]
        exec(argv[0], {"__name__": "__main__"})
    else:
        runpy.run_path(script, run_name="__main__")


def _torchrun(ranks: int, argv: list[str]) -> None:
    """torchrun --standalone --nproc_per_node=RANKS, whose ranks are forks, too."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id="tests",
        start_method="fork",
    )
    elastic_launch(config, _run)(*argv)
