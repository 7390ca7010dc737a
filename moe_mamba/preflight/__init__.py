"""Whether machines, network, folders and data are fit for a run, in words and numbers, before it begins."""
