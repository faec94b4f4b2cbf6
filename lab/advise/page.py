"""The advice as one page, from the parts that the lab's reports are made of."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from lab.advise.advise import Advice
from lab.advise.words import TITLE, Part, lead, sections, table
from lab.experiment.environment import git_commit, project_version
from lab.report.page import Picture, as_cells, pretty, render
from lab.report.tables import TableData

__all__ = ["page"]


def page(advice: Advice, pictures: dict[str, Picture], command: Sequence[str]) -> str:
    """The page.

    Args:
        pictures: by the title of the section that each belongs to.
        command: what was typed.
    """
    return render(
        "advice.html.j2",
        title=TITLE,
        lead=lead(advice),
        sections=[
            {
                "title": section.title,
                "parts": [_part(part) for part in section.parts],
                "pictures": [pictures[section.title]] if section.title in pictures else [],
            }
            for section in sections(advice)
        ],
        command=shlex.join(command),
        version=" ".join(filter(None, (project_version(), git_commit()))),
        all=as_cells(table([(str(row.setting), row) for row in advice.rows], advice.span_s)),
        health=pretty(advice.health),
    )


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, TableData):
        return {"kind": "table", "table": as_cells(part)}
    return {"kind": "text", "text": part} if isinstance(part, str) else {"kind": "list", "lines": part}
