"""What methods that look at a network share: inputs, scores, heads, evidence, hulls."""
