"""One run, from its config to its result, on the Ray cluster that `cluster` joins or starts.

`prepare` settles data (`stores`) and plan before a worker exists; `run` holds the run folder (`lease`), writes its `record`, and
lets `trainer` fit one attempt after the other, as `attempts` decides from how the last one ended. `progress` and `live` show
what the run folder says; `result` is what is left.
"""
