"""mobile-export: one language model, one set of int8 codes, an artefact for every phone runtime."""

__version__ = "0.1.0"
