"""Self-contained HTML pages, which can be mailed, archived and read anywhere; among them that of an experiment."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lab.report.findings import findings, headline, what_was_run
from lab.report.load import Experiment
from lab.report.tables import TableData

__all__ = ["Picture", "as_cells", "pretty", "render", "render_page"]

_INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*")


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


def render(template: str, **values: Any) -> str:
    """A page from one of ``lab/report/templates``. Every value is escaped; nothing outside the page is loaded.

    The filter ``inline`` turns `code` and **strong** of Markdown into their elements, after escaping.
    """
    environment = Environment(
        loader=PackageLoader("lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = _inline
    return environment.get_template(template).render(**values)


def _inline(text: str) -> Markup:
    safe = str(escape(text))
    return Markup(  # noqa: S704  escaped in the line above; what is added are two elements without attributes
        _INLINE.sub(
            lambda found: f"<code>{found[1]}</code>" if found[1] is not None else f"<strong>{found[2]}</strong>", safe
        )
    )


def render_page(experiment: Experiment, tables: Sequence[TableData], pictures: Sequence[Picture]) -> str:
    """The page of an experiment."""
    record = experiment.record
    return render(
        "report.html.j2",
        title=headline(experiment),
        lead=what_was_run(experiment),
        findings=findings(experiment),
        tables=[as_cells(table) for table in tables],
        notes=experiment.comparison.notes(),
        pictures=pictures,
        command=shlex.join(str(part) for part in record.get("command", [])),
        created=record.get("created", ""),
        version=" ".join(filter(None, (record.get("version"), record.get("commit")))),
        settings=pretty(record.get("settings", {})),
        environment=pretty(record.get("environment", {})),
        costs=None if experiment.costs is None else pretty(experiment.costs),
    )


def as_cells(table: TableData) -> dict[str, Any]:
    """A table as the templates draw it: each cell's mark beside its text."""
    classes = {"+": "better", "-": "worse", "~": "other", "!": "far"}
    return {
        "title": table.title,
        "headers": table.headers,
        "words": table.words,
        "rows": [
            [{"text": text, "mark": sign, "kind": classes.get(sign, "")} for text, sign in zip(*pair, strict=True)]
            for pair in zip(table.rows, table.marks, strict=True)
        ],
    }


def pretty(values: Any) -> str:
    """JSON for people."""
    return json.dumps(values, indent=2, ensure_ascii=False)
