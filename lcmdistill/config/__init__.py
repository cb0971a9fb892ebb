"""Configuration: schema, defaults, presets, and reading and writing TOML. No torch."""
