"""What quantizing methods share: layers and levels to choose, and fits to the dense network."""
