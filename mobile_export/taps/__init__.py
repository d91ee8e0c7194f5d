"""Intermediate values of a model at the same places in every form it takes on the way to a phone."""
