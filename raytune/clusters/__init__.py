"""The machines that runs need: brought up, looked at, sent jobs.

`provider` turns a plan's wishes into a `ClusterSpec` and renders the templates of `cluster/` with it; `ray_up` and `kuberay` are
the two ways to say it to a provider. `working_dir` packs what a job needs, `jobs` sends it and finds it again by the name of its
run. `preflight` puts the `checks` on every node of a cluster, `doctor` on this machine. Runs and sweeps know nothing of this
floor: what it sends is the command that a person would type on the head.
"""
