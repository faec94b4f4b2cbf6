"""A run directory as tables, pictures and one page.

Everything here reads directories and draws; nothing runs a guest or knows where results came from. What a figure means
stands in ``lab.experiment.metrics``, how it is summed up in ``lab.experiment.comparison``.
"""
