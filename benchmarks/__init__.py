"""Measurements on real trained models: accuracy, latency, sizes; every published figure comes from a command here."""
