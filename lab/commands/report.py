"""``python -m lab report``: a run directory as tables, pictures and one page."""

from __future__ import annotations

import argparse
import os
import sys

from common.cli import EXIT_OK
from common.errors import UsageError
from lab.experiment.outputs import is_kept

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags."""
    parser.add_argument("directory", metavar="DIR", help="the run directory of a comparison or a sweep")
    parser.add_argument("--out", metavar="FOLDER", help="where the report goes (default: DIR/report)")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def run(namespace: argparse.Namespace) -> int:
    """Write the report and print the path of its page.

    Raises:
        UsageError: no run directory, or a folder that belongs to it; names the fix.
    """
    if not namespace.directory:
        raise UsageError("DIR: is empty; name the folder of a sweep or a comparison")
    if namespace.out is not None:
        if not namespace.out:
            raise UsageError("--out: is empty; name a folder, or leave it away")
        same = os.path.realpath(namespace.out) == os.path.realpath(namespace.directory)
        is_file = os.path.isfile(namespace.out)  # refused below, whatever file it is
        if same or (is_kept(namespace.out, namespace.directory) and not is_file):
            raise UsageError(f"--out: {namespace.out!r} is where the experiment is kept; name another folder")
    from lab.report.load import load_experiment
    from lab.report.write import write_report

    folder = namespace.out or os.path.join(namespace.directory, "report")
    paths = write_report(load_experiment(namespace.directory), folder, force=namespace.force)
    if sys.stdout is not None:  # closed by whoever started us
        sys.stdout.write(f"{paths[-1]}\n")
    return EXIT_OK
