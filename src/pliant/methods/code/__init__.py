"""Methods that code the numbers of layers in fewer bits."""
