"""The operation and its backends; needs torch alone."""
