"""What will be done: arithmetic from a config, a model's shape and the machines to a `RunPlan`. No torch, no ray, no network.

`model.base_model` reads a config.json, `choosing.setting` decides, or refuses, what needs no data, and once the stores are
built `choosing.choose` resolves every "auto" and says why. Nothing downstream resolves anything. Here lie the plan as a value
(`run_plan`), what is true without a config (`defaults`), plans of what is not here yet (`ahead`), methods side by side (`advise`)
and a plan in words (`describe`). Rooms, from the ground up; each imports those before it:

    data        rows as a plan knows them: mixtures, splits, streams, limits, and what became of each row
    model       a base by its config: its shape, what a method trains of it, its quantisation
    methods     fine-tuning methods: a row each
    costs       bytes, seconds and dollars of a step; the catalogue of hardware
    facts       what a plan is told: machines and stores
    strategies  what changes how a method learns: freezing, phases, penalties, distillation, averages, ends
    rates       optimizers and learning rates
    identity    what a run is, apart from how it is divided over machines
    choosing    what a config leaves open, in the order in which choices need each other: the batch, what fits, and the reasons
    saved       models that were saved: asked, served, written anew, combined
"""
