"""``python -m host``."""

from common.interrupts import run_program


def _main() -> int:
    from host.cli import main

    return main()


if __name__ == "__main__":
    run_program(_main)
