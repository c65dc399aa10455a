"""What methods that analyze a network share: its inputs, features, heads and decisions."""
