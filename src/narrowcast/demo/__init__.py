"""The demonstration: two real models through several presets, with the public API only."""
