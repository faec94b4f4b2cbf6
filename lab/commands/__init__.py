"""One light module a subcommand of ``python -m lab``: ``add_arguments(parser)`` and ``run(namespace)``."""
