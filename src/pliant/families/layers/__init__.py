"""What layer methods share: which layers are replaced, and how the new ones are counted."""
