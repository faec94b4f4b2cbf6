"""One scene under atheris: ``python -m tests.fuzz.coverage SCENE MESSAGES SECONDS SEED FOLDER``.

A process of its own, because libFuzzer ends it. It writes ``SCENE.json`` into FOLDER when it has played so many
messages or so long; what it crashed on is there as ``SCENE-crash-...``, for ``python -m tests.fuzz --replay FILE``.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["common.messages", "common.names", "host", "guest.reporting.link"]):
    from tests.fuzz.scenes import SCENES, seeds

_LONGEST_PLAY = 4096  # bytes; a report of the most blocks is one
_MOST_RESIDENT_MIB = 1024


def main(name: str, messages: int, seconds: float, seed: int, folder: Path) -> None:
    """Fuzz until one of the bounds is reached. Does not return."""
    scene = SCENES[name](f"fuzz-{os.getpid()}-{secrets.token_hex(3)}")
    started = time.monotonic()
    plays = 0

    def finish() -> None:
        scene.close()
        outcome = {"scene": name, "messages": scene.messages, "plays": plays, "seconds": time.monotonic() - started}
        (folder / f"{name}.json").write_text(json.dumps(outcome))
        os._exit(0)

    def play(data: bytes) -> None:
        nonlocal plays
        plays += 1
        try:
            scene.play(data)
        except BaseException:
            scene.close()
            raise
        if scene.messages >= messages or time.monotonic() - started >= seconds:
            finish()

    with tempfile.TemporaryDirectory() as corpus:
        for number, start in enumerate(seeds()):
            (Path(corpus) / str(number)).write_bytes(start)
        atheris.Setup(
            [
                sys.argv[0],
                f"-seed={seed}",
                f"-max_len={_LONGEST_PLAY}",
                f"-rss_limit_mb={_MOST_RESIDENT_MIB}",
                f"-artifact_prefix={folder}/{name}-",
                "-print_final_stats=0",
                corpus,
            ],
            play,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
