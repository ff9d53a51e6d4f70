"""Side-by-side measurements: each one runs ours and a peer in turn, in one process, and reports the ratio of their times."""
