"""Convolutions that need not save their input for the backward."""
