"""What the user wrote: the schema of a run and its loading. Imports pydantic and yaml only, never torch, ray or transformers.

`load.load_config(paths, overrides)` -> `sections.run.RunConfig`. Rooms, from the ground up; each imports those before it:

    sections    the schema: a file per section of the YAML; a default and its sentence exist once, on the field
    reading     files and overrides -> nodes with places (`yaml_nodes`), laid over each other; presets
    words       the same fields as tables, JSON Schema and `explain`; hints for misspelt and foreign names; pages of errors
    checks      what no field can refuse by itself: keys that nothing reads, settings that do not go together, spaces of sweeps
"""
