"""One run, from its config to its result, on the Ray cluster that `cluster` joins or starts.

`planning` and `check` say what a run would be; `run` holds the run folder and fits one attempt after the other; `folds` does so
once per fold, `track` tells trackers afterwards. Rooms, from the ground up; each imports those before it:

    cluster     joined, or started inside this machine, and left as it was
    data        stores and base made ready before a worker exists (`prepare`), and what a person sees of rows
    state       a run as its folder tells it: its record, how it goes, what came of it, and who is told
    attempts    who holds a run (`lease`), its worker group, what ended it and what is done then
    asking      models that answer, score and are measured on the workers of a cluster
    rates       the learning-rate range test
    export      models as files for others, and where they are pushed to
"""
