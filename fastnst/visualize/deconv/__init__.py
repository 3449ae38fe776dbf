"""Projections of feature maps back to pixels (Zeiler & Fergus 2014)."""
