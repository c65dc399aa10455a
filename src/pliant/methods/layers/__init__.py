"""Methods that put other layers into a network."""
