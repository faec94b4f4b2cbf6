"""One HTML page of an experiment: self-contained, so that it can be mailed, archived and read anywhere."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lab.report.findings import findings, headline, what_was_run
from lab.report.load import Experiment
from lab.report.tables import TableData

__all__ = ["Picture", "render_page"]


@dataclass(frozen=True)
class Picture:
    """A picture in both its forms. ``name``: of its files, without the suffix; ``text``: what it shows, in words."""

    name: str
    title: str
    text: str
    png: bytes
    svg: bytes

    @property
    def source(self) -> str:
        """The vector form as a data URI. As an image it can neither run a script nor load anything."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def render_page(experiment: Experiment, tables: Sequence[TableData], pictures: Sequence[Picture]) -> str:
    """The page. Whatever came from a directory is escaped; nothing outside the page is loaded."""
    environment = Environment(
        loader=PackageLoader("lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    record = experiment.record
    return environment.get_template("report.html.j2").render(
        title=headline(experiment),
        lead=what_was_run(experiment),
        findings=findings(experiment),
        tables=[_as_cells(table) for table in tables],
        notes=experiment.comparison.notes(),
        pictures=pictures,
        command=shlex.join(str(part) for part in record.get("command", [])),
        created=record.get("created", ""),
        version=" ".join(filter(None, (record.get("version"), record.get("commit")))),
        settings=_pretty(record.get("settings", {})),
        environment=_pretty(record.get("environment", {})),
        costs=None if experiment.costs is None else _pretty(experiment.costs),
    )


def _as_cells(table: TableData) -> dict[str, Any]:
    """A table with each cell's mark beside its text."""
    classes = {"+": "better", "-": "worse", "~": "other", "!": "far"}
    return {
        "title": table.title,
        "headers": table.headers,
        "rows": [
            [{"text": text, "mark": sign, "kind": classes.get(sign, "")} for text, sign in zip(*pair, strict=True)]
            for pair in zip(table.rows, table.marks, strict=True)
        ],
    }


def _pretty(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)
