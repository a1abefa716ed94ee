"""Floor 7: optimisation. Imports lower floors; deepspeed in zero_engine.py only, ray.train in worker.py only.

One run on one rank, from the rim inwards:

    worker.py       what Ray Train calls: the plan's JSON in, a record of failure out
    tasks.py        what a worker can do (train, score), each given what start.py has started: the plan's model in its engine
    score.py        the loss of each row of a data set
    run.py          the policy of a run: what is evaluated, saved and reported after which step (timetable.py)
    loop.py         `training_steps`: a generator of optimizer steps; the only place that normalises the loss
    engine.py       the `Engine` protocol; `PlainEngine`: whole weights on every rank
    zero_engine.py  `ZeroEngine`: weights, gradients and optimizer state sharded by DeepSpeed, as deepspeed_json.py tells it
    objectives.py   what is minimised, per target; losses.py makes the model compute it, in chunks over its head (projections.py)
    user_objective.py   a function of the user's as an objective, tried before anything starts
    optimizer.py schedule.py    what the loop and the engines are handed
    requests.py     what is asked of a run, agreed among its ranks at log steps
    checkpoint.py   the commit protocol: how a checkpoint comes to count, is found again and goes
    snapshot.py     a state in memory of the host, out of which a thread writes its files (state_files.py)
    checkpoint_folder.py    where checkpoints lie, and what one attempt may do there
    peers.py        ranks that agree: what one of them raises, all of them raise
    commit.py       a committed checkpoint as its manifest describes it; which ones stay
"""
