"""``python -m guest``."""

from guest.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
