"""Rows that choose their adapter: the operation for rows sorted by slot, and the experts of sparse models with it."""
