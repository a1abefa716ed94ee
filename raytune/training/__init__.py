"""Optimisation. Imports lower floors; deepspeed in `engines.zero_*` only, ray.train in `worker` only.

One run on one rank, from the rim inwards: `worker` is what Ray Train calls (the plan's JSON in, a record of failure out), `tasks`
says what a worker can do (train, `score`, `find_rate`), each given what `start` has started, and `run` is the policy of a run:
what is evaluated, saved and reported after which step. Rooms, from the ground up; each imports those before it:

    engines      the `Engine` protocol, and those who fulfil it: whole weights on every rank, or shards of DeepSpeed
    checkpoints  the commit protocol: how a checkpoint comes to count, is found again and goes; ranks that agree (`peers`)
    steps        `loop.training_steps`, a generator of optimizer steps and the only place that normalises the loss; what is
                 decided between steps: schedules, records, requests, divergence, ends
    losses       what is minimised, per target (`objectives`), computed in chunks over a model's head
    start        from a plan to a model in its engine, with its rows
    measuring    suites, exports, and what a run leaves behind
"""
