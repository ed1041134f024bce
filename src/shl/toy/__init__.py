"""The embedded model `toy`: its corpus grammar, parser, trainer and weights. Evidence that the pipeline works, not about language models."""
