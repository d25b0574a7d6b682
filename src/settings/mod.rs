//! cannery.toml, the environment and the defaults, as one checked value.
