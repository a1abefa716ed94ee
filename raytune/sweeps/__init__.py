"""Many variants of one run, early losers stopped. A trial is a value (`trial`), drawn from a `space`; others run and judge it.

One sweep passes through these files: `run` resolves trials and their plans into a `sweep_plan`; `tuner` gives Ray Tune a `search`
(where trials come from) and a `schedule` (who goes on, by `halving` or Tune's own rules), and `trainable` is what Tune runs. What
is decided stands in the `ledger`, from which the same command resumes; `collect` makes `results` of it, and `winner` trains the
best one again. `board` and `live` show what goes on. Decisions are pure (`halving`, `rungs`, `cost`, `space`); Ray is imported
by `search`, `schedule`, `trainable` and `tuner` only.
"""
