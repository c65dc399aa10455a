"""Methods that write numbers with fewer bits."""
