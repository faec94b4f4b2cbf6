"""One run of an experiment with real processes: started, waited for, and read."""
