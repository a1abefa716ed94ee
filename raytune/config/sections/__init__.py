"""What a user may write: one file per section of the YAML. A default and its sentence exist once, on the field."""
