"""How a user records page events in a guest: by ftrace, by trace-cmd, by perf, or by one script for busybox."""

from __future__ import annotations

from importlib import resources

from lab.trace.events import PAGE_EVENTS, TRACEPOINTS

__all__ = ["BUFFER_KIB", "instructions", "script"]

BUFFER_KIB = 65536  # a CPU: some 1.5 million events, at 40 bytes each

_TEXT = """\
Record in the guest, as root, while it does its usual work; a minute or ten will do. Take the snapshot of
/proc/kpageflags as close to the first event as can be, while the guest is quiet: what moves between the two is
counted by the import as a contradiction. The clock is mono, so that the times are those of the guest's
CLOCK_MONOTONIC.

Keep beside the trace (all of these take one run of `cat`):
  /proc/kpageflags      the snapshot that --start wants; raw, 8 bytes a page, may be packed by gzip
  /proc/buddyinfo       free blocks by order, to check it by
  /proc/pagetypeinfo    the same by migratetype
  /sys/module/page_reporting/parameters/page_reporting_order

A script that does everything with busybox alone
  python -m lab record --script > record.sh
  sh record.sh -s 60 -o recording            # or: sh record.sh -o recording COMMAND
  python -m lab import recording/trace.txt --start recording/start.kpageflags

ftrace
  cd /sys/kernel/tracing                     # mount -t tracefs tracefs /sys/kernel/tracing
  mkdir instances/pages && cd instances/pages
  echo 0 > tracing_on
  echo mono > trace_clock
  echo {buffer} > buffer_size_kb               # KiB a CPU
{enable}
  cat trace_pipe > /tmp/trace.txt &
  cat /proc/buddyinfo > /tmp/start.buddyinfo; cat /proc/pagetypeinfo > /tmp/start.pagetypeinfo
  cat /proc/kpageflags > /tmp/start.kpageflags; echo 1 > tracing_on
  sleep 60                                   # or the work itself
  echo 0 > tracing_on; sleep 5; kill %1
  cat per_cpu/cpu*/stats | grep -E 'overrun|dropped'    # all 0, or events were lost: a larger buffer
  cd ../.. && rmdir instances/pages

trace-cmd
  trace-cmd record -C mono -b {buffer} \\
{trace_cmd}
    sh -c 'for f in kpageflags buddyinfo pagetypeinfo; do cat /proc/$f > start.$f; done; sleep 60'
  trace-cmd report -t > trace.txt            # -t: nanoseconds

perf
  perf record -a -k CLOCK_MONOTONIC -m {perf_pages} \\
{perf}
    -o perf.data -- sh -c 'for f in kpageflags buddyinfo pagetypeinfo; do cat /proc/$f > start.$f; done; sleep 60'
  perf script -i perf.data --ns --show-lost-events --header > trace.txt

then
  python -m lab import trace.txt --start start.kpageflags
"""
_PAGE_KIB = 4


def instructions() -> str:
    """The commands for ftrace, trace-cmd and perf, and how to get the script."""
    return _TEXT.format(
        buffer=BUFFER_KIB,
        enable="\n".join(f"  echo 1 > events/kmem/{event.name}/enable" for event in PAGE_EVENTS),
        trace_cmd="\n".join(f"    -e {point} \\" for point in TRACEPOINTS),
        perf="\n".join(f"    -e {point} \\" for point in TRACEPOINTS),
        perf_pages=BUFFER_KIB // _PAGE_KIB,
    )


def script() -> str:
    """A POSIX shell script that records by ftrace and keeps what belongs to it; needs busybox alone."""
    return resources.files("lab.trace").joinpath("record.sh").read_text(encoding="ascii")
