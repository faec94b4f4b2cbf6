"""One run with real processes: a host and a guest in a lab of their own, from start to end."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import threading
from pathlib import Path

from common.errors import InvariantViolation, LabError, MachineError, UsageError
from common.settings import GuestSettings
from lab.children import Children, Interrupts
from lab.experiment.metrics import RunResult
from lab.experiment.spec import ORACLE, RunSpec
from lab.flags import flags_of
from lab.hosts import host_period_ns, host_process
from lab.live.account import result_of
from lab.orchestrate import LabPlan, ProcessPlan, run_lab, warm_up
from lab.outcome import ProcessEnd, RunOutcome
from lab.summary import failure_text
from lab.view import SilentView

__all__ = ["host_and_guest", "run_live"]

_GUEST = "guest-1"
_WARM_UP = ("-m", "guest", "--warm-up")
_LONGEST_JOB_S = 3600.0  # a job has no duration; whoever still works then is stopped
_START_LIMIT_S = 120.0  # beyond the work: many runs may start at once
_ERRORS = {error.exit_code: error for error in (LabError, UsageError, MachineError, InvariantViolation)}


def run_live(spec: RunSpec) -> RunResult:
    """Run ``spec`` with a host and one guest of its own, wait for both, and say what came of it.

    From any thread, and several at once: each run has a lab of its own. Nothing is left behind however it ends. In the
    main thread a signal to stop ends the run in order; elsewhere it goes on until its end. The first run of a process
    compiles the kernels if nobody has yet. ``spec.cores`` is ignored: a live run has the processors of the machine.

    Raises:
        UsageError: ``spec`` is not of a live run, or the guest refuses its settings.
        MachineError: this machine cannot (memory, limits).
        LabError: a process failed otherwise or did not end in time; with the last it wrote to standard error.
        KeyboardInterrupt: there was a signal to stop; all processes have ended.
    """
    if spec.mode != "live":
        raise UsageError(f"mode: {spec.mode!r}; a run with real processes is 'live'")
    if spec.policy == ORACLE:
        raise UsageError(f"policy: {ORACLE!r} knows the future and exists in virtual time only; run it there")
    _kernels.make_ready()
    lab = f"live-{os.getpid()}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="fpr-live-") as folder:
        outcome = run_lab(host_and_guest(spec, lab, Path(folder)), SilentView())
    _check(outcome)
    return result_of(spec, outcome)


def host_and_guest(spec: RunSpec, lab: str, folder: Path) -> LabPlan:
    """What a run needs: one host of the kind that its policy asks for, and one guest; accounts go to ``folder``.

    Raises:
        UsageError: no such policy.
    """
    duration_s = _LONGEST_JOB_S if spec.work_pages else spec.duration_ns / 1e9
    return LabPlan(
        lab=lab,
        backend=spec.backend,
        memory_bytes=spec.memory,
        duration_s=duration_s,
        warm_up=(),
        host=host_process(
            spec.policy,
            lab,
            folder / "host.json",
            delay_ns=spec.delay_ns,
            inhibit_discard=spec.inhibit_discard,
        ),
        guests=(_guest(spec, lab, folder),),
        watched=False,  # the guest records its own memory; a watcher would take its processors
        start_limit_s=_START_LIMIT_S,
    )


def _guest(spec: RunSpec, lab: str, folder: Path) -> ProcessPlan:
    account = folder / f"{_GUEST}.json"
    values = spec.as_dict()
    own = {
        "host": lab,
        "name": _GUEST,
        "json": str(account),
        "quiet": True,
        "capacity": _capacity(spec),
        "duration_s": None if spec.work_pages else spec.duration_ns / 1e9,
    }
    if host_period_ns(spec.policy, spec.delay_ns) is not None:
        own["delay_ns"] = None  # the host's
    return ProcessPlan(_GUEST, ("-m", "guest", *flags_of(GuestSettings, values | own)), account)


def _capacity(spec: RunSpec) -> int:
    """Blocks a report: that of the policy unless it is set."""
    if spec.capacity is not None:
        return spec.capacity
    from guest.reporting.table import find_policy  # brings compiled code

    return find_policy(spec.policy).capacity


class _Kernels:
    """The compiled kernels: made ready once in the life of this process, while all other runs wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready = False

    def make_ready(self) -> None:
        """Compile what is not in the cache. Raises ``LabError``, or ``KeyboardInterrupt`` after a signal to stop."""
        with self._lock:
            if self._ready:
                return
            with Interrupts() as interrupts, Children(interrupts) as children:
                problem = warm_up(children, _WARM_UP)
                if children.interrupted:
                    raise KeyboardInterrupt
            if problem is not None:
                raise LabError(problem)
            self._ready = True


_kernels = _Kernels()


def _check(outcome: RunOutcome) -> None:
    """Raise what a run ended with, unless there is a result: a guest that found a violation has one."""
    if outcome.interrupted:
        raise KeyboardInterrupt
    failed = [(end, end.exit_code) for end in outcome.processes if end.exit_code and not _has_violations(end)]
    if failed:
        # The others were told to stop, perhaps before they could listen, so a signal explains least.
        end, code = min(failed, key=lambda one: (one[1] < 0, one[1] == -signal.SIGTERM))
        raise _ERRORS.get(code, LabError)(failure_text(end.name, code, end.stderr_tail))
    if outcome.problem is not None and not any(_has_violations(end) for end in outcome.processes):
        raise LabError(outcome.problem)
    for end in outcome.processes:
        if end.account is None:
            raise LabError(f"{end.name} left no account of itself: {end.stderr_tail}")


def _has_violations(end: ProcessEnd) -> bool:
    return end.exit_code == InvariantViolation.exit_code and end.account is not None
