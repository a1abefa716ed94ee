"""From files and overrides to nodes with places: overlays, presets, `${...}`, secrets that must not stand there."""
