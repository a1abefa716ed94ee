"""What will be done: arithmetic from a config, a model's shape and the machines to a `RunPlan`. No torch, no ray, no network.

`base_model.read_model_shape` reads a config.json, `setting.settle` decides, or refuses, what needs no data, and once the
stores are built `choose.choose_plan` resolves every "auto" and says why: numbers come from `defaults`, the batch equation from
`batch`, bytes from `memory`, and `fitting` takes the first way that fits. Nothing downstream resolves anything. `describe` puts a
plan in words.
"""
