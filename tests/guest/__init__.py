"""The guest's memory, workloads, link, reporter and machine, each by itself."""
