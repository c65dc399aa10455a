"""What the methods of one family share and no other family needs."""
