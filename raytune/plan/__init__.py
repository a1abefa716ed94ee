"""What will be done: arithmetic from a config, a model's shape and the machines to a `RunPlan`. No torch, no ray, no network.

`choose.choose_plan(...)` resolves every "auto" and says why; nothing downstream resolves anything.
"""
