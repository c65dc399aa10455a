"""What methods share that learn from more than labels."""
