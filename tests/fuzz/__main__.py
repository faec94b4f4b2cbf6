"""``python -m tests.fuzz``: each scene under coverage-guided fuzzing, then a flood at a host process. ``make fuzz``."""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.cli import EXIT_FAILED, EXIT_OK, CommandParser, run_command
from common.errors import MachineError
from common.output import check_output, write_json

_PARTS = ("decode", "host", "guest", "flood")
_MESSAGES = 1_000_000
_SECONDS = 300.0
_TAIL = 2000  # characters of what a scene that crashed said last


def main() -> int:
    """Exit code: 0 when nothing was found."""
    return run_command(_run)


def _run() -> int:
    parser = CommandParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--only", choices=_PARTS, action="append", help="run this part only (may be repeated)")
    parser.add_argument("--messages", type=int, default=_MESSAGES, help=f"of each part (default: {_MESSAGES})")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help=f"of each scene, at most (default: {_SECONDS:.0f})"
    )
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--folder", default="out/fuzz", help="for what crashed (default: out/fuzz)")
    parser.add_argument("--replay", metavar="FILE", help="play a file that crashed, its name begins with its scene")
    parser.add_argument("--json", default="", metavar="PATH|-", help="write the outcome as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite the JSON file")
    namespace = parser.parse_args()
    if namespace.replay:
        return _replay(Path(namespace.replay))
    folder = Path(namespace.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if namespace.json:
        check_output(namespace.json, force=namespace.force)
    parts = namespace.only or list(_PARTS)
    if importlib.util.find_spec("atheris") is None and parts != ["flood"]:
        raise MachineError("atheris is not installed; run `make fuzz`, or pass --only flood, which does without")
    outcomes = []
    for part in parts:
        sys.stderr.write(f"{part} ...\n")
        if part == "flood":
            outcome = _flood(namespace.messages, namespace.seed)
        else:
            outcome = _cover(part, namespace.messages, namespace.seconds, namespace.seed, folder)
        sys.stderr.write("  " + ", ".join(f"{key} {_shown(value)}" for key, value in outcome.items()) + "\n")
        outcomes.append(outcome)
    if namespace.json:
        write_json(outcomes, namespace.json, force=namespace.force)
    return EXIT_OK if all(outcome["sound"] for outcome in outcomes) else EXIT_FAILED


def _cover(scene: str, messages: int, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """One scene in a process of its own."""
    import json

    written = folder / f"{scene}.json"
    written.unlink(missing_ok=True)
    arguments = [scene, str(messages), str(seconds), str(seed), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.coverage", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode or not written.exists():
        sys.stderr.write(done.stdout[-_TAIL:] + done.stderr[-_TAIL:])
        return {"part": scene, "sound": False, "crashed": f"see {folder}/{scene}-*"}
    outcome = json.loads(written.read_text())
    features = [line.split() for line in done.stderr.splitlines() if " ft: " in line]
    reached = int(features[-1][features[-1].index("ft:") + 1]) if features else 0
    return {
        "part": scene,
        "messages": outcome["messages"],
        "plays": outcome["plays"],
        "seconds": outcome["seconds"],
        "features": reached,
        "sound": True,
    }


def _flood(messages: int, seed: int) -> dict[str, Any]:
    from tests.fuzz.flood import run_flood

    outcome = run_flood(f"fuzz-{os.getpid()}-{secrets.token_hex(3)}", messages=messages, seed=seed)
    return {"part": "flood", **outcome.as_dict()}


def _replay(path: Path) -> int:
    """Play one file in the scene that its name begins with. Raises what it raised then."""
    from tests.fuzz.scenes import SCENES

    scene = SCENES[path.name.partition("-")[0]](f"fuzz-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        scene.play(path.read_bytes())
    finally:
        scene.close()
    return EXIT_OK


def _shown(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
