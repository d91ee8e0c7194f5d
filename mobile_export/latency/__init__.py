"""Measuring bundles: each run in a process of its own, figures with their protocol."""
