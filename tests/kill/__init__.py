"""Death at every named place (``common.faults``): what is left is repaired, and nothing is lost with the dead."""
