"""Checks of machines before a run needs them: facts are gathered by processes on the nodes, and judged as values.

`facts` looks; `judge` and `nodes` decide, without a machine; `inspector` and `bandwidth` are what runs on a cluster.
A check ends as a `Finding`: what was seen, and what to do about it.
"""
