"""Looking at a network on data: hooks that always come off, statistics in float64."""
