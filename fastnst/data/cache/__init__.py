"""A folder of images that were decoded and resized once, for many runs."""
