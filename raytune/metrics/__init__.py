"""metrics.jsonl and events.jsonl: what a run measured and what happened to it, one JSON object per line.

Lines are only ever added. Every line of metrics.jsonl carries the number of the attempt that wrote it, and an attempt begins
with a line that says after which step it resumed. A reader therefore sees the *effective* history: steps that a dead attempt
trained beyond the checkpoint are gone, and so is what an orphaned process of that attempt still writes. Where the divergence
guard rolls an attempt back, it begins with another such line, which also says by what rates are multiplied from there on.

    {"attempt": 2, "time": 1764.2, "resumed_step": 100}
    {"attempt": 2, "time": 1766.9, "step": 101, "train/loss": 1.25, "train/learning_rate": 0.0002}
    {"attempt": 2, "time": 1792.1, "resumed_step": 100, "bad_step": 117, "rate_factor": 0.5}

A `writer.MetricsWriter` and an `events.EventLog` add lines. Whoever watches a run uses a `follower.Follower`, which reads every
line once; whoever looks once reads a `history.History`.

JSON has no word for not-a-number and infinity; they are the strings "NaN", "Infinity" and "-Infinity" here (`json_numbers`),
floats in a `History`.
"""
