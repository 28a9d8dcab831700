"""Commands with a time limit each, one after the other or side by side, and what became of them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PASSED, FAILED, CUT = "passed", "failed", "cut"  # cut: stopped at its limit, part of it may be done
_GRACE = 15.0  # seconds between the interrupt and the kill
_POLL = 0.05


class Job(NamedTuple):
    """A command and how to read what it leaves.

    Attributes:
        name: "part/what".
        command: argv.
        seconds: after which it is interrupted.
        read: what is kept of its result.
        rehearsal: argv that shows without a GPU that the command has what it needs.
        environment: variables on top of ours.
        together: it may run beside its neighbours that say so too.
        always: it runs again in a pass that resumes.
        instead_of: name of a job; this one runs if that one failed.
    """

    name: str
    command: list[str]
    seconds: float
    read: Callable[["Result"], dict[str, Any]] = lambda result: {}
    rehearsal: list[str] | None = None
    environment: dict[str, str] = {}  # noqa: RUF012
    together: bool = False
    always: bool = False
    instead_of: str = ""


class Result(NamedTuple):
    """What became of a job.

    Attributes:
        status: PASSED, FAILED or CUT.
        seconds: it ran.
        output: both streams.
    """

    status: str
    seconds: float
    output: str


def batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Neighbours that may run side by side in one list, others alone."""
    batch: list[Job] = []
    for job in jobs:
        if batch and not (job.together and batch[-1].together):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def run(jobs: list[Job], folder: Path, directory: Path, deadline: float) -> list[Result]:
    """Run `jobs` side by side.

    Args:
        folder: for their output.
        directory: where they run.
        deadline: on `time.monotonic`'s clock, when all are interrupted that are not done.
    """
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_Process(job, folder, directory)) for job in jobs]
        while any(process.is_running(deadline) for process in running):
            time.sleep(_POLL)
        return [process.result() for process in running]


def _take_interrupts() -> None:
    """In a new process, which else ignored them if we are a shell's background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Process:
    """A job that runs, in a session of its own so that all its processes end with it."""

    def __init__(self, job: Job, folder: Path, directory: Path):
        self._job, self._log = job, folder / f"{job.name.replace('/', '-')}.log"
        self._begin, self._cut, self._seconds = time.monotonic(), 0.0, 0.0
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    job.command, cwd=directory, env=os.environ | job.environment,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=_take_interrupts,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n".encode())
                self._process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def is_running(self, deadline: float) -> bool:
        if self._process is None or self._process.poll() is not None:
            if not self._seconds:
                self._seconds = time.monotonic() - self._begin
                self._signal(signal.SIGKILL)  # to what it has started and left behind
            return False
        now = time.monotonic()
        if not self._cut and now > min(deadline, self._begin + self._job.seconds):
            self._cut = now
            self._signal(signal.SIGINT)  # pytest and the benchmark still write what they have
        elif self._cut and now > self._cut + _GRACE:
            self._signal(signal.SIGKILL)
        return True

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def result(self) -> Result:
        ended_well = self._process is not None and self._process.returncode == 0
        status = CUT if self._cut else PASSED if ended_well else FAILED
        return Result(status, self._seconds, self._log.read_text(errors="replace"))
