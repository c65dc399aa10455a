"""What methods that bring layers of their own share."""
