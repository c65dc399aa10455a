"""Finding and proving changes of a network: which channels leave together, what can be folded."""
