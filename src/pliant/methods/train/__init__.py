"""Methods that change how a network is trained, not what it is made of."""
