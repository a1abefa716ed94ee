"""raytune: one YAML to a fine-tuned model on a Ray cluster.

Floors, each importing only itself and lower ones:
`errors, units, storage, run_folder` < `config` < `plan` < `data` < `model` < `evaluate` < `train` < `launch` < `cli`.
One run passes through them in this order: `config.load` reads the YAML, `launch.run` connects to Ray, `data.store` tokenises
once, `plan.choose` resolves everything into a `RunPlan`, `train.worker` trains it on every rank, `launch.run` returns a result.
"""
