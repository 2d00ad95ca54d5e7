"""Paths of a teacher, recorded ahead of the training that uses them."""
