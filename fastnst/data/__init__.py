"""Training images: the manifest, the sampler, the loaders and the cache."""
