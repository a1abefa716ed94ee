"""What the user wrote: the schema of a run and its loading. Imports pydantic and yaml only, never torch, ray or transformers.

`load.load_config(paths, overrides)` -> `run.RunConfig`. Each section of the YAML is one file here; `document` turns the same
fields into tables, JSON Schema and `explain`. A default and its sentence exist once, on the field. `expressions` is the small
language of search spaces, `space` says what is wrong with one as it is written.
"""
