"""Methods that learn from what a network says, besides the labels."""
