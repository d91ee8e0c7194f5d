"""What a model is for, measured: perplexity on texts, and code that runs. See docs/gate.md."""
