"""Five arguments about free page reporting, each settled by one command: ``python -m lab show NAME``."""
