"""Methods that find something out about a network and leave it as it is."""
