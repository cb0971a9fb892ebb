"""Reports: the page of a run, comparisons, charts, and `info`."""
