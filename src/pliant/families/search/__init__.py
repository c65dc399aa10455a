"""The bilevel training of searches."""
