"""The embedded model `toy`: its corpus grammar, parser, trainer and weights. Evidence about the pipeline only."""
