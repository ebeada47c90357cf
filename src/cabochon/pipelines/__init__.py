"""Several runs that make one thing: plain loops over algorithms."""
